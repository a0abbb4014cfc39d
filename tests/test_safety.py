"""Attacks on a session: many threads, killed forks and wipes, files of other people, flipped bits, failing disks, systems without POSIX."""
import errno, json, os, random, shutil, signal, subprocess, sys, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from chronomem.core import DirLock, ManualClock, StateError
from chronomem.live import session as S
from chronomem.live.repair import ChronoModel
from chronomem.live.ingest import NotKept
from chronomem.live.session import Retention, users, wipe_user
from chronomem.then import home as H
from chronomem.then.log import Disk
from test_session import SMALL, child, die, home, logits, model, same, text, toy, tree

SLOW = pytest.mark.slow

def quiet(f, *a, **k):
    with warnings.catch_warnings(action='ignore'): return f(*a, **k)
def alone(model, n, words=text):
    s = model.session('alone', incognito=True)
    for i in range(n): s.ingest(words(i))
    return s
def remains(home): return [p for p in home.rglob('*') if '.tmp' in p.parts[len(home.parts):] and p.is_file() or p.name.startswith(('.fork', '.gone', '.tmp-'))]

# ---- A. many threads

def mixed(s, rng, n):
    "Calls of every kind; how many inferences were acknowledged"
    done = 0
    for _ in range(n):
        what = rng.random()
        if what < .5: s.ingest('tea'); done += 1
        elif what < .6: s.ask('Well?', 3); done += 1
        elif what < .7: list(s.ask('Well?', 3, stream=True)); done += 1
        elif what < .8: s.save()
        elif what < .9: s.stats()
        else: s.fork('x', incognito=True).ingest('y')
    return done

@pytest.mark.parametrize('people', [1, 8])
def test_eight_threads(model, home, people, calls=10):
    each = [model.session(f'u{i}', home, save_every=7) for i in range(people)]
    with ThreadPoolExecutor(8) as ex: done = list(ex.map(lambda i: mixed(each[i % people], random.Random(i), calls), range(8)))
    for k, s in enumerate(each):
        want = sum(d for i, d in enumerate(done) if i % people == k)
        assert s.t == want == len(s._log) and sorted(s._log[:].time.tolist()) == list(range(want))
        die(s)
        with model.session(f'u{k}', home) as again: assert again.t == want and same(again, s) and not again.problems

@SLOW
@pytest.mark.parametrize('people', [1, 8])
def test_eight_threads_of_fifty_calls(model, home, people): test_eight_threads(model, home, people, 50)

def test_threads_write_what_one_would(model, home):
    s = model.session('ada', home)
    with ThreadPoolExecutor(4) as ex: list(ex.map(lambda i: s.ingest('the same words'), range(40)))
    assert s.t == 40 and same(s, alone(model, 40, lambda i: 'the same words'))
    s.close()
    with model.session('ada', home) as s: assert s.t == 40

def test_a_stream_beside_an_ingest_loses_nothing(model, home):
    with model.session('ada', home) as s:
        g = s.ask('Tea?', 30, stream=True); next(g)
        with ThreadPoolExecutor(2) as ex: list(ex.map(lambda i: s.ingest(text(i)), range(6)))
        list(g)
        assert s.t == 7 == len(s._log)
    with model.session('ada', home) as s: assert s.t == 7

def test_a_session_for_each_request(model, home):
    "A pool of threads opens and closes sessions of few people; requests of one person wait for each other"
    def request(i):
        with model.session(f'u{i % 3}', home) as s: return s.ingest(text(i)).t
    with ThreadPoolExecutor(8) as ex: got = list(ex.map(request, range(60)))
    assert sorted(got) == sorted([*range(1, 21)]*3)
    for i in range(3):
        with model.session(f'u{i}', home) as s: assert s.t == 20

def test_another_thread_waits_and_is_told(model, home):
    s = model.session('ada', home)
    with ThreadPoolExecutor(1) as ex:
        with pytest.raises(StateError, match='in use by another thread'): ex.submit(model.session, 'ada', home, wait=.1).result()
        threading.Timer(.2, s.close).start()
        later = ex.submit(model.session, 'ada', home).result(); assert s.closed
        ex.submit(later.close).result()
    t = threading.Thread(target=lambda: model.session('bob', home) and None); left = []
    t = threading.Thread(target=lambda: left.append(model.session('bob', home))); t.start(); t.join()
    with model.session('bob', home): assert left[0].closed           # whose thread is gone

def test_two_batches_in_opposite_order_do_not_lock_each_other(model, home):
    a, b = (model.session(n, home) for n in 'ab')
    with ThreadPoolExecutor(4) as ex: list(ex.map(lambda i: model.ingest_batch([a, b][::1-2*(i % 2)], ['x', 'y']), range(24)))
    assert a.t == b.t == 24; a.close(); b.close()

# ---- B. wiped means gone

def test_killed_forks_streams_and_wipes_leave_nothing(model, home, rounds=25):
    rng = random.Random(4)
    for i in range(rounds):
        with model.session('ada', home) as s: s.ingest(text(i))
        def work():
            a = model.session('ada', home)
            while True:
                a.fork(f'eve{i}').wipe(); list(a.ask('Tea?', 2, stream=True)); a.wipe(); a.ingest(text(0)); a.save()
        pid = child(work); time.sleep(rng.random()*.15)
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        kind = i % 4
        if kind == 0:
            quiet(model.session, 'bob', home).close()
            assert not [p for p in remains(home) if p.parts[len(home.parts)] == '.tmp']
            quiet(model.session, 'ada', home).close()              # half written files go with their person's opening
        elif kind == 1: quiet(users, home)
        elif kind == 2: H.overview(home)
        else:
            try: wipe_user('ada', home)
            except StateError as e: assert 'nobody called' in str(e)   # killed right after its own wipe
        assert not remains(home)
        for u in (f'eve{i}', 'ada'):
            try: wipe_user(u, home)
            except StateError: pass
        assert [m.user for m in users(home)] in ([], ['bob'])

@SLOW
def test_four_hundred_kills(model, home): test_killed_forks_streams_and_wipes_leave_nothing(model, home, 400)

def test_a_failed_fork_leaves_nothing(model, home, monkeypatch):
    with model.session('ada', home) as s:
        s.ingest('tea')
        monkeypatch.setattr(S, 'save_state', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
        with pytest.raises(OSError, match='disk full'): s.fork('eve')
        assert not remains(home); monkeypatch.undo()
        with s.fork('eve') as eve: assert same(eve, s)

def test_a_fork_that_fails_at_the_last_step_says_why(model, home, monkeypatch):
    with model.session('ada', home) as s:
        s.ingest('tea')
        monkeypatch.setattr(S.os, 'rename', lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, 'the disk is broken')))
        with pytest.raises(OSError, match='the disk is broken'): s.fork('eve')
        monkeypatch.undo(); assert not remains(home); s.fork('eve').close()
        with pytest.raises(StateError, match='has a memory already'): s.fork('eve')

def test_a_fork_that_another_process_makes_is_left_alone(model, home):
    with H.scratch(home) as d:
        pid = child(lambda: (H.sweep(home, deep=True), os._exit(0))); os.waitpid(pid, 0)
        assert d.exists()
    assert not remains(home)

def test_leftovers_of_earlier_versions_go(model, home):
    with model.session('ada', home) as s: s.ingest('tea')
    for n in ('.fork-', '.gone-'): shutil.copytree(s.dir, s.dir.parent.with_name(n+'x'))
    users(home); assert not remains(home)

def test_a_stream_notices_a_wipe(model, home):
    s = model.session('ada', home); s.ingest('tea')
    g = s.ask('Tea?', 40, stream=True); next(g); s.wipe()
    with pytest.raises(StateError, match='wiped meanwhile'): list(g)
    assert s.t == 0 and not s.dir.exists()
    s.ingest('new'); g = s.ask('Tea?', 40, stream=True); next(g); s.wipe(); s.ingest('a new life')
    with pytest.raises(StateError, match='wiped meanwhile'): list(g)
    assert s.t == 1; s.close()
    with model.session('ada', home) as s: assert s.t == 1

def test_an_answer_notices_a_wipe(model, home, monkeypatch):
    s, real = model.session('ada', home), model.answer
    def slow(*a, **k): s.wipe(); return real(*a, **k)
    monkeypatch.setattr(model, 'answer', slow)
    with pytest.raises(StateError, match='wiped meanwhile'): s.ask('Tea?', 3)
    assert s.t == 0 and not s.dir.exists(); s.close()

def test_wiping_nobody(model, home):
    model.session('ada', home).close()
    with pytest.raises(StateError, match="'Ada'.*did you mean 'ada'"): wipe_user('Ada', home)
    with pytest.raises(StateError, match="nobody called 'zebra'"): wipe_user('zebra', home)
    assert wipe_user('ada', home).files == 3 and not users(home)

def test_models_keep_separate_memories(home):
    a, b = toy(), toy(1); b.name = 'other'
    with a.session('ada', home) as s, b.session('ada', home) as u: s.ingest('tea'); u.ingest('x'); u.ingest('y')
    with a.session('ada', home) as s, b.session('ada', home) as u: assert (s.t, u.t) == (1, 2)
    assert [(m.user, m.model) for m in users(home)] == [('ada', 'toy'), ('ada', 'other')]
    wipe_user('ada', home, model='other'); assert [m.model for m in users(home)] == ['toy']
    with b.session('ada', home): pass
    wipe_user('ada', home); assert not users(home)

# ---- C. whose file is it?

def two(model, home, n=5):
    for u in ('ada', 'bob'):
        with model.session(u, home) as s:
            for i in range(n): s.ingest(f'{u} {i}')
    return [H.memory_dir(home, u, 'toy') for u in ('ada', 'bob')]

@pytest.mark.parametrize('file', ['state.safetensors', 'manifest.json', 'traces/00000000.seg'])
def test_another_persons_file_is_refused_and_repaired(model, home, file):
    a, b = two(model, home)
    with model.session('ada', home) as s: want = logits(s)
    shutil.copy(b/file, a/file)
    with pytest.raises(StateError): model.session('ada', home)
    assert model.repair('ada', home).t == 5
    with model.session('ada', home) as s: assert torch.equal(logits(s), want); s.ingest('more')
    with model.session('ada', home) as s: assert s.t == 6 and not s.problems

def test_swapped_directories_are_refused(model, home):
    a, b = two(model, home); a.rename(home/'x'); b.rename(a); (home/'x').rename(b)
    for u in ('ada', 'bob'):
        with pytest.raises(StateError): model.session(u, home)
    assert len(H.overview(home)) == 2 and all('not of this memory' in r['problem'] for r in H.overview(home))

def test_a_flipped_last_trace_is_told(model, home):
    s = model.session('ada', home)
    for i in range(4): s.ingest(text(i))
    die(s)
    seg = s.dir/'traces'/'00000000.seg'; b = bytearray(seg.read_bytes()); b[4096 + 3*s._log.dtype.itemsize + 80] ^= 4; seg.write_bytes(b)
    with pytest.warns(UserWarning, match='set aside in 00000000.torn'): s = model.session('ada', home)
    assert s.t == 3 and len(s.stats()['problems']) == 1; s.close()
    with warnings.catch_warnings(action='error'), model.session('ada', home) as s: assert s.t == 3 and not s.problems

def test_traces_gone_are_told(model, home):
    a, _ = two(model, home); shutil.rmtree(a/'traces')
    with pytest.warns(UserWarning, match='its traces are gone; the state holds 5'): s = model.session('ada', home)
    assert s.t == 5 and s.stats()['first_trace'] == 5; s.ingest('more'); s.close()
    with warnings.catch_warnings(action='error'), model.session('ada', home) as s: assert s.t == 6
    shutil.rmtree(a/'traces'); (a/'state.safetensors').unlink()
    with pytest.raises(StateError, match='state and traces are gone'): model.session('ada', home)

def test_one_broken_manifest_hides_nobody(model, home):
    a, _ = two(model, home); (a/'manifest.json').write_text('{')
    with pytest.warns(UserWarning, match='damaged'): assert [m.user for m in users(home)] == ['bob']
    assert [bool(r['problem']) for r in H.overview(home)] == [False, True]

def flips(model, home, n, seed=0):
    "Flip one bit in a file of a session; how often it was refused, told, harmless; a wrong state in silence fails"
    rng, out = random.Random(seed), dict(refused=0, told=0, harmless=0)
    s = model.session('ada', home, save_every=4)
    for i in range(10): s.ingest(text(i))
    die(s)
    want, whole = logits(s), home.with_name('whole'); shutil.copytree(s.dir, whole)
    files = [p.relative_to(whole) for p in whole.rglob('*') if p.is_file() and p.name != '.lock']
    for k in range(n):
        f = rng.choice(files); b = bytearray((whole/f).read_bytes())
        used = 4096 + 11*s._log.dtype.itemsize if f.suffix == '.seg' and len(b) else len(b)   # where something is written, and a little beyond
        at = rng.randrange(min(used, len(b))); b[at] ^= 1 << rng.randrange(8)
        shutil.rmtree(s.dir); shutil.copytree(whole, s.dir); (s.dir/f).write_bytes(b)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            try: again = model.session('ada', home)
            except (StateError, OSError): out['refused'] += 1; continue
            right = again.t == 10 and torch.equal(logits(again), want)
            assert right or told, (f, at)
            out['told' if told else 'harmless'] += 1; again.close()
    return out

def test_flips_over_all_files(model, home):
    out = flips(model, home, 60)
    assert out['refused'] > 20 and out['told'] > 3

@SLOW
def test_a_thousand_flips(model, home): print(flips(model, home, 1000, 1))

def test_a_text_that_was_not_written_whole_is_taken_back(model, home):
    s = model.session('ada', home); s.ingest('tea'); was = logits(s)
    s.ingest('x'*(3*model.max_tokens)); assert s.t == 4
    s._log._clear(3); die(s)                                        # the third piece never reached the disk
    with model.session('ada', home) as s: assert s.t == 1 and torch.equal(logits(s), was); s.ingest('more')
    with model.session('ada', home) as s: assert s.t == 2 and not s.problems

def test_repair_of_traces_that_do_not_fit(model, home):
    with model.session('ada', home, save_every=2) as s:
        for i in range(3): s.ingest(text(i)); early = (s.dir/'state.safetensors').read_bytes() if i == 1 else b''
    with model.session('ada', home) as s:
        s.ingest('later'); d = s.dir
    other = model.session('bob', home); [other.ingest(text(i)) for i in range(2)]; other.close()
    log = S.TraceLog.open(d/'traces', s.owner, model.fingerprint); log.cut(2)
    log.append(9., key=torch.zeros(1, log.fields['key'][0][0]), at=torch.zeros(1, 1).double(), left=torch.zeros(1, 1).int()); log.close()
    (d/'state.safetensors').unlink()
    with pytest.raises(StateError, match='jump from inference 2 to 9'): model.session('ada', home)
    got = model.repair('ada', home, dry=True); assert got.t == 2 and not got.done and got.given_up == ['1 inferences, from 2 on to 9']
    assert model.repair('ada', home).done and not model.repair('ada', home)
    with model.session('ada', home) as s: assert s.t == 2 and same(s, alone(model, 2)); s.ingest('go on')
    with model.session('ada', home) as s: assert s.t == 3

# ---- D. disks that fail

class Broken(Disk):
    def __init__(self, kind, n=0): self.kind, self.n = kind, n
    def hit(self, kind):
        if kind == self.kind and (n := self.n) is not None:
            self.n = n-1
            if n <= 0: self.n = None; raise OSError(errno.EIO, 'the disk is broken')   # once
    def pwrite(self, fd, data, offset): self.hit('pwrite'); return super().pwrite(fd, data, offset)
    def fdatasync(self, fd): self.hit('fdatasync'); super().fdatasync(fd)

@pytest.mark.parametrize('kind', ['pwrite', 'fdatasync'])
def test_a_batch_in_which_one_disk_fails(model, home, kind):
    people = [model.session(f'u{i}', home) for i in range(5)]
    model.ingest_batch(people, ['tea']*5)
    people[2]._log.disk = Broken(kind)
    with pytest.raises(NotKept, match="nothing was kept for 'u2' .*tell them again, and not 'u0', 'u1', 'u3', 'u4'") as e: model.ingest_batch(people, ['more']*5)
    assert [*e.value.failed] == ['u2'] and e.value.kept == ['u0', 'u1', 'u3', 'u4'] and [bool(w) for w in e.value.wrote] == [1, 1, 0, 1, 1]
    assert [s.t for s in people] == [2, 2, 1, 2, 2]
    people[2].ingest('more')
    for s in people: die(s)
    for i, s in enumerate(people):
        with model.session(f'u{i}', home) as again: assert again.t == 2 and torch.allclose(logits(again), logits(s), atol=1e-5) and not again.problems

@pytest.mark.parametrize('kind', ['pwrite', 'fdatasync'])
@pytest.mark.parametrize('again', ['here', 'after a kill'])
def test_a_retry_is_safe(model, home, kind, again):
    s = model.session('ada', home); s.ingest('tea'); s._log.disk = Broken(kind)
    with pytest.raises(NotKept, match='the disk is broken'): s.ingest('x'*(2*model.max_tokens))
    if again != 'here': die(s); s = quiet(model.session, 'ada', home)
    assert s.t == 1; s.ingest('x'*(2*model.max_tokens)); assert s.t == 3
    die(s)
    with model.session('ada', home) as s: assert s.t == 3 == len(s._log)

def test_a_failing_save_inside_ingest(model, home, monkeypatch):
    s, real = model.session('ada', home, save_every=2), S.save_state
    monkeypatch.setattr(S, 'save_state', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
    s.ingest('a')
    with pytest.warns(UserWarning, match='could not be saved .disk full'): assert s.ingest('b').t == 2
    assert s.ingest('c').t == 3 and len(s.stats()['problems']) == 1 and s.stats()['unsaved'] == 3
    monkeypatch.setattr(S, 'save_state', real); s.ingest('d'); assert s.stats()['unsaved'] == 0; s.close()
    with model.session('ada', home) as s: assert s.t == 4

def test_save_every_counts_exactly(model, home):
    with model.session('ada', home, save_every=3) as s:
        for i in range(1, 8): s.ingest('x'); assert s.stats()['unsaved'] == i % 3 and (s.dir/'state.safetensors').exists() == (i >= 3)

def test_an_answer_that_could_not_be_remembered_is_not_lost(model, home):
    s = model.session('ada', home); want = s.ask('Tea?', 4, remember=False); s._log.disk = Broken('fdatasync')
    with pytest.raises(NotKept) as e: s.ask('Tea?', 4)
    assert e.value.answers == [want] and s.t == 0; s.close()

# ---- E. growth

def test_retention(model, home):
    clock = ManualClock(0.)
    for name, r in dict(bytes=Retention(bytes=128 << 10, texts=128 << 10), count=Retention(inferences=20), age=Retention(days=1), all=Retention(bytes=1 << 40)).items():
        with model.session(name, home, clock=clock, save_every=50, retention=r) as s:
            for i in range(5): s.ingest('x'*model.max_tokens*120); clock.advance(43200.)
            stats = s.stats(); assert s.t == 600
            if name == 'bytes': assert stats['disk_bytes'] <= (2*(128+64)+64) << 10 and 0 < stats['first_trace'] < 600
            if name == 'count': assert stats['traces'] == 120              # whole texts of 120 pieces, here
            if name == 'age': assert 120 <= stats['traces'] <= 360
            if name == 'all': assert stats['traces'] == 600
        with model.session(name, home, retention=r) as again: assert again.t == 600 and same(again, s) and not again.problems
    with model.session('count', home) as s, s.fork('eve') as eve: assert same(eve, s) and eve.stats()['first_trace'] == s.stats()['first_trace'] > 0
    with model.session('eve', home) as eve: eve.ingest('on'); assert eve.t == 601
    (eve.dir/'state.safetensors').unlink()
    with pytest.raises(StateError, match='jump from inference 0'): model.session('eve', home)

@SLOW
def test_twenty_thousand_inferences(home):
    m = toy(); m.max_tokens = 8                                     # short inferences
    with m.session('ada', home, keep='latents') as s:
        for _ in range(20): s.ingest('x'*8000)
        assert s.t == 20_000 and s.stats()['disk_bytes'] < 5 << 20

# ---- many people, many options

def test_batches_of_many_people(model, home, n=24):
    people = [model.session(f'u{i}', home) for i in range(n)]
    model.ingest_batch(people, [f'I am number {i}.' for i in range(n)])
    states = [s.state.clone() for s in people]
    for kw in ({}, dict(do_sample=True, temperature=.7), dict(num_beams=2), dict(repetition_penalty=1.2), dict(top_k=3, do_sample=True), dict(min_new_tokens=2)):
        out = model.ask_batch(people, [f'Who is {i}?' for i in range(n)], 4, remember=False, **kw)
        assert len(out) == n
        if not kw.get('do_sample'): assert out[::7] == [people[i].ask(f'Who is {i}?', 4, remember=False, **kw) for i in range(0, n, 7)]
    for kw in (dict(num_return_sequences=2, do_sample=True), dict(num_return_sequences=2, num_beams=2)):
        with pytest.raises(ValueError, match='num_return_sequences'): model.ask_batch(people, ['?']*n, 4, **kw)
    assert all(torch.equal(s.state.rungs['tau1', 'z'], w.rungs['tau1', 'z']) for s, w in zip(people, states))
    for s in people: s.close()

@SLOW
def test_batches_of_two_hundred_people(model, home): test_batches_of_many_people(model, home, 200)

# ---- other systems

HIDDEN = '''
import builtins, os, sys
sys.path[:0] = {path!r}
GONE = {{'fcntl', 'pwd', 'grp', 'termios', 'resource', 'posix_ipc'}}
real = builtins.__import__
def importing(name, *a, **k):
    if name.split('.')[0] in GONE: raise ImportError(f'no {{name}} on this system')
    return real(name, *a, **k)
import torch, transformers, subprocess, tempfile, peft, tensordict, soundfile   # they bring their own ways
for m in GONE: sys.modules.pop(m, None)
builtins.__import__ = importing
for n in ('fchmod', 'pread', 'pwrite', 'preadv', 'posix_fadvise', 'fdatasync', 'fork', 'register_at_fork', 'O_DIRECTORY', 'O_NOFOLLOW', 'O_CLOEXEC', 'O_NONBLOCK'):
    if hasattr(os, n): delattr(os, n)
for m in [m for m in sys.modules if m.startswith(('chronomem', 'filelock'))]: del sys.modules[m]
rename = os.rename
def renaming(old, new):
    if os.path.exists(os.path.join(old, '.lock')): raise PermissionError('files in it are open')
    rename(old, new)
os.rename = renaming
import chronomem.app.cli, chronomem.live.session, chronomem.live.listener
from chronomem.live.repair import ChronoModel
from chronomem.then.home import users, wipe_user
m = ChronoModel.default()
for k in range(2):
    with m.session('ada', {home!r}, save_every=2) as s:
        for i in range(3): s.ingest('My name is Alice.', role='user')
        if k: s.fork('eve').close(); s.wipe(); s.ingest('again')
with m.session('ada', {home!r}) as s: print('t', s.t, s.ask('Tea?', 2))
assert not m.repair('ada', {home!r}) and [u.user for u in users({home!r})] == ['eve', 'ada'] and wipe_user('eve', {home!r}).files
'''
def test_a_system_without_posix(tmp_path):
    code = HIDDEN.format(path=[str(Path(__file__).parents[1])], home=str(tmp_path/'home'))
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.startswith('t 1'), r.stderr[-2000:]
