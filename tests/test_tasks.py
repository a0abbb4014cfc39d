"Tasks, agents and evaluation: what must hold for any seed, size and split"
import json, math
from statistics import NormalDist
from types import SimpleNamespace

import pytest, torch
from hypothesis import given, settings, strategies as st

from chronomem.core import generator
from chronomem.learn.agents import STOP, Keyboard, NamingEnv, hidden_intent, naming, names, oracle, personality, spell
from chronomem.learn.evaluate import ablate, alone, bootstrap_mean, evaluate, interval, paired_difference, recall_by_delay, seeds_table, stateful_minus_wiped, wilson
from chronomem.backbone.episodes import Episode, pack, unroll
from chronomem.learn.tasks import TASKS, VOCAB, Vocab, checksum, copy, memoryless, multi_fact, noisy_logs, passkey, rewrite, steer, stream_recall

some = settings(max_examples=15)
seeds = st.integers(0, 2**31)
splits = st.sampled_from(['train', 'test'])
MAKE = {k: f for k, (f, _) in TASKS.items()}
each_task = pytest.mark.parametrize('name', MAKE)

def everything(ep): return [ep.ids, ep.mask, ep.labels, ep.order, ep.ask, ep.gap]
def same(a, b): return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(everything(a), everything(b)))
def questions(ep): return (ep.labels >= 0).any(1)

# Episodes

@each_task
@some
@given(seed=seeds, noise=st.integers(0, 7), split=splits)
def test_episode_is_sound_and_repeats(name, seed, noise, split):
    make = MAKE[name]
    ep = make(8, noise, generator(seed), split=split)
    assert same(ep, make(8, noise, generator(seed), split=split))
    assert torch.equal(ep.mask, (ep.ids != VOCAB.pad).long())
    assert int(ep.ids.max()) < len(VOCAB) and ep.order.shape[0] == 8
    assert (ep.mask.diff(dim=1) >= 0).all(), 'padding is on the left'
    asked = questions(ep)[ep.order]
    assert not asked[:, [t for t in range(ep.order.shape[1]) if t not in ep.ask]].any(), 'labels only where asked'
    assert asked[:, list(ep.ask)].any(0).all() and not asked[:, slice(*ep.gap)].any()
    assert len(ep.order.unique()) <= len(ep.ids)

@each_task
@some
@given(seed=seeds, cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_window_is_slicing(name, seed, cut):
    ep = MAKE[name](8, 3, generator(seed))
    T = ep.order.shape[1]
    a, b = sorted(round(c*T) for c in cut)
    w = ep.window(a, b)
    for k in ('ids', 'mask', 'labels'): assert torch.equal(getattr(w, k)[w.order], getattr(ep, k)[ep.order[:, a:b]])
    assert w.ask == tuple(s-a for s in ep.ask if a <= s < b)
    assert len(w.ids) == len(ep.order[:, a:b].unique())
    assert same(w.window(0, b-a), w)

@each_task
def test_splits_share_no_content(name):
    def heard(split):
        eps = [MAKE[name](48, 6, generator(s, name), split=split, pool=64) for s in range(6)]
        drop = lambda ep: questions(ep) | (ep.ids[:, -5] == VOCAB.screen) if name == 'naming' else questions(ep)
        return {tuple(x) for ep in eps for x in ep.ids[~drop(ep)].tolist()}
    train, test = heard('train'), heard('test')
    assert len(train) > 100 and len(test) > 100 and not train & test

@each_task
def test_unknown_split(name):
    with pytest.raises(ValueError, match='split'): MAKE[name](8, 1, generator(0), split='valid')

@pytest.mark.parametrize('change, match', [
    (dict(order=torch.tensor([[0, 2]])), 'order'), (dict(order=torch.tensor([[-1, 0]])), 'order'), (dict(ask=(2,)), 'ask'), (dict(ask=(1, 0)), 'ask'),
    (dict(ask=(1, 1)), 'ask'), (dict(gap=(1, 3)), 'gap'), (dict(gap=(2, 1)), 'gap'), (dict(mask=torch.ones(2, 2)), 'ids'),
    (dict(labels=torch.tensor([[-100, 9, -100]]*2)), 'labels'), (dict(labels=torch.tensor([[3, -100, -100]]*2)), 'labels')])
def test_bad_episodes_are_refused(change, match):
    ok = dict(ids=torch.tensor([[3, 4, 5]]*2), mask=torch.ones(2, 3), labels=torch.full((2, 3), -100), order=torch.tensor([[0, 1]]))
    Episode(**ok)
    with pytest.raises(ValueError, match=f'Episode.{match}'): Episode(**ok | change)

@some
@given(seed=seeds, B=st.integers(1, 4), T=st.integers(1, 5))
def test_pack_keeps_every_inference(seed, B, T):
    g = generator(seed)
    ids, answer = torch.randint(1, 3, (B, T, 3), generator=g), torch.rand(B, T, 3, generator=g) < .2
    answer[..., 0] = False
    ep = pack(ids, answer)
    assert torch.equal(ep.ids[ep.order], ids) and torch.equal(ep.labels[ep.order] >= 0, answer)
    assert len(torch.cat([ep.ids, ep.labels], 1).unique(dim=0)) == len(ep.ids)

@given(seed=seeds, n=st.integers(1, 9), split=splits, at=st.integers(-9, 8))
def test_steer_moves_one_symbol_within_its_four(seed, n, split, at):
    at = at % n
    x = torch.randint(8, 24, (32, n), generator=generator(seed))
    y = steer(x, at, 8, split, generator(seed))
    assert ((checksum(y) == 0) == (split == 'test')).all()
    rest = [i for i in range(n) if i != at]
    assert torch.equal(x[:, rest], y[:, rest]) and torch.equal((x[:, at]-8)//4, (y[:, at]-8)//4)
    assert torch.equal(y, steer(x, at-n, 8, split, generator(seed))), 'columns count from either end'

def test_vocab():
    v = Vocab(pad=1, a=2, b=1, c=('x', 'y'))
    assert (v.pad, list(v.a), v.b, list(v.c), len(v)) == (0, [1, 2], 3, [4, 5], 6)
    assert v.decode(torch.tensor([0, 3, 2, 5])) == 'b a1 y' and len(set(VOCAB.names)) == len(VOCAB)

# What each task promises

def first(ep): return ep.ids[ep.order]

@some
@given(seed=seeds, shared=st.booleans(), noise=st.integers(0, 9))
def test_passkey_answer_was_told(seed, shared, noise):
    x = first(passkey(8, noise, generator(seed), shared=shared))
    assert torch.equal(x[:, 0, 3], x[:, -1, -1]) and x.shape[1] == noise+2
    values = torch.isin(x[:, 1:-1], torch.tensor(list(VOCAB.value)))
    assert values.all() if shared else not values.any()

@some
@given(seed=seeds, n=st.integers(2, 8), spread=st.booleans())
def test_copy_in_order(seed, n, spread):
    x = first(copy(8, 3, generator(seed), symbols=n, spread=spread))
    shown = x[:, :n, -1] if spread else x[:, 0, -n:]
    assert torch.equal(shown, x[:, -1, -n:])

@some
@given(seed=seeds, K=st.integers(1, 16), scatter=st.integers(0, 5), every=st.booleans())
def test_facts_are_asked_as_told(seed, K, scatter, every):
    ep = multi_fact(4, 2, generator(seed), facts=K, scatter=scatter, every=every)
    for row in first(ep).tolist():
        told = {l[3]: l[4] for l in row if l[2] == VOCAB.tell}
        asked = {l[-2]: l[-1] for l in row if l[-3] == VOCAB.ask}
        assert len(told) == K and len(asked) == (K if every else 1) and asked.items() <= told.items()
    with pytest.raises(ValueError, match='keys'): multi_fact(4, 2, generator(seed), facts=17)

@some
@given(seed=seeds, keys=st.integers(1, 5), times=st.integers(1, 5), every=st.booleans())
def test_the_newest_value_counts(seed, keys, times, every):
    for row in first(rewrite(4, 2, generator(seed), keys=keys, times=times, scatter=2, every=every)).tolist():
        lines = [l for l in row if l[2] == VOCAB.tell]
        newest = {l[3]: l[4] for l in lines}
        assert len(lines) == keys*times and len(newest) == keys
        assert {l[-2]: l[-1] for l in row if l[-3] == VOCAB.ask}.items() <= newest.items()

@some
@given(seed=seeds, n=st.integers(0, 20), sources=st.integers(1, 6), dup=st.floats(0, 1))
def test_logs_hold_one_fact_per_source(seed, n, sources, dup):
    ep = noisy_logs(4, n, generator(seed), sources=sources, duplicates=dup, delay=2)
    for row in first(ep).tolist():
        lines = [tuple(l) for l in row[:-3]]
        facts = {l[3:5] for l in lines if l[2] == VOCAB.tell}
        assert len(facts) == len({k for k, _ in facts}) == sources and tuple(row[-1][-2:]) in facts
        assert len(lines) == sources+n + round(dup*(sources+n)) and len(set(lines)) <= sources+n

# Agents

@some
@given(seed=seeds, rows=st.integers(1, 4), cols=st.integers(1, 6), short=st.integers(1, 7), long=st.integers(1, 7), split=splits)
def test_the_oracle_spells_every_name(seed, rows, cols, short, long, split):
    if rows*cols % 4 or short > long:
        with pytest.raises(ValueError, match='Keyboard'): Keyboard(rows=rows, cols=cols, shortest=short, longest=long)
        return
    kb = Keyboard(rows=rows, cols=cols, shortest=short, longest=long)
    x = names(16, kb, generator(seed), split)
    size = (x >= 0).sum(1)
    assert ((size >= short) & (size <= long)).all() and int(x.max()) < rows*cols
    assert torch.equal((x >= 0).int(), (x >= 0).int().sort(1, descending=True).values)
    env = NamingEnv(x, kb, generator(seed))
    for _ in range(long*(rows+cols)+1): env.act(oracle(env))
    assert env.spelled.all() and torch.equal(env.typed, x)

@some
@given(seed=seeds, steps=st.integers(1, 60))
def test_random_play_stays_on_the_keyboard(seed, steps):
    g, kb = generator(seed), Keyboard()
    env = NamingEnv(names(32, kb, g), kb, g)
    for _ in range(steps):
        before = env.at.clone(), env.typed.clone(), env.stopped.clone()
        env.act(torch.randint(6, (32,), generator=g))
        assert (env.at >= 0).all() and (env.at < torch.tensor([4, 6])).all() and (env.count <= 6).all()
        still = before[2]
        assert torch.equal(env.at[still], before[0][still]) and torch.equal(env.typed[still], before[1][still])
        assert env.observe().shape == (32, 5) and int(env.observe().max()) < len(VOCAB)
    assert torch.equal((env.typed >= 0).sum(1), env.count)

@some
@given(seed=seeds, noise=st.integers(0, 12), delay=st.integers(0, 5))
def test_naming_is_labelled_with_the_oracles_moves(seed, noise, delay):
    ep = naming(4, noise, generator(seed), delay=delay)
    for row in first(ep).tolist():
        name = [i-VOCAB.letter.start for i in row[0] if i in VOCAB.letter]
        typed, lines = [], [l for l in row if l[-2] == VOCAB.act]
        for l in lines:
            if l[-1] == VOCAB.move[4]: typed.append((l[-5]-VOCAB.row.start)*6 + l[-4]-VOCAB.col.start)
        assert typed == name and lines[-1][-1] == VOCAB.move[STOP]
        assert [l[-3] for l in lines[1:]] == [l[-1] for l in lines[:-1]], 'each screen shows the last action'
    assert (ep.ids[ep.order[:, 1:1+delay]] >= VOCAB.noise.start).all()

@some
@given(seed=seeds, K=st.integers(2, 8), situations=st.integers(1, 5), split=splits)
def test_intent_is_exactly_chance_without_memory(seed, K, situations, split):
    ep = hidden_intent(6*K, 3, generator(seed), goals=K, situations=situations, split=split)
    assert memoryless(ep) == 1/K
    x = first(ep).view(6, K, -1, 8)
    assert (x[:, :, 1:-1] == x[:, :1, 1:-1]).all() and (x[:, :, -1, :-1] == x[:, :1, -1, :-1]).all()

@some
@given(seed=seeds, K=st.sampled_from([2, 4]), choices=st.integers(1, 4), split=splits)
def test_personality_is_exactly_chance_without_memory(seed, K, choices, split):
    ep = personality(6*K, 2, generator(seed), kinds=K, choices=choices, split=split)
    assert memoryless(ep) == 1/K and len(ep.ask) == choices

@pytest.mark.parametrize('make', [hidden_intent, personality])
def test_groups_must_be_whole(make):
    with pytest.raises(ValueError, match='multiple'): make(7, 1, generator(0))

# Living

class Echo(torch.nn.Module):
    "Remembers the last told value for ever; the protocol of a MemoryLM"
    sees, asks, wants_hint, shaping = False, False, False, None
    memory = property(lambda self: self)
    def init(self, B, device=None): return torch.zeros(B, dtype=torch.long)
    def encode(self, ids, mask): return torch.where((ids[:, 2] == VOCAB.tell), ids[:, 3], 0)
    def scan(self, state, h, gate='hard', read_at=()):
        reads = []
        for t in range(h.shape[1]):
            if t in read_at: reads.append(state)
            state = torch.where(h[:, t] > 0, h[:, t], state)
        log = SimpleNamespace(open=(h > 0)[..., None])
        return state, log, [torch.stack(reads, 1), torch.stack(reads, 1) > 0] if reads else []
    def answer_loss(self, ids, mask, labels, soft, seen): return torch.tensor(1.), torch.where(seen, soft, 0) == labels[:, -1]

def test_unroll_and_controls():
    out = unroll(Echo(), passkey(16, 5, generator(0)))[1]
    assert out['ok'].all() and out['asked'].all() and out['ok'].shape == (16, 1)
    assert not unroll(Echo(), passkey(16, 5, generator(0)), wipe=True)[1]['ok'].any()
    state, none = unroll(Echo(), passkey(16, 5, generator(0)).window(0, 4))
    assert none['loss'] is None and none['ok'] is None
    assert unroll(Echo(), passkey(16, 5, generator(0)).window(4, 7), state)[1]['ok'].all()

def test_rows_without_a_label_are_not_run():
    ids = torch.tensor([[[9, 9, VOCAB.tell, 10]], [[9, 9, 9, 10]]]).expand(2, 3, 4).clone()
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[0, 2, -1] = True
    out = unroll(Echo(), pack(ids, answer))[1]
    assert out['asked'].tolist() == [[True], [False]] and out['ok'].tolist() == [[True], [False]]

@some
@given(noise=st.integers(0, 40), chunk=st.integers(1, 15))
def test_stream_recall(noise, chunk):
    m = Echo().train()
    out = stream_recall(m, passkey, noise, 4, generator(noise), chunk)
    assert out['ok'].all() and not out['wiped'].any() and m.training
    assert float(torch.as_tensor(out['wrote']).sum()) == 0.
    assert stateful_minus_wiped(out) == (1., 1., 1.)

def test_evaluate_and_delays():
    rows = evaluate(Echo(), lambda b, generator: passkey(b, 4, generator), 2, batch=20)
    assert [r['accuracy'] for r in rows] == [1., 0., 0., 1.] and rows[0]['lives'] == 40
    assert [r['delay'] for r in recall_by_delay(Echo(), passkey, (0, 3), batch=8)] == [0, 3]
    ep = multi_fact(3, 1, generator(0))
    assert alone(ep).order.shape == (12, 1) and questions(alone(ep))[alone(ep).order].all()

@pytest.mark.parametrize('kind', ['ladder', 'recurrent'])
def test_a_real_model(kind):
    from transformers import LlamaConfig, LlamaForCausalLM
    from chronomem.backbone.backbone import MemoryConfig, MemoryLM
    from chronomem.ladder.ladder import LadderConfig
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCAB), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
    m = MemoryLM(lm, MemoryConfig(kind=kind, n_mem=1, ladder=LadderConfig.of(3, dims=(16,)*3, slots=(2,)*3, hidden=16)))
    for make in MAKE.values():
        m.zero_grad()
        out = unroll(m, make(8, 2, generator(0)), gate='always' if kind == 'ladder' else 'hard')[1]
        out['loss'].backward()
        assert math.isfinite(out['loss'].item()) and m.mem.grad.abs().sum() > 0, 'the question reaches what was written'
    ep = multi_fact(4, 3, generator(1))
    whole, half = unroll(m, ep)[1], unroll(m, ep.window(4, ep.order.shape[1]), unroll(m, ep.window(0, 4))[0])[1]
    assert abs(whole['loss'].item()-half['loss'].item()) < 1e-5
    kb = Keyboard(rows=2, cols=2, shortest=1, longest=2)
    r = spell(m, NamingEnv(names(4, kb, generator(0)), kb, generator(0)), generator(0), noise=1, delay=1, limit=3)
    assert r['spelled'].shape == (4,) and r['steps'] >= 3

# Statistics

@given(n=st.integers(1, 400), share=st.floats(0, 1), confidence=st.floats(.5, .999))
def test_wilson_is_an_interval(n, share, confidence):
    k = round(share*n)
    low, high = wilson(k, n, confidence)
    assert 0 <= low <= k/n <= high <= 1 and low < high
    other = wilson(n-k, n, confidence)
    assert abs(low - (1-other[1])) < 1e-12
    z = NormalDist().inv_cdf((1+confidence)/2)
    for end in (low, high):                                           # each end solves |p - k/n| = z sd(p)
        if 0 < end < 1: assert abs(end-k/n) == pytest.approx(z*math.sqrt(end*(1-end)/n), rel=1e-6, abs=1e-12)

def test_statistics_against_known_values():
    assert wilson(0, 10) == pytest.approx((0, .2775), abs=1e-4) and wilson(10, 10) == pytest.approx((.7225, 1), abs=1e-4)
    assert interval(torch.ones(10, 3))[1] == wilson(10, 10)[0]
    x = torch.randn(200, generator=generator(0))
    assert bootstrap_mean(x) == bootstrap_mean(x) != bootstrap_mean(x, seed=1)
    m, low, high = bootstrap_mean(x)
    assert low < m < high and (high-low) == pytest.approx(2*1.96*x.std().item()/200**.5, rel=.1)
    assert paired_difference(x+1, x) == pytest.approx((1., 1., 1.), abs=1e-5)
    for bad in ((1, 0), (2, 1), (-1, 5)):
        with pytest.raises(ValueError, match='wilson'): wilson(*bad)
    with pytest.raises(ValueError): bootstrap_mean([])

def test_seeds_table_shows_the_worst():
    rows = [dict(name=n, accuracy=a) for n, a in (('a', 1.), ('a', .2), ('b', .5))]
    assert [(r['name'], r['worst'], r['seeds']) for r in seeds_table(rows)] == [('a', .2, 2), ('b', .5, 1)]
    assert seeds_table(rows, better='low')[0]['worst'] == 1.
    assert '| a |' in seeds_table(rows)._repr_markdown_()

@some
@given(cut=st.integers(0, 400))
def test_ablate_resumes_from_any_cut(tmp_path_factory, cut):
    path, calls = tmp_path_factory.mktemp('grid')/'r.jsonl', []
    def run(seed, x): calls.append((x, seed)); return dict(accuracy=x+seed)
    grid = dict(a=dict(x=1), b=dict(x=2))
    first = ablate(grid, run, seeds=(0, 1), path=path, progress=False)
    raw = path.read_bytes()
    path.write_bytes(raw[:cut])
    whole = raw[:cut].count(b'\n')
    again = ablate(grid, run, seeds=(0, 1), path=path, progress=False)
    assert len(calls) == 8-whole and [r['accuracy'] for r in again] == [r['accuracy'] for r in first]
    assert len([json.loads(l) for l in path.read_text().splitlines()]) == 4

def test_ablate_keeps_what_was_done_before_a_failure(tmp_path):
    def run(seed):
        if seed == 2: raise RuntimeError('out of memory')
        return dict(accuracy=1.)
    with pytest.raises(RuntimeError): ablate(dict(a={}), run, path=tmp_path/'r', progress=False)
    assert len((tmp_path/'r').read_text().splitlines()) == 2

# Training, by hand

def trainer(length=3, **kw):
    from chronomem.backbone.backbone import MemoryConfig
    from chronomem.backbone.families import add_memory, tiny_lm
    from chronomem.ladder.ladder import LadderConfig
    from chronomem.learn.train import TrainConfig, Trainer
    torch.manual_seed(0)
    n = 3
    c = MemoryConfig(n_mem=1, ladder=LadderConfig(taus=(1, 2, 4), dims=(8,)*n, slots=(1,)*n, phases=(0,)*n, hidden=8))
    m = add_memory(tiny_lm('llama', vocab=len(VOCAB), d=16, layers=1), c, train_backbone=True)
    return Trainer(m, lambda l, g: passkey(4, l, g), TrainConfig(**dict(lengths=(0, 1, 2), updates=50, settle=10, patience=2, promote=.9, lr=1., gate_lr=.5) | kw))

def test_one_rung_more_per_stage():
    t = trainer(unlock=True)
    m = t.model.memory
    for t.stage in (0, 1, 2):
        with t.unlocked(): assert m.unlocked == t.stage+1
        assert m.unlocked == 3, 'all of them outside of training'
    t.stage, t.settled = 0, 5
    with t.unlocked(): assert m.unlocked == 3, 'and once the gates have settled'
    t = trainer()
    with t.unlocked(): assert t.model.memory.unlocked == 3

def test_a_stage_ends_when_it_is_mastered():
    "Two updates of .9 on average end a stage, and only its own count; the last one's end begins the settling"
    t = trainer(patience=2)
    seen = []
    for a in (.8, .96, .86, .5, 1., 1., .7, 1., 1.): t.advance(a); seen.append((t.stage, t.settled))
    assert seen == [(0, None)]*2 + [(1, None)]*3 + [(2, None)]*3 + [(2, 9)]
    t.n = 18; assert not t.done
    t.n = 19; assert t.done
    t = trainer(updates=3)
    for a in (0., 0., 0.): t.advance(a)
    assert (t.stage, t.settled) == (0, 3), 'or when the updates are used up'

def test_rates_rise_and_fall():
    t = trainer(warmup=4)
    rate = lambda name: next(g['lr'] for g in t.optimizer.param_groups if g['name'] == name)
    def told(): t.rates(); return rate('memory'), rate('gate')
    for t.n, up in ((0, .25), (1, .5), (3, 1.), (9, 1.)): assert told() == (up, 0.), 'gates that are always open rest'
    t.stage = 1; assert told() == (1., .5)
    t.settled = 10
    for t.n, down in ((10, 1.), (13, .7), (20, .02)): assert told() == pytest.approx((down, .5*down))
    assert [t.gate, (setattr(t, 'settled', None), t.gate)[1], (setattr(t, 'stage', 0), t.gate)[1]] == ['hard', 'sample', 'always']

def test_hindsight_by_hand():
    "Gates at .8 and .8, of which hindsight wanted one: half of -log .8 - log .2; what was not due does not count"
    t = trainer(hindsight=2.); t.stage = 1
    keep = torch.tensor([[True, False, True]])
    ep = Episode(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2), torch.tensor([[-100, 1]]), torch.zeros(1, 3, dtype=torch.long), (2,), keep=keep)
    log = SimpleNamespace(p=torch.tensor([[[.8], [.8], [.1]]]), due=torch.tensor([[[True], [True], [False]]]))
    assert t.taught(ep, log).item() == pytest.approx(-math.log(.8) - math.log(.2), rel=1e-4)

def test_windows_of_an_episode_give_the_gradient_of_all_of_it():
    "Loss and answers of a life cut into windows are the life's"
    whole, cut = trainer(), trainer(window=2)
    out = []
    for t in (whole, cut):
        t.model.eval(); ep = multi_fact(4, 1, generator(3), facts=3)
        torch.manual_seed(0); loss, right, log = t.backward(ep); out.append((loss.item(), right.item(), log.open.float().mean().item()))
    assert out[0] == pytest.approx(out[1], rel=1e-4)

def test_losses_of_episodes_by_hand():
    "Each life's own mean over its answers; with the memory wiped, a model that reads nothing says the same"
    from chronomem.learn.train import row_losses
    t = trainer(); m = t.model.eval()
    ep = multi_fact(4, 0, generator(3), facts=3)
    with torch.no_grad():
        out = unroll(m, ep, gate='always')[1]
        rows = row_losses(m, ep, out['reads'])
        assert rows.shape == (4,) and rows.mean().item() == pytest.approx(out['loss'].item(), rel=1e-4)
        bare = row_losses(m, ep, out['reads'], wipe=True)
    assert bare.mean().item() == pytest.approx(unroll(m, ep, gate='always', wipe=True)[1]['loss'].item(), rel=1e-4) and not torch.allclose(rows, bare)

def test_the_best_without_memory_by_hand():
    "Of three same questions with answers 9, 9 and 8 the best guess gets two right; a fourth question is its own"
    ids = torch.tensor([[5, 9], [5, 9], [5, 8], [6, 8]])[:, None]
    answer = torch.zeros_like(ids, dtype=torch.bool); answer[..., 1] = True
    assert memoryless(pack(ids, answer)) == 3/4

def test_checksum_by_hand():
    assert checksum(torch.tensor([[1, 1, 1], [2, 0, 1], [3, 1, 2]])).tolist() == [(1+3+5) % 4, (2+5) % 4, (3+3+10) % 4]

@pytest.mark.parametrize('window', (1, 2, 3))
def test_a_last_window_may_be_one_step(window):
    t = trainer(window=window)
    loss, right, log = t.backward(passkey(4, 3, generator(0)))        # five steps
    assert math.isfinite(loss.item()) and log.p.shape[:2] == (4, 5)
