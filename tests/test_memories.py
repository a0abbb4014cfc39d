"Text traces: what is told is found, listed, and forgotten so exactly that nothing shows it was ever there"
import os, threading, warnings
import pytest, torch
from chronomem.core import ManualClock, StateError
import chronomem.live.repair   # noqa: F401, for model.repair
from chronomem.live.session import Retention
from chronomem.then.home import read_manifest, wipe_user
from test_session import die, home, model, same, text   # noqa: F401

def told(n): return [f'{chr(97+i)*8} is number {i}' for i in range(n)]

def life(s, texts):
    for t in texts: s.ingest(t, role='user', source='chat', position=1)
    return s

def alone(model, texts): return life(model.session('alone', incognito=True), texts)

def holds(dir, model, words):
    ids = torch.tensor(model.encode(words)[1:7], dtype=torch.int32).numpy().tobytes()
    return any(b in p.read_bytes() for p in dir.rglob('*') if p.is_file() for b in (words.encode(), ids))

@pytest.mark.parametrize('which', [0, 2, 4])
@pytest.mark.parametrize('incognito', [False, True])
def test_forgotten_is_as_never_told(model, home, which, incognito):
    texts = told(5)
    with life(model.session('ada', home, incognito=incognito), texts) as s:
        gone = [m for m in s.memories() if m.text == texts[which]]
        assert len(gone) == 1 and gone[0].source == 'chat' and gone[0].position == 1
        out = s.forget(gone[0].id)
        rest = texts[:which]+texts[which+1:]
        assert out.exact and out.texts == 1 and same(s, alone(model, rest))
        assert [m.text for m in s.memories()] == rest[::-1]
        if incognito: assert not s.dir.exists(); return
        assert not holds(s.dir, model, texts[which]) and holds(s.dir, model, rest[0])
        now = s.state.clone()
        life(s, ['and then'])
        die(s)
    with model.session('ada', home) as again: assert same(again, alone(model, rest+['and then'])) and not again.problems

def test_forget_several_and_twice(model, home):
    texts = told(6)
    s = life(model.session('ada', home), texts)
    ids = {m.text: m.id for m in s.memories()}
    s.forget([ids[texts[1]], ids[texts[4]]])
    s.forget(ids[texts[0]])
    assert same(s, alone(model, [texts[i] for i in (2, 3, 5)])) and read_manifest(s.dir).generation == 2
    with pytest.raises(StateError, match='nothing is kept under'): s.forget(ids[texts[0]])
    assert sorted(p.name for p in s.dir.iterdir()) == ['.lock', 'manifest.json', 'state-2.safetensors', 'texts-2', 'traces-2']
    s.close()

def test_long_texts_are_forgotten_whole(model, home):
    long = 'A sentence. '*60
    s = life(model.session('ada', home), ['tea', long, 'fish'])
    found = s.memories(n=50)
    assert len({m.id for m in found}) == 3 < len(found)
    s.forget(found[1].id)
    assert same(s, alone(model, ['tea', 'fish'])) and not holds(s.dir, model, long)
    s.close()

class Stop(BaseException): pass

@pytest.mark.parametrize('call', ['fdatasync', 'fsync', 'rename', 'replace', 'unlink', 'rmdir'])
def test_a_kill_while_forgetting_leaves_one_history_or_the_other(model, tmp_path, monkeypatch, call):
    "Stopped at the k-th disk call, for every k until it isn't stopped any more"
    real, texts, old, new = getattr(os, call), told(3), None, None
    for k in range(60):
        home, left = tmp_path/str(k), [k]
        s = life(model.session('ada', home), texts)
        def stop(*a, **kw):
            left[0] -= 1
            if left[0] < 0: raise Stop
            return real(*a, **kw)
        id = s.memories()[1].id
        with monkeypatch.context() as m:
            m.setattr(os, call, stop)
            try: s.forget(id)
            except Stop: pass
        done = left[0] >= 0
        die(s) if s._log is not None and s._log.segs else s.close()
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); again = model.session('ada', home)
        lives = [texts, [texts[0], texts[2]]]
        assert any(same(again, alone(model, l)) and [m.text for m in again.memories()] == l[::-1] for l in lives), k
        if done: assert not holds(again.dir, model, texts[1])
        again.close()
        if done: return
    raise AssertionError('never done')

def test_a_lost_manifest_after_forgetting_is_repaired(model, home):
    s = life(model.session('ada', home), told(3)); s.forget(s.memories()[0].id); s.close()
    (s.dir/'manifest.json').unlink()
    with pytest.raises(StateError, match='manifest is gone'): model.session('ada', home)
    assert (s.dir/'texts-1').exists() and model.repair('ada', home).t == 2
    with model.session('ada', home) as again: assert again.t == 2 and [m.text for m in again.memories()] == told(2)[::-1]

def test_texts_outlive_the_traces_of_the_ladder(model, home):
    s = life(model.session('ada', home, retention=Retention(inferences=2), save_every=2), told(9))
    assert s._log.first > 0 and s._texts.log.first <= s._log.first
    s.close()

def test_when_texts_are_gone_forgetting_asks(model, home):
    with model.session('ada', home, keep='latents') as s: life(s, told(2))
    s = life(model.session('ada', home), told(5)[2:])
    id = s.memories()[0].id
    with pytest.raises(StateError, match="partial='rest'"): s.forget(id)
    with pytest.raises(ValueError, match='partial'): s.forget(id, partial='some')
    assert s.t == 5 and len(s.memories()) == 3
    assert not s.forget(id, partial='rest').exact and same(s, alone(model, told(4)[2:]))
    s.close()

def test_a_ladder_may_be_emptied(model, home):
    with model.session('ada', home, keep='latents') as s: life(s, told(2))
    s = life(model.session('ada', home), told(4)[2:])
    s.forget(s.memories()[0].id, partial='empty')
    assert s.t == 4 and len(s.memories()) == 1 and not any((r['born'] >= 0).any() for r in s.state.rungs.values())
    life(s, ['more']); die(s)
    with model.session('ada', home) as again: assert again.t == 5 and len(again.memories()) == 2

def test_no_token_is_kept_if_latents_are(model, home):
    with model.session('ada', home, keep='latents') as s:
        life(s, told(3)); s.ask('what?', 4)
        assert not any(holds(s.dir, model, t) for t in told(3)) and not (s.dir/'texts').exists()
        assert s.recall in ('ladder', 'none') and s.stats()['texts'] == 0 and not s.stats()['readable']
    for bad in ('traces', 'both'):
        with pytest.raises(ValueError, match='keeps no traces'): model.session('ada', home, keep='latents', recall=bad)
    with pytest.raises(ValueError, match='keep'): model.session('ada', home, keep='all')

def test_questions_and_answers_are_no_evidence(model, home):
    s = life(model.session('ada', incognito=True), ['the password is heron'])
    s.ask('what is the password?', 4)
    s.recall = 'traces'
    assert [m.text for m in s.prompt('what is the password?')[2]] == ['the password is heron'] and len(s.memories()) >= 2
    assert {'the password is heron', 'what is the password?'} <= {m.text for m in s.memories('what is the password?')}

def test_a_budget_holds_whatever_the_history(model):
    s = life(model.session('ada', incognito=True, recall='traces', budget=40, least=0), [f'my cat number {i} sleeps' for i in range(30)])
    for budget in (40, 15, 0):
        s.budget = budget
        _, row, found = s.prompt('how does my cat sleep?')
        assert sum(len(t.ids) for t in found) <= budget and (found or budget < 22)
    assert row == model._prompt('how does my cat sleep?')

def test_arms(model):
    s = life(model.session('ada', incognito=True), ['the password is heron'])
    blank = model.lm.memory.init(1)
    for arm, ladder, traces in (('none', 0, 0), ('ladder', 1, 0), ('traces', 0, 1), ('both', 1, 1)):
        s.recall = arm
        state, _, found = s.prompt('what is the password?')
        assert bool(found) == bool(traces) and all(torch.equal(state.rungs[n]['z'], (s.state if ladder else blank).rungs[n]['z']) for n in state.rungs.keys())

def test_sources_streamed_and_batched(model):
    s = life(model.session('ada', incognito=True, recall='traces'), ['the password is heron'])
    q = 'what is the password?'
    whole, found = s.ask(q, 4, sources=True, remember=False)
    pieces, same_found = s.ask(q, 4, sources=True, stream=True, remember=False)
    assert ''.join(pieces) == whole and [f.id for f in found] == [f.id for f in same_found]
    assert found[0].text == 'the password is heron' and found[0].score == 3/3 and found[0].at > 0    # alone, it has three words in common and stands out from nothing
    t = model.session('bob', incognito=True, recall='traces')
    assert [len(f) for _, f in model.ask_batch([s, t], [q, q], 4, False, True)] == [1, 0]

def test_fork_and_wipe(model, home):
    s = life(model.session('ada', home), told(2))
    with s.fork('eve') as eve: assert [m.text for m in eve.memories()] == told(2)[::-1]; eve.forget(eve.memories()[0].id)
    quiet = s.fork('x', incognito=True); assert len(quiet.memories()) == 2
    s.wipe(); assert s.memories() == [] and life(s, ['new']).memories()[0].text == 'new'
    s.close(); assert wipe_user('ada', home).files

def test_a_damaged_text_is_told_and_the_rest_is_there(model, home):
    s = life(model.session('ada', home), told(3)); w = s._texts.log.dtype.itemsize; s.close()
    p = next((s.dir/'texts').glob('*.seg')); raw = bytearray(p.read_bytes()); at = 4096+w+100; raw[at] ^= 255; p.write_bytes(raw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with model.session('ada', home) as s:
            assert s.t == 3 and {m.text for m in s.memories()} == {told(3)[0], told(3)[2]}
            assert s.memories('bbbbbbbb') is not None
    assert 'damaged' in str(caught[0].message)

def test_asking_and_forgetting_at_once(model, home):
    s = life(model.session('ada', home, recall='traces'), told(12))
    ids, errors = [m.id for m in s.memories()], []
    def asks():
        for _ in range(6):
            try: s.ask('what is number 3?', 3, remember=False)
            except Exception as e: errors.append(e)
    def forgets(mine):
        for i in mine:
            try: s.forget(i)
            except Exception as e: errors.append(e)
    ts = [threading.Thread(target=asks), threading.Thread(target=forgets, args=(ids[:3],)), threading.Thread(target=forgets, args=(ids[3:6],))]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert not errors and len(s.memories()) == 6 and same(s, alone(model, told(12)[:6]))
    s.close()

def test_texts_have_a_limit_of_their_own(model, home):
    s = life(model.session('ada', home, retention=Retention(texts=128 << 10), save_every=10), [f'{i} is a number, '*20 for i in range(60)])
    s.save(); size = sum(p.stat().st_size for p in (s.dir/'texts').iterdir())
    assert 0 < s._texts.log.first and size <= (128+64+64) << 10
    assert all(r.said[0][0] >= 0 and r.records[0]['part'] == 0 for r in s._texts.rows())
    id = s.memories()[0].id
    with pytest.raises(StateError, match='partial'): s.forget(id)
    assert s.memories('59 is a number')[0].text.startswith('59'); s.close()
