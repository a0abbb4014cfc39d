"What notebook 42_recall can't show: any ring, any order of stores, every search against a loop; owners never mix"
import math
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from chronomem.core import StateError, load_state, save_state
from chronomem.then.recall import *

quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
seeds = st.integers(0, 2**31)

@st.composite
def configs(draw):
    block = draw(st.sampled_from((1, 2, 4)))
    return ResonanceConfig(width=draw(st.integers(1, 4)), key=draw(st.sampled_from((0, 3))), capacity=block*draw(st.integers(1, 8)), block=block, probe=8, rerank=64, top_k=draw(st.integers(1, 6)),
                           threshold=draw(st.sampled_from((.05, .7, .95))), half_life=draw(st.sampled_from((2., 50.))), temperature=draw(st.sampled_from((.1, 1.))), gap=draw(st.sampled_from((0., 3.))))

def lived(c, seed, B, T):
    "A store, and what a list would remember"
    g = torch.Generator().manual_seed(seed)
    r, n = Resonance(c), lambda *s: torch.randn(*s, generator=g)
    x, k, where, state, seen = n(B, T, c.width), n(B, T, c.key or c.width), torch.rand(B, T, generator=g) < .7, r.init(B), [[] for _ in range(B)]
    if not c.key: k = x
    for t in range(T):
        assert r.store(state, x[:, t], float(t), where[:, t], k[:, t] if c.key else None) is state
        for b in range(B):
            if where[b, t]: seen[b].append((k[b, t], x[b, t], float(t)))
    return r, state, [s[-c.capacity:] for s in seen], n(B, c.key or c.width), (x, k, where)

def by_loop(c, seen, q, now):
    near = [(float(torch.dot(k, q)/(k.norm()*q.norm())), v, now-t) for k, v, t in seen]
    top = sorted(((s*2**(-a/c.half_life), v) for s, v, a in near if s >= c.threshold and a >= c.gap), key=lambda p: -p[0])[:c.top_k]
    w = torch.tensor([s for s, _ in top]).div(c.temperature).softmax(0)
    return sum((a*v for a, (_, v) in zip(w, top)), torch.zeros(c.width))

@quick
@given(configs(), seeds, st.integers(1, 3), st.integers(0, 30))
def test_echo_equals_a_loop(c, seed, B, T):
    r, state, seen, q, _ = lived(c, seed, B, T)
    want = torch.stack([by_loop(c, s, x, float(T)) for s, x in zip(seen, q)])
    for how in ('exact', 'blocks', 'auto'): torch.testing.assert_close(r.echo(state, q, float(T), how), want, rtol=1e-4, atol=1e-4)
    alone = torch.cat([r.echo(state[b:b+1], q[b:b+1], float(T), 'codes') for b in range(B)])
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-4)

@quick
@given(configs(), seeds, st.integers(1, 3), st.integers(0, 30), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_chunks_masks_and_constant_memory(c, seed, B, T, cuts):
    r, state, seen, _, (x, k, where) = lived(c, seed, B, T)
    other, size, ptr = r.init(B), state.bytes(), None
    ptr, i = other.value.data_ptr(), 0
    while i < T:
        n = cuts[i % len(cuts)]; j = slice(i, i+n)
        r.store(other, x[:, j], torch.arange(T).double()[j].expand(B, -1), where[:, j], k[:, j] if c.key else None); i += n
    assert other.bytes() == size and other.value.data_ptr() == ptr
    assert torch.equal(state.count, where.sum(1)) and torch.equal(state.time, other.time) and torch.equal(state.value, other.value)
    for name, v in state.items(): torch.testing.assert_close(v.float(), other.get(name).float(), rtol=1e-5, atol=1e-6 if name != 'code' else 1)
    assert torch.equal((state.time > -math.inf).sum(1), torch.tensor([len(s) for s in seen]))

@quick
@given(configs(), seeds, st.integers(2, 4))
def test_owners_forks_and_files(tmp_path, c, seed, B):
    r, state, _, q, _ = lived(c, seed, B, 12)
    fork, key = state.fork(), torch.ones(B, c.key) if c.key else None
    r.store(state, torch.ones(B, c.width), 12., torch.arange(B) == 0, key)
    for name, v in state.items(): assert torch.equal(v[1:], fork.get(name)[1:])
    assert state.count[0] == fork.count[0]+1
    save_state(tmp_path/'s', state)
    back = load_state(tmp_path/'s', TraceState)[0]
    assert torch.equal(r.echo(back, q, 13.), r.echo(state, q, 13.)) and (back.key is None) == (c.key == 0)
    state.wipe(torch.arange(B) == 1)
    assert not r.echo(state, q, 13.)[1].any() and torch.equal(state.value[0], back.value[0]) and not state.value[1].any() and not state.code[1].any()
    for name, v in state.wipe().items(): assert torch.equal(v, r.init(B).get(name))

@pytest.mark.parametrize('bad', (math.nan, math.inf))
def test_broken_numbers_are_neither_stored_nor_echoed(bad):
    r = Resonance(ResonanceConfig(width=2, capacity=16))
    s = r.store(r.init(2), torch.tensor([[1., 0.], [bad, 0.]]), 0.)
    assert s.count.tolist() == [1, 0] and all(v.float().nan_to_num(neginf=0).isfinite().all() for _, v in s.items())
    assert not r.echo(s, torch.tensor([[bad, 1.], [1., 0.]]), 1.).any()
    assert r.store(s, torch.ones(2, 2), bad).count.tolist() == [1, 0]

def test_time_of_day_keeps_its_milliseconds():
    r, now = Resonance(ResonanceConfig(width=2, capacity=16)), 1.7e9
    s = r.init()
    for i in range(3): r.store(s, torch.eye(2)[:1], now+.05*i)
    torch.testing.assert_close(r.find(s, torch.eye(2)[:1], now+1).age[0, :3], torch.tensor([.9, .95, 1.]))

def test_what_does_not_fit_is_refused(tmp_path):
    r = Resonance(ResonanceConfig(width=2, capacity=16))
    for f, words in ((lambda: r.store(r.init(), torch.ones(1, 3), 0.), 'latent: got'), (lambda: r.store(r.init(), torch.ones(1, 2), 0., key=torch.ones(1, 2)), 'key: got some'),
                     (lambda: r.echo(r.init(2), torch.ones(3, 2), 0.), 'state: got 2 owners'), (lambda: r.find(r.init(2), torch.ones(2, 2), 0., 'codes'), "'codes' serves one owner")):
        with pytest.raises(ValueError, match=words): f()
    (tmp_path/'s').write_bytes(b'no state')
    with pytest.raises(StateError): load_state(tmp_path/'s', TraceState)

# What the lines mean, by hand

def plane(**kw): return Resonance(ResonanceConfig(**dict(width=2, capacity=4, block=1, top_k=4, rerank=4, threshold=.5, half_life=10., temperature=.5) | kw))
def at(degrees): return torch.tensor([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]])

@pytest.mark.parametrize('search', ('exact', 'codes', 'blocks'))
def test_an_echo_by_hand(search):
    "Traces at 0, 60 and 61 degrees, the first ten seconds old: scores .5, .5 and none"
    r = plane(); s = r.init()
    for angle, t in ((0, 0.), (60, 10.), (61, 10.)): r.store(s, 2*at(angle), t)
    f = r.find(s, at(0), 10., search)
    got = {int(i): (c, a) for i, c, a, ok in zip(f.index[0], f.cosine[0].tolist(), f.age[0].tolist(), f.ok[0]) if ok}
    assert got == {0: (pytest.approx(1.), 10.), 1: (pytest.approx(.5, abs=1e-6), 0.)}, 'half a turn of the clock halves a score; a cosine of .5 still resonates, .485 does not'
    torch.testing.assert_close(r.echo(s, at(0), 10., search), at(0)+at(60))                      # (2·a + 2·b)/2
    torch.testing.assert_close(r.echo(s, at(0), 20., search), at(0)+at(60))
    r.store(s, 2*at(0), 20.); f = r.find(s, at(0), 20., search)
    assert f.index[0, 0] == 3 and f.age[0, 0] == 0

def test_a_gap_is_how_old_a_trace_must_be():
    r = plane(gap=3.); s = r.store(r.init(), at(0), 0.)
    assert [bool(r.find(s, at(0), now).ok.any()) for now in (0., 2.9, 3., 4.)] == [False, False, True, True]

def test_the_oldest_gives_way():
    r = plane(); s = r.init()
    r.store(s, torch.arange(6.)[None, :, None].expand(1, 6, 2)+1, torch.arange(6.)[None])        # six at once into four places
    assert s.time[0].tolist() == [4., 5., 2., 3.] and s.value[0, :, 0].tolist() == [5., 6., 3., 4.] and s.count.item() == 6
    r.store(s, at(0), 6.); assert s.time[0].tolist() == [4., 5., 6., 3.]

def test_nothing_is_stored_that_the_same_call_overwrites():
    from chronomem.then.recall import _slots
    b, step, slot, total = _slots(torch.tensor([1]), torch.ones(1, 6, dtype=torch.bool), 4)      # one stored before, six more, four places
    assert step.tolist() == [2, 3, 4, 5] and slot.tolist() == [3, 0, 1, 2] and total.tolist() == [6]
