"The learner: scores before it learns, resumes to the bit, keeps people apart, rolls back when it does harm, and leaves when wiped"
import json, math, os, random, signal, subprocess, sys, threading
from pathlib import Path
import pytest, torch
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import FAMILIES, add_memory, tiny_lm
from chronomem.backbone.model import ChronoModel, byte_tokenizer
from chronomem.core import ManualClock, StateError, data_root, generator
from chronomem.delta.delta import Adapters, DeltaConfig
from chronomem.delta.learner import DeltaLearner, _spelled
from chronomem.ladder.ladder import LadderConfig
from chronomem.live.learning import learning_lines
from chronomem import Session
from chronomem.then.home import memory_dir, overview, read_manifest, wipe_user

ROOT = Path(__file__).resolve().parents[1]
SMALL = DeltaConfig(frame=8, context=8, rank=2, rate=.01, anchors=3, canaries=2, replay=1, capacity=6, window=4, every=4, save_every=1, worse=0.)
TEXT = 'the cat sat on the mat and saw a bird. '*12

def toy(seed=0, family='llama', **kw):
    "The same small model in every process"
    c = MemoryConfig(ladder=LadderConfig.of(2, dims=[8, 8], slots=[1, 1], hidden=16))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return ChronoModel(add_memory(tiny_lm(family, vocab=258, seed=seed), c, **kw).requires_grad_(False), byte_tokenizer(), 'toy')

@pytest.fixture(scope='module')
def model(): return toy()

def losses(rows): return [r['loss'] for r in rows]
def read(model, text, **kw):
    with model.learner('x', config=SMALL.replace(**kw), incognito=True) as ln: return ln.feed(text)

# Honest scores

@pytest.mark.parametrize('kw', [{}, dict(delay=1), dict(delay=2), dict(hide=.2), dict(priority=.6, ema=.3, ema_decay=.9, latent=.1, value=.1, stream_kl=.1)])
def test_changing_the_future_leaves_past_scores_bit_identical(model, kw):
    a, b = read(model, TEXT[:160], **kw), read(model, TEXT[:80] + 'Quite another thing, 123. '*4, **kw)
    assert losses(a)[:10] == losses(b)[:10]
    assert losses(a)[10:] != losses(b)[10:20]

def test_the_first_frame_is_scored_by_the_base_model(model):
    r = read(model, TEXT[:8])[0]
    assert r['loss'] == r['base']
    x = torch.tensor([_spelled(model, TEXT[:8])[0]])
    with torch.no_grad(): out = model.lm.bare(input_ids=x).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(out, x[0, 1:], reduction='sum').item()
    assert math.isclose(r['base_bpb'], (nats + math.log(258))/math.log(2)/8, rel_tol=1e-5)

def test_random_bytes_never_look_predictable(model):
    g = random.Random(0)
    rows = read(model, ''.join(chr(g.randrange(33, 127)) for _ in range(800)))
    bits = sum(r['bpb']*r['bytes'] for r in rows)/sum(r['bytes'] for r in rows)
    assert bits > math.log2(94) - .05, 'less than the entropy of what was drawn: the future leaks'

@pytest.mark.parametrize('delay', [0, 1, 2])
def test_a_delayed_frame_is_paired_with_its_own_truth(model, delay):
    rows = read(model, TEXT[:96], delay=delay)
    assert [r['learned'] for r in rows] == [None]*delay + [*range(len(rows)-delay)]
    assert losses(rows)[:delay+1] == [r['base'] for r in rows[:delay+1]], 'nothing was learned before'

def test_frames_do_not_depend_on_where_texts_are_cut(model):
    whole = read(model, TEXT[:160])
    with model.learner('x', config=SMALL, incognito=True) as ln: parts = ln.feed([TEXT[:5], TEXT[5:99], '', TEXT[99:160]])
    assert [(r['loss'], r['bytes']) for r in whole] == [(r['loss'], r['bytes']) for r in parts]

# Switches

@pytest.mark.parametrize('kw', [dict(replay=1), dict(replay=2, priority=.6), dict(anchor=1.), dict(decay=.1), dict(stream_kl=.5), dict(ema=.5, ema_decay=.5), dict(latent=1.),
                                dict(value=1.), dict(gate='entropy'), dict(gate='surprise'), dict(hide=.5), dict(clip=.01), dict(head=False)], ids=str)
def test_each_switch_changes_learning_and_stays_finite(model, kw):
    plain = dict(replay=0, anchor=0., decay=0., stream_kl=0., press=1.)
    a, b = read(model, TEXT[:120], **plain), read(model, TEXT[:120], **plain | kw)
    assert a[0]['loss'] == b[0]['loss'] and losses(a) != losses(b)
    assert all(math.isfinite(x) for x in losses(b))

def test_a_rate_of_zero_is_the_frozen_model(model):
    assert all(r['loss'] == r['base'] and r['learned'] is None for r in read(model, TEXT[:120], rate=0.))

def test_anchor_holds_the_canaries(model):
    free, held = (read(model, TEXT[:300], rate=.03, replay=0, decay=0., stream_kl=0., anchor=a, press=1.) for a in (0., 8.))
    assert held[-1]['t'] == free[-1]['t']
    last = lambda rows: [r['canary'] for r in rows if r['canary'] is not None][-1]
    assert last(held) < last(free)

def test_updates_are_capped_by_the_clock_given(model):
    clock = ManualClock()
    with model.learner('x', config=SMALL.replace(per_minute=3), incognito=True, clock=clock) as ln:
        first = ln.feed(TEXT[:48])
        clock.advance(61)
        later = ln.feed(TEXT[48:96])
    assert [r['learned'] is not None for r in first + later] == [True]*3 + [False]*3 + [True]*3 + [False]*3

# People apart

def test_two_learners_on_one_model_never_meet(model):
    texts = TEXT[:160], 'NO. 12345, 67890! '*9
    alone, got, was = [read(model, t) for t in texts], {}, model.fingerprint
    def work(i): got[i] = read(model, texts[i])
    ts = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert [losses(got[i]) for i in (0, 1)] == [losses(a) for a in alone]
    assert model.fingerprint == was

@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_learns_and_stays_what_it_was(family):
    m = toy(family=family)
    x = torch.arange(5, 25)[None]
    was = m.lm.bare(input_ids=x).logits
    rows = read(m, TEXT[:240])
    assert sum(losses(rows)[-5:]) < sum(r['base'] for r in rows[-5:])
    assert torch.equal(m.lm.bare(input_ids=x).logits, was)

def test_peft_adapters_stay_beside_the_learner():
    m = toy(lora_r=2)
    rows = read(m, TEXT[:160])
    assert losses(rows)[-1] < rows[-1]['base'] and not any('lora_' in n for n in Adapters(m.lm).layers)

def test_applied_reaches_a_session_and_only_its_thread(model, tmp_path):
    with model.session('ann', tmp_path) as s, model.learner('ann', tmp_path, SMALL.replace(rate=.05)) as ln:
        s.ingest('A thing to remember.')
        before = s.model.answer(s.state, [model.encode('the cat')], max_new_tokens=8)
        ln.feed(TEXT)
        other = []
        with ln.applied():
            inside = ''.join(model.stream(s.state, model.encode('the cat'), max_new_tokens=8))
            t = threading.Thread(target=lambda: other.extend(model.answer(s.state, [model.encode('the cat')], max_new_tokens=8)))
            t.start(); t.join()
        assert inside != before[0] and other == before
        assert model.answer(s.state, [model.encode('the cat')], max_new_tokens=8) == before

def test_what_is_written_does_not_depend_on_what_was_learned(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL.replace(rate=.05)) as ln:
        ln.feed(TEXT)
        x = torch.tensor([model.encode('A thing to remember.')])
        plain = model.lm.encode(x, torch.ones_like(x))
        with ln.applied(): assert torch.equal(model.lm.encode(x, torch.ones_like(x)), plain)

def test_plain_of_one_model_leaves_the_learner_of_another_on(model):
    twin, x = toy(seed=1), torch.arange(5, 25)[None]
    with model.learner('x', config=SMALL.replace(rate=.05), incognito=True) as ln:
        ln.feed(TEXT[:160])
        with torch.no_grad():
            base = model.lm.bare(input_ids=x).logits
            with ln.applied():
                inside = model.lm.bare(input_ids=x).logits
                with twin.lm.plain(): assert torch.equal(model.lm.bare(input_ids=x).logits, inside)
                with model.lm.plain(): assert torch.equal(model.lm.bare(input_ids=x).logits, base)
    assert not torch.equal(inside, base)

# The disk

KILLED = """
import sys; sys.path.insert(0, {tests!r})
from test_delta import SMALL, TEXT, toy
ln = toy().learner('ann', {home!r}, SMALL.replace(save_every={every}))
for row in ln.stream([TEXT[:200], TEXT[200:400]]): print(row['t'], flush=True)
"""

@pytest.mark.parametrize('every, at', [(1, 13), (4, 22)])
def test_a_killed_learner_resumes_to_the_bit(model, tmp_path, every, at):
    whole = read(model, TEXT[:400])
    p = subprocess.Popen([sys.executable, '-c', KILLED.format(tests=str(ROOT/'tests'), home=str(tmp_path), every=every)], stdout=subprocess.PIPE, text=True,
                         env=dict(os.environ, PYTHONPATH=str(ROOT)))
    for line in p.stdout:
        if int(line) == at: p.send_signal(signal.SIGKILL); break
    p.wait()
    with model.learner('ann', tmp_path) as ln:
        begun = ln.t
        assert at-every <= begun <= at+2, 'little is lost'
        assert [r['t'] for r in ln.metrics] == [*range(begun)], 'lines of frames that will be read again are gone'
        rest = [*ln.stream([TEXT[:200], TEXT[200:400]][ln.texts:])]
        assert losses(ln.metrics) == losses(whole)
    assert losses(rest) == losses(whole)[begun:]

def test_rollback_resumes_to_the_bit_too(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL) as ln:
        ln.feed(TEXT[:200])
        good = ln.good
        ln.close()
    with model.learner('ann', tmp_path) as ln:
        flat = lambda td: dict(td.flatten_keys('|').items())
        assert all(torch.equal(v, flat(ln.good['state'])[k]) for k, v in flat(good['state']).items())
        assert torch.equal(ln.good['gen'], good['gen']) and ln.good['n'] == good['n']

def test_metrics_are_numbers_and_files_are_private(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL) as ln: ln.feed(TEXT[:80])
    d = memory_dir(tmp_path, 'ann', 'toy', create=False)/'learner'
    for line in (d/'metrics.jsonl').read_text().splitlines():
        assert all(v is None or isinstance(v, (int, float, bool)) for v in json.loads(line).values())
    assert all(p.stat().st_mode & 0o077 == 0 for p in d.iterdir()) and d.stat().st_mode & 0o077 == 0
    assert b'the cat' not in (d/'state.safetensors').read_bytes()

def test_a_torn_line_of_the_log_is_let_go(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL) as ln: ln.feed(TEXT[:80])
    with open(ln.dir/'metrics.jsonl', 'a') as f: f.write('{"t": 99, "lo')
    with model.learner('ann', tmp_path) as ln:
        ln.feed(TEXT[80:96])
        assert [r['t'] for r in ln.metrics] == [*range(12)]

def test_one_learner_at_a_time_and_none_after_close(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL) as ln:
        with pytest.raises(StateError, match='in use'): model.learner('ann', tmp_path)
    with pytest.raises(StateError, match='closed'): ln.feed(TEXT)
    ln.close()

def test_settings_that_shape_the_state_cannot_change(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL) as ln: ln.feed(TEXT[:80])
    with pytest.raises(StateError, match='config.rank: expected 2'): model.learner('ann', tmp_path, SMALL.replace(rank=4))
    with pytest.raises(StateError, match='config.ema'): model.learner('ann', tmp_path, SMALL.replace(ema=.1))
    with model.learner('ann', tmp_path, SMALL.replace(rate=.5)) as ln: assert ln.config.rate == .5 and ln.t == 10

def test_a_damaged_state_is_named(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL) as ln: ln.feed(TEXT[:80])
    raw = bytearray((ln.dir/'state.safetensors').read_bytes())
    raw[len(raw)//2] ^= 1
    (ln.dir/'state.safetensors').write_bytes(raw)
    with pytest.raises(StateError, match='state.safetensors is not a whole state file'): model.learner('ann', tmp_path)

def test_memory_and_learner_share_a_directory(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL) as ln: ln.feed(TEXT[:80])
    assert [(r['user'], r['problem']) for r in overview(tmp_path)] == [('ann', '')]
    with model.session('ann', tmp_path) as s: s.ingest('Hello there.')
    with model.session('ann', tmp_path) as s, model.learner('ann', tmp_path) as ln: assert (s.t, ln.t) == (1, 10)
    assert read_manifest(memory_dir(tmp_path, 'ann', 'toy', create=False)).user == 'ann'

@pytest.mark.parametrize('how', ['session', 'user'])
def test_a_wipe_takes_the_learner_too(model, tmp_path, how):
    ln = model.learner('ann', tmp_path, SMALL)
    ln.feed(TEXT[:80])
    if how == 'user': wipe_user('ann', tmp_path)
    else:
        with model.session('ann', tmp_path) as s: s.wipe()
    for use in (lambda: ln.feed(TEXT), ln.save, lambda: ln.applied().__enter__()):
        with pytest.raises(StateError, match='wiped|closed'): use()
    ln.close()
    assert not [*tmp_path.rglob('learner')]

def test_incognito_leaves_nothing(model, tmp_path):
    with model.learner('ann', tmp_path, SMALL, incognito=True) as ln:
        ln.feed(TEXT[:80])
        with pytest.raises(StateError, match='incognito'): ln.save()
    assert not [*tmp_path.iterdir()]

# Sessions

def test_the_names_of_the_package_bring_learning_along():
    code = "import chronomem; m = chronomem.ChronoModel, chronomem.Session; print(hasattr(m[0], 'learner'), hasattr(m[1], 'learn'), hasattr(m[1], 'memories'))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)), check=True).stdout
    assert out.split() == ['True']*3

def test_a_session_learns_answers_with_it_and_goes_on(model, tmp_path):
    say = lambda s, **kw: s.ask('the cat', max_new_tokens=8, remember=False, **kw)
    with model.session('ann', tmp_path, recall='none') as s, model.session('bob', tmp_path, recall='none') as other:
        before = say(s)
        s.learn(TEXT[:300], SMALL.replace(rate=.05))
        after = say(s)
        assert after != before == say(s, learned=False) == say(other)
        assert say(s, sources=True) == (after, []) and ''.join(say(s, stream=True, sources=True)[0]) == after
        pieces, ln = say(s, stream=True), s.learner()
    assert ln.closed
    with model.session('ann', tmp_path, recall='none') as s:
        assert s.learner().t == 38 and say(s) == after
        s.learner().close()
        assert say(s) == before

def test_a_stream_that_is_left_or_changes_hands_keeps_its_weights(model):
    with model.session('ann', incognito=True, recall='none') as s:
        s.learn(TEXT[:300], SMALL.replace(rate=.05))
        say = lambda: s.ask('the cat', max_new_tokens=8, remember=False, stream=True, eos_token_id=None)
        want, pieces, got = ''.join(say()), say(), []
        t = threading.Thread(target=lambda: got.extend(pieces))
        t.start(); t.join()
        assert ''.join(got) == want
        left = say(); next(left, None); left.close()
        assert ''.join(say()) == want

def test_memory_does_not_depend_on_an_open_learner(model):
    states = []
    for learns in (False, True):
        with model.session('ann', incognito=True, clock=ManualClock(1.)) as s:
            if learns: s.learn(TEXT[:200], SMALL.replace(rate=.05))
            s.ingest('A thing to remember.')
            states.append(s.state.to_tensordict())
    assert (states[0] == states[1]).all()

def test_an_incognito_session_learns_incognito(model, tmp_path):
    with model.session('ann', tmp_path, incognito=True) as s: assert s.learn(TEXT[:80], SMALL)[-1]['learned'] is not None
    assert not [*tmp_path.iterdir()]

def test_a_wiped_session_learns_anew(model, tmp_path):
    with model.session('ann', tmp_path) as s:
        s.learn(TEXT[:80], SMALL)
        s.wipe()
        assert not [*tmp_path.rglob('learner')] and isinstance(s.ask('the cat', max_new_tokens=4, remember=False), str)
        s.learn(TEXT[:40], SMALL)
        assert s.learner().t == 5
    assert (s.dir/'learner'/'state.safetensors').exists()

@pytest.mark.parametrize('how', ['path', 'lines', 'pipe'])
def test_lines_say_how_it_goes_and_what_it_came_to(model, tmp_path, monkeypatch, how):
    import io
    text = TEXT[:200] + '\n' + TEXT[200:300]
    (tmp_path/'t.txt').write_text(text)
    monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
    source = dict(path=str(tmp_path/'t.txt'), pipe='-', lines=text.splitlines(True))[how]
    with model.session('ann', tmp_path) as s: out = [*learning_lines(s, source, 10, SMALL)]
    assert len(out) == 4 and out[-1].startswith('Read 301 bytes in ') and '38 updates, rolled back 0.' in out[-1]
    assert all(w in out[0] for w in ('80 bytes, ', ' bits a byte, ', ' without learning', 'canaries', 'KL ', 'rolled back 0'))
    with pytest.raises(FileNotFoundError), model.session('ann', tmp_path) as s: [*learning_lines(s, str(tmp_path/'none.txt'), 10, SMALL)]

# Guards

def test_a_loss_that_is_no_number_rolls_back(model):
    with model.learner('x', config=SMALL.replace(worse=.3), incognito=True) as ln:
        ln.feed(TEXT[:160])
        good = {k: v.clone() for k, v in ln.good['state']['weights'].items()}
        for v in ln.state['weights'].values(): v.fill_(math.nan)
        row = ln.feed(TEXT[160:168])[0]
        assert row['rolled_back'] and row['loss'] is None
        assert all(torch.equal(v, good[k]) for k, v in ln.state['weights'].items())
        assert math.isfinite(ln.feed(TEXT[168:176])[0]['loss'])

def test_control_tokens_that_people_type_are_text(model):
    eos = model.tokenizer.eos_token_id
    with model.learner('x', config=SMALL, incognito=True) as ln:
        ln.feed('one <eos> two <eos> three')
        ids = ln.state['replay']['ids'].flatten().tolist() + ln.queue
    assert eos not in ids

def test_the_kl_on_the_stream_costs_no_pass(model):
    free = dict(replay=0, anchor=0., canaries=0, press=1.)
    a, b = (read(model, TEXT[:80], stream_kl=k, **free) for k in (0., .3))
    assert [r['passes'] for r in a] == [r['passes'] for r in b] and losses(a)[0] == losses(b)[0] and losses(a)[2:] != losses(b)[2:]

@pytest.mark.slow
@pytest.mark.data
def test_a_clean_stream_is_never_rolled_back_and_a_fault_is():
    text = (data_root()/'text'/'tinyshakespeare.txt').read_text()
    docs = (data_root()/'text'/'python_docs_and_code.txt').read_text()
    with ChronoModel.default().learner('x', incognito=True) as ln:
        rows = ln.feed([text[:3000], docs[20_000:23_000], text[50_000:52_000]])
        assert not any(r['rolled_back'] for r in rows)
        ln.config = ln.config.replace(rate=30*ln.config.rate)
        rows = ln.feed(text[52_000:54_500])
        assert any(r['rolled_back'] for r in rows[:9])
