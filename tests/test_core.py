"What notebook 00_core can't show: fuzzing, hostile names, kills in the middle of a save."
import json, math, multiprocessing as mp, os, random, signal, struct, time, typing
from dataclasses import dataclass, field
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save as st_save
from tensordict import TensorDict, tensorclass
from chronomem import core
from chronomem.core import (Config, DirLock, ManualClock, StateError, WallClock, atomic_write, data_root, fingerprint, generator,
    load_state, load_tensors, save_state, save_tensors, user_dir)

META = dict(kind='test', format=1, fingerprint='ab')
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.fixture(autouse=True, scope='module')
def no_waiting_for_the_disk():
    "The tests are about content; thousands of real fsyncs would only cost time"
    real, core.os.fsync = os.fsync, lambda fd: None
    yield
    core.os.fsync = real

@tensorclass
class Inner:
    h: torch.Tensor
    mask: torch.Tensor

@tensorclass
class Outer:
    a: torch.Tensor
    inner: Inner
    opt: torch.Tensor|None = None

@dataclass
class Leaf(Config):
    x: float = 0.
    def validate(self): self.need('x', self.x >= -1e300, 'not too small')

@dataclass
class Tree(Config):
    n: int
    on: bool = True
    name: str|None = None
    pairs: tuple[tuple[int, float], ...] = ()
    xs: list[float] = field(default_factory=list)
    loose: tuple = ()
    by_name: dict[str, tuple[int, ...]] = field(default_factory=dict)
    leaf: Leaf = field(default_factory=Leaf)
    leaves: tuple[Leaf, ...] = ()
    mode: typing.Literal['a', 'b'] = 'a'

finite = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.builds(Leaf, x=finite.filter(lambda x: x >= -1e300))
loose = st.recursive(st.none() | st.booleans() | st.integers() | finite | st.text(), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=3), max_leaves=6)
trees = st.builds(Tree, n=st.integers(), on=st.booleans(), name=st.none() | st.text(), pairs=st.lists(st.tuples(st.integers(), finite), max_size=3),
    xs=st.lists(finite, max_size=3), loose=st.lists(loose, max_size=3), by_name=st.dictionaries(st.text(), st.lists(st.integers(), max_size=3), max_size=3),
    leaf=leaves, leaves=st.lists(leaves, max_size=2), mode=st.sampled_from('ab'))

@settings(quick, max_examples=25)
@given(trees)
def test_config_round_trip(tmp_path, c):
    assert Tree.from_dict(c.to_dict()) == c == Tree.from_dict(json.loads(json.dumps(c.to_dict())))
    c.save(tmp_path/'c.json')
    assert Tree.load(tmp_path/'c.json') == c

json_value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=3), max_leaves=5)

@quick
@given(st.dictionaries(st.sampled_from([*Tree.__dataclass_fields__, 'nn', 'Leaf']), json_value, max_size=4) | json_value)
def test_config_never_half_right(d):
    try: c = Tree.from_dict(d)
    except (ValueError, TypeError): return
    assert Tree.from_dict(c.to_dict()) == c

@dataclass
class Kinds(Config):
    yes: bool = False
    n: int = 0
    x: float = 0.

def test_true_is_no_number_and_one_is_no_bool():
    for bad in (dict(n=True), dict(x=False), dict(yes=1), dict(yes=0.)):
        with pytest.raises(TypeError, match='expected'): Kinds.from_dict(bad)
    assert Kinds.from_dict(dict(yes=True, n=2, x=3)).to_dict() == dict(yes=True, n=2, x=3.)

def test_config_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="Leaf: unknown key 'y', the closest known key is 'x'"): Tree.from_dict(dict(n=1, leaf=dict(y=1)))
    with pytest.raises(ValueError, match="Tree: required key 'n' is missing"): Tree.from_dict({})
    with pytest.raises(TypeError, match=r'Tree.pairs\[0\]\[1\]: expected float'): Tree(1, pairs=[[1, 'x']])
    with pytest.raises(TypeError, match='Tree.leaf'): Tree(1, leaf=Tree(1))
    c = Tree(1); c.xs = [math.nan]
    with pytest.raises(ValueError, match='Tree.xs'): c.save(tmp_path/'c.json')
    assert list(tmp_path.iterdir()) == []

@quick
@given(st.lists(st.floats(0, 1e6), max_size=20))
def test_manual_clock_is_monotone(steps):
    c, seen = ManualClock(), [0.]
    for s in steps: seen.append(c.advance(s))
    assert seen == sorted(seen) and c.now() == seen[-1]

def test_wall_clock_ignores_clock_changes(monkeypatch):
    w = WallClock(); monkeypatch.setattr(time, 'time', lambda: 0.)
    a = w.now()
    assert a > 1e9 and w.now() >= a and w.advance_to(a - 5) >= a

@quick
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.text(max_size=3) | st.integers(0, 9), max_size=3)), min_size=2, max_size=2, unique_by=repr))
def test_streams_differ(pair):
    (a, x), (b, y) = pair
    assert (generator(a, *x).initial_seed() == generator(b, *y).initial_seed()) == ((a, x) == (b, y))

DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn

def random_tensor(shape, dtype, seed):
    n = math.prod(shape)
    if dtype is torch.bool: return torch.rand(shape, generator=generator(seed)) < 0.5
    raw = torch.randint(0, 256, (n*dtype.itemsize,), dtype=torch.uint8, generator=generator(seed))
    return raw.view(dtype).reshape(shape)

def bits(t): return t.shape, t.dtype, bytes(t.contiguous().reshape(-1).clone().view(torch.uint8).tolist())

@quick
@given(st.dictionaries(st.text(st.characters(exclude_categories=['Cs']), max_size=5).filter(lambda k: k != '__metadata__'),
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)), max_size=4), st.integers(0, 9))
def test_tensors_round_trip(tmp_path, spec, seed):
    ts = {k: random_tensor(s, d, seed) for k, (s, d) in spec.items()}
    save_tensors(tmp_path/'t', ts, META); raw = (tmp_path/'t').read_bytes()
    back, meta = load_tensors(tmp_path/'t', 'test', 'ab')
    assert meta == META and back.keys() == ts.keys() and all(bits(back[k]) == bits(ts[k]) for k in ts)
    save_tensors(tmp_path/'t', back, meta)
    assert (tmp_path/'t').read_bytes() == raw

def test_odd_tensors(tmp_path):
    w = torch.randn(4, 6)
    ts = dict(t=w.T, same=w, view=w[::2, ::3], expanded=torch.ones(1).expand(5), grad=torch.ones(2, requires_grad=True), scalar=torch.tensor(3))
    save_tensors(tmp_path/'t', ts, META)
    back, _ = load_tensors(tmp_path/'t')
    assert all(torch.equal(back[k], v.detach()) for k, v in ts.items())
    back['t'].add_(1)
    assert torch.equal(back['same'], w)

def test_mode_under_open_umask(tmp_path):
    for mask in (0, 0o777):
        old = os.umask(mask)
        try: save_tensors(tmp_path/'t', {}, META)
        finally: os.umask(old)
        assert (tmp_path/'t').stat().st_mode & 0o777 == 0o600

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    p = tmp_path_factory.mktemp('whole')/'s'
    save_state(p, outer(), dict(fingerprint='ab', note='é'*9))
    return p.read_bytes()

def outer(b=2): return Outer(a=torch.randn(b, 3), inner=Inner(h=torch.randn(b, 2, 4).bfloat16(), mask=torch.rand(b) < 0.5, batch_size=[b]), batch_size=[b])

def refuse(path, raw):
    path.write_bytes(raw)
    with pytest.raises(StateError) as e: load_state(path, Outer)
    assert str(path) in str(e.value) and 'begin afresh' in str(e.value)

def test_cuts_and_a_flip_in_every_byte(tmp_path, whole):
    for i in range(len(whole)):
        if i % 8 == 0: refuse(tmp_path/'x', whole[:i])
        refuse(tmp_path/'x', whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i+1:])

@quick
@given(st.data())
def test_damage(tmp_path, whole, data):
    i = data.draw(st.integers(0, len(whole))); j = data.draw(st.integers(i, len(whole)))
    raw = whole[:i] + data.draw(st.binary(max_size=40)) + whole[j:]
    if raw != whole: refuse(tmp_path/'x', raw)

@quick
@given(st.binary(max_size=200))
def test_garbage(tmp_path, raw): refuse(tmp_path/'x', raw)

def test_foreign_files(tmp_path):
    deep = b'['*100_000
    for raw in (st_save({'a': torch.ones(2)}), st_save({'a': torch.ones(2)}, {'chronomem': 'x'}), struct.pack('<Q', 2**63) + b'{}', struct.pack('<Q', 1 << 27) + bytes(1 << 20),
                struct.pack('<Q', len(deep)) + deep, b'\x80\x04K\x01.', b'PK\3\4'): refuse(tmp_path/'x', raw)

def test_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path/'pipe'); (tmp_path/'dir').mkdir(); (tmp_path/'dangling').symlink_to(tmp_path/'nothing')
    for n in ('pipe', 'dir', 'dangling'):
        with pytest.raises(StateError): load_tensors(tmp_path/n)
    with pytest.raises(StateError, match='symbolic link'): save_tensors(tmp_path/'dangling', {}, META)
    with pytest.raises(FileNotFoundError): load_tensors(tmp_path/'absent')
    assert not (tmp_path/'nothing').exists()

def test_state_round_trip_and_misfits(tmp_path):
    for s in (outer(), outer()[0], outer(0)):
        save_state(tmp_path/'s', s); back, _ = load_state(tmp_path/'s', Outer)
        a, b = s.to_tensordict(), back.to_tensordict()
        assert back.batch_size == s.batch_size and back.inner.batch_size == s.inner.batch_size and back.opt is None
        assert isinstance(back.inner, Inner) and all(bits(a[k]) == bits(b[k]) for k in a.keys(True, True))
    for t, meta in ((dict(a=torch.ones(2)), dict(batch={'': [2]})), (dict(zzz=torch.ones(2)), dict(batch={'': [2]})), (dict(a=torch.ones(2)), dict(batch={'': [3]})), (dict(a=torch.ones(2)), {})):
        save_tensors(tmp_path/'s', t, META | {'state': {'class': 'Outer', **meta}})
        with pytest.raises(StateError): load_state(tmp_path/'s', Outer)
    save_tensors(tmp_path/'s', {}, META)
    with pytest.raises(StateError, match='plain tensors'): load_state(tmp_path/'s', Outer)
    with pytest.raises(ValueError, match='dot'): save_state(tmp_path/'s', TensorDict({'a.b': torch.ones(1)}, []))

def test_finite(tmp_path):
    for t in (torch.tensor([math.nan]), torch.tensor(complex(0, math.inf)), torch.tensor([math.inf]).bfloat16(), torch.tensor([math.nan]).to(torch.float8_e4m3fn)):
        save_tensors(tmp_path/'t', dict(x=t), META)
        with pytest.raises(StateError, match="'x' holds NaN"): load_tensors(tmp_path/'t', finite=True)
    save_tensors(tmp_path/'t', dict(x=torch.tensor([1, 2]), y=torch.tensor(True)), META, finite=True)

@pytest.mark.parametrize('step', ['fchmod', 'fsync', 'replace'])
def test_failing_save_leaves_the_old_file(tmp_path, monkeypatch, step):
    save_tensors(tmp_path/'t', dict(x=torch.ones(1)), META)
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(core.os, step, full)
    with pytest.raises(OSError, match='No space'): save_tensors(tmp_path/'t', dict(x=torch.zeros(1)), META)
    assert load_tensors(tmp_path/'t')[0]['x'] == 1 and os.listdir(tmp_path) == ['t']

def _save_forever(path):
    torch.set_num_threads(1); i = 0
    while True: i += 1; save_tensors(path, dict(x=torch.full((200_000,), float(i))), META)

def test_sigkill_in_the_middle(tmp_path):
    f = tmp_path/'t'; save_tensors(f, dict(x=torch.zeros(200_000)), META)
    for k in range(12):
        p = mp.get_context('fork').Process(target=_save_forever, args=(f,)); p.start()
        time.sleep(0.02 + random.Random(k).random()*0.08); os.kill(p.pid, signal.SIGKILL); p.join()
        x = load_tensors(f, 'test')[0]['x']
        assert len(x) == 200_000 and (x == x[0]).all()
    assert x[0] > 0
    with DirLock(tmp_path): assert sorted(os.listdir(tmp_path)) == ['.lock', 't']

def _hold(path, ready):
    DirLock(path).acquire(); ready.set(); time.sleep(60)

def test_lock_across_processes(tmp_path):
    ctx = mp.get_context('fork'); ready = ctx.Event(); p = ctx.Process(target=_hold, args=(tmp_path, ready)); p.start(); assert ready.wait(10)
    with pytest.raises(StateError, match='in use'): DirLock(tmp_path).acquire()
    os.kill(p.pid, signal.SIGKILL); p.join()
    lock = DirLock(tmp_path).acquire(); lock.release(); lock.release()
    with lock, pytest.raises(StateError): lock.acquire()

@quick
@given(st.text(min_size=1) | st.sampled_from(['../x', '/', '..', '.', 'a/b', 'x'*300, '\0', '\ud800', '~', '-rf', 'CON', ' ']))
def test_hostile_names_stay_inside(tmp_path, user):
    home = tmp_path/'a'/'home'
    p = user_dir(home, user)
    assert p.resolve().parents[1] == home.resolve() and len(p.name) == 64 and p.name.startswith(p.parent.name)
    assert all(d.stat().st_mode & 0o777 == 0o700 for d in (p, p.parent, home)) and os.listdir(tmp_path) == ['a'] and os.listdir(tmp_path/'a') == ['home']
    assert user_dir(home, user, create=False) == p

def test_user_dir_refusals(tmp_path):
    for bad, err in ((b'x', TypeError), (None, TypeError), (3, TypeError), ('', ValueError)):
        with pytest.raises(err, match='user'): user_dir(tmp_path, bad)
    p = user_dir(tmp_path/'h', 'u', create=False); assert not (tmp_path/'h').exists()
    (tmp_path/'h').mkdir(); (tmp_path/'elsewhere').mkdir(); p.parent.symlink_to(tmp_path/'elsewhere')
    for create in (True, False):
        with pytest.raises(StateError, match='symbolic link'): user_dir(tmp_path/'h', 'u', create)
    p.parent.unlink(); p.parent.mkdir(); p.write_text('file')
    with pytest.raises(StateError): user_dir(tmp_path/'h', 'u')
    p.unlink(); p.mkdir(mode=0o755); assert user_dir(tmp_path/'h', 'u').stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path/'elsewhere') == []

def test_fingerprint_depends_on_everything():
    base = dict(a=torch.arange(6.).reshape(2, 3), b=torch.zeros(2))
    others = [dict(a=base['a']), dict(base, a=base['a'].T), dict(base, a=base['a'].reshape(3, 2)), dict(base, b=torch.zeros(2).int()), dict(base, b=torch.tensor([0., -0.])), dict(a=base['a'], c=base['b'])]
    assert len({fingerprint(x) for x in (base, *others)}) == 7 and fingerprint(base) == fingerprint(dict(reversed(base.items())))
    assert len(fingerprint(base)) == 16
    with pytest.raises(TypeError, match="module\\['x'\\]"): fingerprint(dict(x=3))

def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv('CHRONOMEM_DATA', str(tmp_path)); assert data_root() == tmp_path
    monkeypatch.setenv('CHRONOMEM_DATA', str(tmp_path/'no'))
    with pytest.raises(FileNotFoundError, match='CHRONOMEM_DATA'): data_root()

def test_a_manual_clock_reaches_the_very_moment():
    from chronomem.core import ManualClock
    clock = ManualClock(3.7)
    assert 3.7+(13.9-3.7) != 13.9 and clock.advance_to(13.9) == 13.9 == clock.now()
    with pytest.raises(ValueError): clock.advance_to(13.8)
