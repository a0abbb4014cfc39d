"What notebooks 20_ladder and 20a_rungs can't show: any config, any batch, any pattern of live rows; and that names of weights stay"
import math, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from chronomem.core import load_state, save_state
from chronomem.ladder.ladder import *
from chronomem.ladder.rungs import *
from chronomem.ladder.recurrent import RecurrentMemory

D_IN, D_OUT = 6, 4
quick = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

@st.composite
def configs(draw):
    taus = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    some = lambda lo, hi: draw(st.lists(st.integers(lo, hi), min_size=len(taus), max_size=len(taus)))
    return LadderConfig(taus=taus, dims=some(1, 7), slots=some(1, 3), phases=some(0, 10), tokens=draw(st.integers(1, 2)), hidden=draw(st.integers(1, 8)))

seeds, sizes = st.integers(0, 2**31), st.integers(1, 5)

def made(c, seed, B, T, age=0):
    "A ladder, a state of some age and content, and inferences"
    torch.manual_seed(seed)
    m = CadenceLadder(c, D_IN, D_OUT).requires_grad_(False)
    s = m.init(B)
    s.t += torch.randint(age+1, (B,))
    if age: s = m.scan(s, torch.randn(B, 3, D_IN), gate='always')[0]
    return m, s, torch.randn(B, T, D_IN)

def flat(s): return dict(s.to_tensordict().items(True, True))
def bits(x): return x.view(torch.int32) if x.dtype == torch.float32 else x
def same(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(v.dtype == b[k].dtype and torch.equal(bits(v), bits(b[k])) for k, v in a.items())

@quick
@given(configs(), seeds, sizes, st.sampled_from(GATES))
def test_a_skip_leaves_the_bits(c, seed, B, gate):
    m, s, h = made(c, seed, B, 6, age=20)
    for r in s.rungs.values(): r['z'][0] = -0.                         # arithmetic would turn it into 0.
    for i in range(6):
        live = torch.rand(B) < .7
        new, log = m.write(s, h[:, i], live, gate)
        for j, n in enumerate(m.rungs):
            a, b, wrote = s.rungs[n], new.rungs[n], log.open[:, j]
            kept = b['born'] == a['born']
            assert torch.equal((~kept).sum(1), wrote.long()), 'one slot per write, none per skip'
            assert torch.equal(bits(b['z'])[kept], bits(a['z'])[kept])
            assert (b['born'].max(1).values[wrote] == s.t[wrote]).all()
        assert not (log.open & ~log.due).any() and not (log.due & ~live[:, None]).any()
        assert torch.equal(new.t, s.t+live)
        s = new

@quick
@given(configs(), seeds, sizes, st.sampled_from(('hard', 'always')))
def test_due_is_the_calendar(c, seed, B, gate):
    m, s, h = made(c, seed, B, 12, age=50)
    log = m.scan(s, h, gate=gate)[1]
    t = s.t[:, None]+torch.arange(12)
    want = torch.stack([(t-p) % tau == 0 for tau, p in zip(c.taus, c.phases)], -1)
    assert torch.equal(log.due, want)
    if gate == 'always': assert torch.equal(log.open, want)

@quick
@given(configs(), seeds, sizes, st.integers(1, 7), st.sampled_from(GATES), st.data())
def test_a_scan_is_its_writes(c, seed, B, T, gate, data):
    m, s, h = made(c, seed, B, T, age=9)
    live, ask = torch.rand(B, T) < .8, tuple(sorted(data.draw(st.sets(st.integers(0, T-1)))))
    torch.manual_seed(seed); end, log, reads = m.scan(s, h, live, gate, ask)
    torch.manual_seed(seed); seen = []
    for i in range(T):
        if i in ask: seen.append(m.read(s))
        s, l = m.write(s, h[:, i], live[:, i], gate)
        assert same(l, log[:, i])
    assert same(s, end) and bool(reads) == bool(ask)
    for got, one in zip(reads, zip(*seen)): assert torch.equal(got, torch.stack(one, 1))

@quick
@given(configs(), seeds, st.integers(2, 6), st.sampled_from(GATES), st.data())
def test_rows_never_mix(c, seed, B, gate, data):
    m, s, h = made(c, seed, B, 6, age=9)
    i = data.draw(st.integers(0, B-1))
    other, s2 = h.clone(), s.clone()
    other[i] = 1e6*torch.randn(6, D_IN); s2.t[i] += 3
    for n in m.rungs: s2.rungs[n, 'z'][i] = 5.
    torch.manual_seed(seed); a, la, ra = m.scan(s, h, gate=gate, read_at=(5,))
    torch.manual_seed(seed); b, lb, rb = m.scan(s2, other, gate=gate, read_at=(5,))
    rest = [j for j in range(B) if j != i]
    assert same(a[rest], b[rest]) and same(la[rest], lb[rest])
    assert all(torch.equal(x[rest], y[rest]) for x, y in zip(ra, rb))

@quick
@given(configs(), seeds, sizes)
def test_sessions_can_be_batched_apart(c, seed, B):
    m, s, h = made(c, seed, B, 5, age=9)
    together, apart = m.scan(s, h, gate='always')[0], torch.cat([m.scan(s[i:i+1], h[i:i+1], gate='always')[0] for i in range(B)])
    for k, v in flat(together).items(): torch.testing.assert_close(flat(apart)[k], v, rtol=1e-3, atol=1e-4)

@quick
@given(configs(), seeds, sizes)
def test_saved_and_continued(tmp_path, c, seed, B):
    m, s, h = made(c, seed, B, 4, age=9)
    save_state(tmp_path/'s', s, finite=True)
    back, _ = load_state(tmp_path/'s', LadderState, finite=True)
    assert same(back, s) and torch.equal(m.read(back)[0], m.read(s)[0])
    for s1, s2 in ((s, back), (s[:1], torch.stack([back[0]]))):
        assert same(m.scan(s1, h[:len(s1.t)])[0], m.scan(s2, h[:len(s1.t)])[0])

@quick
@given(configs(), seeds, sizes)
def test_reads(c, seed, B):
    m, s, h = made(c, seed, B, 1, age=9)
    soft, mask = m.read(s)
    K = sum(c.slots)*c.tokens
    assert soft.shape == (B, K, D_OUT) and mask.shape == (B, K) and soft.isfinite().all()
    held = torch.cat([(s.rungs[n, 'born'] >= 0).repeat_interleave(c.tokens, 1) for n in m.rungs], 1)
    assert torch.equal(mask, held)
    assert not m.read(m.init(B))[1].any()

@quick
@given(configs(), seeds)
def test_full_slots_replace_the_oldest(c, seed):
    m, s, h = made(c, seed, 2, 1)
    for _ in range(3*max(c.taus)):
        old = s; s, log = m.write(s, h[:, 0], gate='always')
        for j, n in enumerate(m.rungs):
            b = old.rungs[n, 'born']
            for row in log.open[:, j].nonzero().flatten().tolist():
                assert s.rungs[n, 'born'][row, b[row].argmin()] == old.t[row]
    assert all((r['born'] >= 0).sum(1).eq(min(r['born'].shape[1], 3)).all() for r in s.rungs.values())

KEYS = {'tag', 'alpha', 'skip.weight', 'enc.0.weight', 'enc.0.bias', 'enc.2.weight', 'enc.2.bias', 'mix.weight', 'mix.bias', 'gate.0.weight', 'gate.0.bias',
        'gate.2.weight', 'gate.2.bias', 'read.weight', 'where.weight', 'where.bias'}

@quick
@given(configs(), seeds)
def test_names_of_weights_stay(c, seed):
    m = made(c, seed, 1, 1)[0]
    assert set(m.state_dict()) == {'norm.weight', 'norm.bias', 'scale'} | {f'rungs.tau{tau}.{k}' for tau in c.taus for k in KEYS}
    assert [n for n, _ in m.named_buffers()] == ['scale'], 'state is never a buffer; the scale of soft tokens is a constant of the weights'
    assert sum(d['weights'] for d in m.describe()) + 2*D_IN == sum(p.numel() for p in m.parameters())
    assert sum(d['state_bytes'] for d in m.describe()) + 8 == m.init(1).bytes()
    assert set(RecurrentMemory(c, 2*D_OUT, D_OUT).state_dict()) == {'norm.weight', 'norm.bias', 'alpha', 'place', 'scale'}

def test_scale_travels_with_the_weights():
    "A ladder rebuilt around a model whose embeddings have grown must read as it was trained"
    c = LadderConfig(taus=(1,), dims=(8,), slots=(1,), phases=(0,), hidden=8)
    a, b = CadenceLadder(c, D_IN, D_OUT, scale=3.), CadenceLadder(c, D_IN, D_OUT, scale=1.)
    b.load_state_dict(a.state_dict())
    s, _ = a.write(a.init(1), torch.randn(1, D_IN), gate='always')
    assert torch.equal(a.read(s)[0], b.read(s)[0])

def test_weights_start_as_they_did():
    torch.manual_seed(0)
    m = CadenceLadder(LadderConfig(), 64, 32)
    r = m.rungs['tau4']
    assert r.alpha.item() == pytest.approx(.1) and r.gate[-1].bias.item() == 2 and (r.mix[-1].bias == -2).all() and not r.mix[-1].weight.any() and (m.rungs['tau1'].mix.bias == -2).all()
    for w in (r.skip.weight, r.read.weight):
        g = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(g, torch.eye(len(g)), rtol=0, atol=1e-5)

@pytest.mark.parametrize('kw', [dict(taus=()), dict(taus=(0, 1, 2)), dict(taus=(4, 1, 16)), dict(taus=(1, 4, 4)), dict(dims=(8, 8)), dict(dims=(8, 8, 0)),
    dict(slots=(1, 0, 1)), dict(phases=(0, 0, -1)), dict(tokens=0), dict(hidden=0)])
def test_bad_configs(kw):
    with pytest.raises(ValueError, match=f'LadderConfig.{next(iter(kw))}: expected'): LadderConfig(**kw)

tiny = LadderConfig(taus=(1, 4), dims=(4, 4), slots=(1, 1), phases=(0, 1), hidden=4)
@pytest.mark.parametrize('f, exc, words', [
    (lambda m, s, h: m.write(s, h[0]), ValueError, r'h: got shape \[6\], expected \[B, d_in\] = \[2, 6\]'),
    (lambda m, s, h: m.write(s, h[:1]), ValueError, 'h: got shape'),
    (lambda m, s, h: m.scan(s, h), ValueError, r'expected \[B, T, d_in\]'),
    (lambda m, s, h: m.scan(s, h[:, None][:, :0]), ValueError, '1 or more'),
    (lambda m, s, h: m.scan(s, h[:, None], read_at=(1,)), ValueError, 'read_at'),
    (lambda m, s, h: m.scan(s, h[:, None].repeat(1, 4, 1), read_at=(2, 1)), ValueError, 'read_at'),
    (lambda m, s, h: m.write(s, h, torch.ones(2)), ValueError, 'live: got torch.float32'),
    (lambda m, s, h: m.write(s, h, gate='soft'), ValueError, 'gate'),
    (lambda m, s, h: m.write(s, h*float('nan')), ValueError, r'rows \[0, 1\]'),
    (lambda m, s, h: m.write(s[0], h), ValueError, r'state\[i:i\+1\]'),
    (lambda m, s, h: m.write(flat(s), h), TypeError, 'expected a LadderState'),
    (lambda m, s, h: m.read(CadenceLadder(tiny.replace(taus=(1, 5)), 6, 4).init(2)), ValueError, 'another config'),
    (lambda m, s, h: m.read(CadenceLadder(tiny.replace(slots=(1, 2)), 6, 4).init(2)), ValueError, 'another config'),
    (lambda m, s, h: RecurrentMemory(tiny, 8, 4).read(s), ValueError, 'another config'),
    (lambda m, s, h: RecurrentMemory(tiny, 8, 4).write(RecurrentMemory(tiny, 8, 4).init(2), h), ValueError, r'= \[2, 8\]')])
def test_errors_say_what_came(f, exc, words):
    m = CadenceLadder(tiny, 6, 4)
    with pytest.raises(exc, match=words): f(m, m.init(2), torch.randn(2, 6))

def test_straight_through_is_descent():
    "One step against the gradient of p lowers the expected loss of a random choice"
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        new, old, target = torch.randn(3, 4, 1, 5, generator=g)
        p, due = torch.full((4,), .5, requires_grad=True), torch.ones(4, 1, dtype=torch.bool)
        open = torch.rand(4, 1, generator=g) < .5
        w = target.clone()
        (HardWrite.apply(new, old, p, due, open)*w).sum().backward()
        gain = ((new-old)*w).sum((1, 2))                               # loss if written minus loss if not
        torch.testing.assert_close(p.grad, gain)

def test_a_fork_shares_nothing():
    m = CadenceLadder(tiny, 6, 4).requires_grad_(False); h = torch.randn(2, 6)
    s = m.write(m.init(2), h)[0]; before = s.clone(); fork = s.clone()
    for _ in range(5): fork = m.write(fork, torch.randn(2, 6), gate='always')[0]
    fork.rungs['tau1', 'z'].zero_()
    assert same(s, before)

# What the lines mean, by hand

def hand(taus=(1, 2), slots=2, D=4, d_in=D_IN):
    torch.manual_seed(0)
    n = len(taus)
    return CadenceLadder(LadderConfig(taus=taus, dims=(D,)*n, slots=(slots,)*n, phases=(0,)*n, hidden=4), d_in, D_OUT).requires_grad_(False)

def test_idle_counts_from_the_rungs_last_write():
    "Slots written at 3 and 7, decided at 10: idle for 3; never written: as long as the clock says and one more"
    r = hand().rungs['tau1']
    for born, idle in (([3, 7], 3), ([7, 3], 3), ([-1, 7], 3), ([-1, -1], 11)):
        x = r.see(dict(z=torch.randn(1, 2, 4), born=torch.tensor([born])), torch.tensor([10]), torch.randn(1, D_IN), [])
        assert x[0, -TIME:][:2].tolist() == pytest.approx([math.log(1+idle)/8, 1/(1+idle)])
        assert x[0, -2*TIME:][:2].tolist() == pytest.approx([math.log(11)/8, 1/11]), 'and how old the session is'

def test_faster_rungs_are_seen_newest_first():
    z = torch.tensor([[[1., 1.], [2., 2.], [3., 3.]]])
    assert by_recency(z, torch.tensor([[4, 9, -1]])).tolist() == [[2., 2., 1., 1., 3., 3.]]

def test_a_locked_rung_waits():
    m = hand((1, 2, 3), 1)
    for k in range(4):
        m.unlocked = k
        log = m.write(m.init(1), torch.randn(1, D_IN), gate='always')[1]
        assert log.due[0].tolist() == log.open[0].tolist() == [i < k for i in range(3)]

def test_age_as_it_is_read():
    "Written at 2, read at 5: three inferences old"
    m = hand()
    r, z, t = m.rungs['tau1'], torch.randn(1, 2, 4), torch.tensor([5])
    y, mask = r.soft(z, torch.tensor([[2, -1]]), t)
    want = r.alpha*(r.read(z[:, 0]) + r.where(torch.cat([r.tag, time_features(torch.tensor(3), TIME)])))
    torch.testing.assert_close(y[:, 0], want); assert mask.tolist() == [[True, False]]

def test_a_write_keeps_a_little_of_what_was_held():
    "At first sigmoid(-2) = 0.1192 of the old latent, the rest is new"
    r = hand().rungs['tau1']
    r.mix.weight.zero_()
    x, h, held = torch.randn(1, sum(r.sizes)), torch.randn(1, D_IN), torch.randn(1, 4)
    torch.testing.assert_close(r.candidate(x, h, held), r.norm(.1192029*held + .8807971*(r.skip(h) + r.enc(x))))

def test_a_gate_opens_above_even_odds():
    m = hand((1,), 1)
    r = m.rungs['tau1']
    for bias, opens, p in ((1., True, .728), (-1., False, .272), (100., True, .9933)):            # 5·tanh(bias/5) at most 5
        r.gate[-1].weight.zero_(); r.gate[-1].bias.fill_(bias)
        log = m.write(m.init(1), torch.randn(1, D_IN))[1]
        assert log.open.item() is opens and log.p.item() == pytest.approx(p, abs=1e-3)

def test_cadences_that_are_learned_keep_time():
    c = LadderConfig(taus=(1, 4), dims=(4, 4), slots=(1, 1), phases=(0, 1), hidden=4, learned=True)
    r = CadenceLadder(c, D_IN, D_OUT).requires_grad_(False).rungs['tau4']
    due = lambda: ''.join('.x'[int(r.turn(torch.tensor([t]), torch.ones(1))[0])] for t in range(10))
    assert due() == '.x...x...x'
    r.pace.fill_(math.log(2)); assert due() == '.x.x.x.x.x'
    assert r.turn(torch.tensor([0]), torch.ones(1))[2].item() == pytest.approx(.5), 'a write every other time: half the gradient'

def test_write_replay_touches_only_what_is_from_before():
    "A latent of this very call keeps its whole graph: its gradient reaches the hidden state it was written from; an older one teaches weights alone"
    h = torch.randn(1, 2, D_IN)
    def grad(replay, t0=0):
        m, x = hand((1,), 1).requires_grad_(), h.clone().requires_grad_()
        s = m.init(1); s.t += t0
        soft = m.scan(s, x, gate='always', read_at=(1,), replay=replay)[2][0]
        (soft*torch.arange(1., D_OUT+1)).sum().backward()
        return x.grad
    for t0 in (0, 7):
        a, b = grad(False, t0), grad(True, t0)
        assert a[0, 0].abs().max() > 1e-4; torch.testing.assert_close(a, b)

def test_write_replay_follows_the_weights_of_now():
    m, h = hand((1,), 1), torch.randn(1, 3, D_IN)
    s = m.scan(m.init(1), h[:, :2], gate='always', replay=True)[0].detach()
    r = m.rungs['tau1']
    before = s.rungs['tau1', 'z'].clone()
    r.skip.weight.mul_(-1.)
    now = m.scan(s, h[:, 2:], gate='always', read_at=(0,), replay=True)[2][0]
    then = m.scan(s, h[:, 2:], gate='always', read_at=(0,))[2][0]
    assert not torch.allclose(now, then) and torch.equal(s.rungs['tau1', 'z'], before)

def test_recurrent_memory_lets_the_dead_rest():
    c = LadderConfig(taus=(1,), dims=(4,), slots=(1,), phases=(0,), hidden=4)
    m = RecurrentMemory(c, 8, 4).requires_grad_(False)
    s, h = m.init(2), torch.randn(2, 8)
    new, log = m.write(s, h, torch.tensor([True, False]))
    assert new.t.tolist() == [1, 0] and new.rungs['tau1', 'born'].tolist() == [[0, 0], [-1, -1]]
    assert not new.rungs['tau1', 'z'][1].any() and m.read(new)[1].tolist() == [[True]*2, [False]*2]
    torch.testing.assert_close(new.rungs['tau1', 'z'][0], m.norm(h[0].view(2, 4)))
