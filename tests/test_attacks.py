"""Attacks on what a session keeps: failures between any two disk operations, interrupts anywhere, links, races, other handles on one memory."""
import errno, json, os, random, shutil, signal, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from chronomem.core import DirLock, ManualClock, StateError
from chronomem.live import session as S
from chronomem.live.repair import ChronoModel
from chronomem.live.ingest import NotKept
from chronomem.live.session import Retention, users, wipe_user
from chronomem.then import home as H, log as L
from chronomem.then.log import TraceLog
from test_safety import Broken, alone, quiet, remains
from test_session import child, die, home, logits, model, same, text, toy, tree

def boom(*a, **k): raise OSError(errno.EIO, 'the disk is broken')
def interrupt(*a, **k): raise KeyboardInterrupt

# ---- one memory, several handles

def test_a_wiped_handle_does_not_write_over_what_another_began(model, home):
    a = model.session('ada', home); a.ingest('old'); a.wipe()
    def other():
        with model.session('ada', home) as b: b.ingest('x')
        os._exit(0)
    os.waitpid(child(other), 0)
    with pytest.raises(StateError, match='meanwhile'): a.ingest('y')
    assert a.t == 1 and same(a, alone(model, 1, lambda i: 'x'))
    a.ingest('y'); a.close()
    with model.session('ada', home) as c: assert c.t == 2 and same(c, a)

def test_load_after_a_wipe_makes_nothing(model, home):
    a = model.session('ada', home); a.ingest('old'); a.wipe(); a.load()
    assert a.t == 0 and not a.dir.exists()
    a.ingest('new'); assert a.t == 1; a.close()
    with model.session('ada', home) as b: assert b.t == 1

def test_load_that_fails_changes_nothing(model, home, monkeypatch):
    a = model.session('ada', home); a.ingest('tea'); was = logits(a)
    with monkeypatch.context() as m:
        m.setattr(S, 'read_manifest', boom)
        with pytest.raises(OSError): a.load()
    with monkeypatch.context() as m:
        m.setattr(model.lm.memory, 'write', interrupt)
        with pytest.raises(KeyboardInterrupt): a.load()
    assert a.t == 1 and torch.equal(logits(a), was)
    a.ingest('more'); die(a)
    with model.session('ada', home) as b: assert b.t == 2 and same(a, b)

# ---- retention on a failing disk

@pytest.mark.parametrize('what', ['roll', 'floor', 'rename', 'open', 'sync'])
def test_a_retention_that_fails_loses_nothing(model, home, monkeypatch, what):
    s = model.session('ada', home, save_every=4, retention=Retention(inferences=0))
    for i in range(3): s.ingest(text(i))
    with monkeypatch.context() as m:
        real = TraceLog._file
        if what == 'roll': m.setattr(TraceLog, '_new_segment', boom)
        if what == 'floor': m.setattr(L, 'atomic_write', boom)
        if what == 'rename': m.setattr(s._log.disk, 'rename', boom)
        if what == 'open': m.setattr(TraceLog, '_file', lambda self, name, *f: boom() if name.endswith('.seg') else real(self, name, *f))
        if what == 'sync': m.setattr(s._log.disk, 'fsync', boom)
        quiet(s.ingest, text(3))
    for i in range(4, 7): quiet(s.ingest, text(i))
    die(s)
    again = quiet(model.session, 'ada', home); assert again.t == 7 and same(again, s); again.close()

# ---- interrupts

def test_an_interrupt_between_traces_and_state(model, home, monkeypatch):
    s = model.session('ada', home); s.ingest('tea')
    with monkeypatch.context() as m:
        m.setattr(S.Session, '_keep', interrupt)
        with pytest.raises(KeyboardInterrupt): s.ingest('more')
    assert s.t == 1; s.ingest('more'); s.ingest('and more'); die(s)
    with model.session('ada', home) as again: assert again.t == 3 and same(again, s) and not again.problems

# ---- wipe

def test_a_wipe_on_a_failing_disk(model, home, monkeypatch):
    s = model.session('ada', home); s.ingest('tea'); s._log.disk = Broken('pwrite')
    s.wipe(); assert not s.dir.exists() and s.t == 0; s.ingest('new'); s.close()

def test_a_wipe_that_fails_changes_nothing(model, home, monkeypatch):
    s = model.session('ada', home, save_every=2); [s.ingest(text(i)) for i in range(3)]
    with monkeypatch.context() as m:
        m.setattr(os, 'rename', boom)
        with pytest.raises(OSError): s.wipe()
    assert s.t == 3 and same(s, alone(model, 3)); s.ingest(text(3)); assert same(s, alone(model, 4))
    die(s)
    with model.session('ada', home) as s: assert s.t == 4; s.wipe(); assert not users(home)

def test_a_wipe_that_leaves_a_rest_says_so_and_goes_on(model, home, monkeypatch):
    s = model.session('ada', home); s.ingest('tea')
    with monkeypatch.context() as m:
        m.setattr(shutil, 'rmtree', lambda *a, **k: None)
        with pytest.raises(StateError, match='could not be deleted whole'): s.wipe()
    assert s.t == 0; s.ingest('new'); s.close()
    with model.session('ada', home) as s: assert s.t == 1
    assert not remains(home)

# ---- batches

def test_a_batch_in_which_one_memory_is_refused(model, home, monkeypatch):
    people = [model.session(f'u{i}', home) for i in range(3)]
    model.ingest_batch(people, ['tea']*3)
    real = people[1]._same_weights
    monkeypatch.setattr(people[1], '_same_weights', lambda: (_ for _ in ()).throw(StateError('no')))
    with pytest.raises(NotKept) as e: model.ingest_batch(people, ['more']*3)
    assert [*e.value.failed] == ['u1'] and [s.t for s in people] == [2, 1, 2]

def test_a_link_in_place_of_the_state(model, home, tmp_path):
    s = model.session('ada', home, save_every=2); s.ingest('a')
    (tmp_path/'elsewhere').write_bytes(b'mine'); (s.dir/'state.safetensors').symlink_to(tmp_path/'elsewhere')
    assert quiet(s.ingest, 'b').t == 2 and s.problems and (tmp_path/'elsewhere').read_bytes() == b'mine'
    (s.dir/'state.safetensors').unlink(); assert s.ingest('c').t == 3; s.close()
    with model.session('ada', home) as s: assert s.t == 3

# ---- locks

def test_a_directory_among_the_temporary_files(model, home):
    with model.session('ada', home) as s: d = s.dir
    (d/'.tmp-x').mkdir()
    for _ in range(2):
        with model.session('ada', home) as s: s.ingest('tea')

def test_a_lock_that_fails_is_not_held(tmp_path, monkeypatch):
    (tmp_path/'.tmp-x').write_text('')
    with monkeypatch.context() as m:
        m.setattr(type(tmp_path), 'unlink', interrupt)
        with pytest.raises(KeyboardInterrupt): DirLock(tmp_path).acquire()
    with DirLock(tmp_path): pass

def test_a_thread_that_got_the_number_of_a_dead_one(model, home, monkeypatch):
    left = []
    t = threading.Thread(target=lambda: left.append(model.session('bob', home))); t.start(); t.join()
    stop = threading.Event(); u = threading.Thread(target=stop.wait); u.start()
    if isinstance(left[0]._thread, int): left[0]._thread = u.ident      # as the system may number them
    try:
        with model.session('bob', home, wait=.3): assert left[0].closed
    finally: stop.set(); u.join()

# ---- links

def test_links_are_not_followed(model, home, tmp_path):
    with model.session('ada', home) as s: s.ingest('tea'); d = s.dir
    real = tmp_path/'real'; real.mkdir(); (real/'.tmp-mine').write_text('x'); (real/'deep').mkdir(); (real/'deep'/'.tmp-mine').write_text('y')
    (d.parent/'link').symlink_to(real); H.user_dir(home, 'eve').joinpath('m').symlink_to(real); (home/'.tmp').mkdir(exist_ok=True); (home/'.tmp'/'l').symlink_to(real)
    was = tree(real)
    quiet(users, home); H.sweep(home, deep=True); H.overview(home)
    assert tree(real) == was
    for u in ('ada', 'eve'):
        try: wipe_user(u, home)
        except StateError as e: assert 'link' in str(e)
    assert tree(real) == was

# ---- repair

def test_repair_takes_back_a_text_that_was_not_written_whole(model, home):
    s = model.session('ada', home); s.ingest('tea'); was = logits(s)
    s.ingest('x'*(3*model.max_tokens)); s._log._clear(3); die(s)
    (s.dir/'manifest.json').write_text('{')
    assert model.repair('ada', home).t == 1
    with warnings.catch_warnings(action='error'), model.session('ada', home) as s: assert s.t == 1 and torch.equal(logits(s), was)

def test_repair_keeps_when_a_memory_began(model, home):
    with model.session('ada', home, clock=ManualClock(5.), save_every=1) as s: s.ingest('tea')
    (s.dir/'state.safetensors').write_bytes(b'')
    assert model.repair('ada', home).done and users(home)[0].created == 5.

def forgot(model, home):
    "Traces from 8 on, a state of 8, four more inferences since"
    s = model.session('ada', home, save_every=4, retention=Retention(inferences=2))
    for i in range(11): s.ingest(text(i))
    assert s._log.first > 0 and s._new == 3
    die(s)
    return s

@pytest.mark.parametrize('harm', ['gone', 'broken'])
def test_repair_without_the_floor_keeps_the_traces(model, home, harm):
    s = forgot(model, home); f = s.dir/'traces'/'floor.json'
    f.unlink() if harm == 'gone' else f.write_text('{')
    with pytest.raises(StateError): model.session('ada', home)
    assert model.repair('ada', home, dry=True).t == 11
    got = model.repair('ada', home); assert got.t == 11 and got.given_up == []
    with model.session('ada', home) as again: assert again.t == 11 and same(again, s) and not again.problems

def test_a_floor_above_every_segment(model, home):
    s = forgot(model, home)
    with model.session('ada', home) as again: again.save()
    log = TraceLog.open(s.dir/'traces', s.owner, model.fingerprint)
    log._floor(log.n); log.close()
    assert not model.repair('ada', home, dry=True)
    with model.session('ada', home) as again: assert again.t == 11 and same(again, s); again.ingest('x')
    with model.session('ada', home) as again: assert again.t == 12

# ---- the log by itself

def records(n): return dict(x=torch.arange(n).float()[:, None])
def a_log(path, n=4):
    log = TraceLog.create(path, dict(x=(1, 'float32')), 'ada', 'f', capacity=4)
    if n: log.append(torch.arange(n).double(), **records(n))
    return log
def kill(log): log._drop()
def reopened(log, **kw): kill(log); return TraceLog.open(log.dir, 'ada', 'f', **kw)

def test_a_drop_that_fails_does_not_take_what_comes_next(tmp_path, monkeypatch):
    log = a_log(tmp_path/'log', 3)
    with monkeypatch.context() as m:
        m.setattr(TraceLog, '_new_segment', boom)
        with pytest.raises(OSError): log.drop(3)
    try: log.append(3., **records(1)); want = 4
    except StateError: want = 3                                     # or it refuses to go on
    log = reopened(log); assert len(log) == want and log.first == 0

@pytest.mark.parametrize('what', ['pwrite', 'fdatasync'])
def test_a_cut_that_fails_stops_the_log(tmp_path, what):
    log = a_log(tmp_path/'log', 7); log.disk = Broken(what)
    with pytest.raises(OSError): log.cut(2)
    with pytest.raises(StateError, match='stopped'): log.append(2., **records(1))
    log = reopened(log); log.cut(2); log.append(2., **records(1)); log = reopened(log)
    assert log[:].time.tolist() == [0., 1., 2.] and not log.report.damaged

@pytest.mark.parametrize('at', range(8))
def test_an_append_interrupted_anywhere(tmp_path, at):
    "Interrupted at its n-th step; then taken up again, as a session does, with a shorter one"
    log, steps = a_log(tmp_path/'log', 3), [0]
    class Stop(L.Disk):
        def step(self, f, *a):
            steps[0] += 1
            if steps[0]-1 == at and at % 2: raise KeyboardInterrupt
            f(*a)
            if steps[0]-1 == at and not at % 2: raise KeyboardInterrupt
        def fdatasync(self, fd): self.step(super().fdatasync, fd)
        def rename(self, a, b): self.step(super().rename, a, b)
        def fsync(self, d): self.step(super().fsync, d)
    log.disk = Stop()
    try: log.append(torch.arange(3, 9).double(), **records(6)); log.cut(3)
    except KeyboardInterrupt: assert log._stopped
    log = reopened(log); log.cut(min(3, len(log))); log.append(3., **records(1)); log = reopened(log)
    assert log[:].time.tolist() == [0., 1., 2., 3.]

@pytest.mark.parametrize('mode', ['r', 'a'])
def test_mending_begins_where_segments_follow(tmp_path, mode):
    log = a_log(tmp_path/'log', 20); kill(log)
    s = log.dir/'00000001.seg'; s.write_bytes(b'x'*100)
    with pytest.raises(StateError): TraceLog.open(log.dir, 'ada', 'f', mode=mode)
    with TraceLog.open(log.dir, 'ada', 'f', mode=mode, mend=True) as log:
        assert log.first == 12 and log[12:].time.tolist() == list(range(12, 20)) and s.exists() == (mode == 'r')
    if mode == 'a':
        with TraceLog.open(log.dir, 'ada', 'f') as log: assert log.first == 12 and log.n == 20 and not log.verify().damaged
    with pytest.raises(StateError): TraceLog.open(log.dir, 'eve', 'f', mend=True)

@pytest.mark.parametrize('mode', ['r', 'a'])
def test_mending_needs_a_segment(tmp_path, mode):
    log = a_log(tmp_path/'log'); kill(log)
    for s in log.dir.glob('*.seg'): s.unlink()
    with pytest.raises(StateError, match='dir: no trace log in'): TraceLog.open(log.dir, 'ada', 'f', mode=mode, mend=True)

def test_a_log_that_nobody_holds_is_free(tmp_path):
    kill(a_log(tmp_path/'log'))
    TraceLog.open(tmp_path/'log', 'ada', 'f')                       # as if interrupted before it got its name
    with TraceLog.open(tmp_path/'log', 'ada', 'f') as log: assert len(log) == 4

# ---- killed, or failing, at every n-th call that changes the disk

OPS = 'open', 'rename', 'replace', 'unlink', 'fsync', 'fdatasync', 'pwrite', 'mkdir', 'rmdir'

class Hook:
    "Do something at the n-th call of `os` that changes the disk"
    def __init__(self, at, what): self.n, self.at, self.what, self.real = 0, at, what, {k: getattr(os, k) for k in OPS}
    def __enter__(self):
        for k, f in self.real.items(): setattr(os, k, self.wrap(f))
        return self
    def __exit__(self, *_):
        for k, f in self.real.items(): setattr(os, k, f)
    def wrap(self, f):
        def call(*a, **k):
            self.n += 1
            if self.n == self.at: self.what()
            return f(*a, **k)
        return call

def words(model, i): return 'x'*model.max_tokens + str(i) if i % 3 == 1 else text(i)

class Lives:
    "What a memory is after each of its texts"
    def __init__(self, model):
        s = model.session('lives', incognito=True); self.t, self.logits = [0], [logits(s)]
        for i in range(12): s.ingest(words(model, i)); self.t.append(s.t); self.logits.append(logits(s))
    def at(self, s):
        "How many texts a session has lived; it must be exactly one of these states"
        i = self.t.index(s.t); assert torch.equal(logits(s), self.logits[i]); return i

@pytest.fixture(scope='module')
def lives(model): return Lives(model)

def again(f):
    "Do it, and once more if that failed"
    try: return f()
    except (OSError, StateError, KeyboardInterrupt): return f()

def a_life(model, home, lives, say):
    "Texts, saves, retention, a fork, a wipe and openings; a step that fails is done again"
    kw = dict(save_every=2, retention=Retention(inferences=2))
    s = again(lambda: model.session('ada', home, **kw))
    def live(n):
        for _ in range(n):
            k = lives.at(s)
            again(lambda: s.t == lives.t[k] and s.ingest(words(model, k)))
            assert lives.at(s) == k+1; say(f'told {k+1}')
    def fork():
        try: s.fork('eve').close()
        except StateError as e: assert 'already' in str(e)
    live(4); again(s.close); s = again(lambda: model.session('ada', home, **kw)); assert lives.at(s) == 4
    live(3); again(s.load); assert lives.at(s) == 7; again(fork); say('forked 0')
    say('wiping 0'); again(lambda: s.t and s.wipe()); assert lives.at(s) == 0; say('told 0')
    live(2); again(s.close)

def judge(model, home, lives, said):
    "Nothing acknowledged is lost, nothing wiped comes back, nothing temporary is left"
    words_ = [l.split() for l in said]; known = max([int(n) for w, n in words_ if w == 'told'][-1:], default=0)
    with quiet(model.session, 'ada', home) as s:
        i = lives.at(s); assert known <= i <= known+1 or [*words_[-1:]] == [['wiping', '0']] and i == 0
        s.ingest(words(model, i))
    with model.session('ada', home) as s: assert lives.at(s) == i+1
    people = [m.user for m in users(home)]; assert ['forked', '0'] not in words_ or 'eve' in people
    assert not remains(home)
    for u in people: wipe_user(u, home)
    assert not [p for p in home.rglob('*') if p.is_file()]

def count(model, home, lives):
    with Hook(-1, None) as h: a_life(model, home, lives, lambda w: None)
    return h.n

def killed_everywhere(model, tmp_path, lives, step):
    total = count(model, tmp_path/'count', lives); assert total > 150
    for at in range(1, total+1, step):
        home, said = tmp_path/f'h{at}', tmp_path/f's{at}'; said.touch()
        def work():
            out = said.open('a', buffering=1)
            with Hook(at, lambda: os.kill(os.getpid(), signal.SIGKILL)): a_life(model, home, lives, lambda w: out.write(w+'\n'))
        os.waitpid(child(work), 0)
        judge(model, home, lives, said.read_text().splitlines())

def failing_everywhere(model, tmp_path, lives, what, step):
    for at in range(1, count(model, tmp_path/'count', lives)+1, step):
        home, said = tmp_path/f'h{at}', []
        with Hook(at, what): quiet(a_life, model, home, lives, said.append)
        judge(model, home, lives, said)

def test_killed_between_disk_operations(model, tmp_path, lives): killed_everywhere(model, tmp_path, lives, 23)

@pytest.mark.parametrize('what', [boom, interrupt])
def test_a_disk_operation_that_fails(model, tmp_path, lives, what): failing_everywhere(model, tmp_path, lives, what, 29)

@pytest.mark.slow
def test_killed_between_any_two_disk_operations(model, tmp_path, lives): killed_everywhere(model, tmp_path, lives, 1)

@pytest.mark.slow
@pytest.mark.parametrize('what', [boom, interrupt])
def test_any_disk_operation_that_fails(model, tmp_path, lives, what): failing_everywhere(model, tmp_path, lives, what, 1)

# ---- several processes at once

def test_processes_that_fork_wipe_open_and_list(model, home, seconds=3):
    fair = 'in use', 'nobody called', 'already', 'wiped while', 'anew elsewhere'
    def work(seed):
        rng, end = random.Random(seed), time.monotonic()+seconds
        while time.monotonic() < end:
            u, what = f'u{rng.randrange(3)}', rng.choice('osfwulo')
            try:
                if what == 'o': s = model.session(u, home, wait=1.); s.ingest('tea'); s.close()
                elif what == 'f':
                    with model.session(u, home, wait=1.) as s: s.fork(f'e{rng.randrange(3)}').close()
                elif what == 'w': wipe_user(u, home)
                elif what == 'u':
                    with model.session(u, home, wait=1.) as s: s.wipe(); s.ingest('new')
                elif what == 'l': assert not [r for r in H.overview(home) if r['problem']]
                else: H.sweep(home, deep=True)
            except StateError as e: assert any(x in str(e) for x in fair), e
        os._exit(0)
    pids = [child(lambda i=i: work(i)) for i in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0]*3
    with warnings.catch_warnings(action='error'):
        for m in users(home): model.session(m.user, home).close()
    assert not remains(home)
