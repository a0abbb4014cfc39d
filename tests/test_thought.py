"What notebooks 30, 31, 33 and 33a can't show: gradients of official models, any config in chunks, rows that don't mix, rules of the code"
import ast, itertools, math, pytest, torch
from pathlib import Path
from safetensors.torch import load_file
from chronomem.core import generator, load_state, save_state
from chronomem.thought import machine, nlm, sync, thinker
from chronomem.thought.machine import Core, CoreState, ThoughtConfig
from chronomem.thought.heads import calibrate, fit_platt, most_certain
from chronomem.thought.nlm import NLM, synapse
from chronomem.thought.sync import MEASURES, PAIRS, Sync, pairs, unpack
from chronomem.thought.thinker import Thinker, load_ctm
from chronomem.thought.running_stats import init_sums, mean_var, pool_parts, update, with_steps

GOLDEN = sorted((Path(__file__).parent/'golden').glob('ctm_*.safetensors'))
close = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, rtol=tol, atol=tol)
def tiny(**kw): return ThoughtConfig(**dict(d=24, d_in=8, memory=5, hidden=3, heads=2, n_synch_out=6, n_synch_action=5, shape=(3, 2), ticks=6) | kw)
CONFIGS = [dict(), dict(pairs='first-last'), dict(pairs='random', exact=True), dict(pairs='learned', selfs=2), dict(measure='correlation'), dict(deep=False, depth=4),
           dict(regions=4, norm=True), dict(depth=0, temperature=True), dict(pairs='random', measure='correlation', drift='oscillate')]
def made(seed=0, cls=Thinker, **kw):
    torch.manual_seed(seed)
    m = cls(tiny(**kw)).requires_grad_(False)
    getattr(m, 'core', m).sync.decay.uniform_(0, .5)
    return m

# The official modules, run with random weights

def test_there_are_golden_files():
    assert len(GOLDEN) == 12 and sum(f.stat().st_size for f in GOLDEN) < 1_500_000

@pytest.mark.parametrize('f', GOLDEN, ids=lambda f: f.stem)
def test_official(f):
    g = load_file(f)
    m = load_ctm({k[2:]: v for k, v in g.items() if k.startswith('w.')}, heads=2, shape=(3, 2), ticks=g['predictions'].shape[2])
    assert m.config.pairs.replace('-', '') == f.stem.split('_')[1]
    state, out = m(m.init(3), g['x'] if g['x'].ndim == 2 else g['x'].mT)
    close(out.logits.flatten(2).mT, g['predictions']); close(out.certainty, g['certainties'])
    close(m.core.sync.read(*unpack(state.sync))[:, :m.core.n_synch_out], g['synchronisation'])
    out.logits.square().sum().backward()
    close(m.core.z.grad, g['g.start_activated_state'], 1e-4); close(m.core.history.grad, g['g.start_trace'], 1e-4)
    d, at = m.core.sync.decay, torch.cat([g['g.decay_params_out'], g['g.decay_params_action']])
    assert (at != 0).all() and (d >= 0).all(), 'also those at the clamp'
    close(d.grad, at, 1e-4)

def test_temperatures_can_stay_or_go():
    m = made(temperature=True)
    for l in m.core.nlm.layers: l.T.fill_(1.7)
    plain = Thinker(tiny())
    sd = {k: v.clone() for k, v in m.state_dict().items() if not k.endswith('.T')}
    for i in (0, 1):
        for k in 'wb': sd[f'core.nlm.layers.{i}.{k}'] /= 1.7
    plain.load_state_dict(sd); x = torch.randn(2, 4, 8)
    close(plain(plain.init(2), x)[1].logits, m(m.init(2), x)[1].logits)
    assert sum(p.numel() for p in m.parameters()) - sum(p.numel() for p in plain.parameters()) == 2

# Any config

@pytest.mark.parametrize('kw', CONFIGS, ids=str)
@pytest.mark.parametrize('n', (1, 7))
def test_chunks(kw, n):
    core = made(cls=Core, **kw)
    x, gaps = torch.randn(3, 20, 8), torch.rand(3, 20) < .3
    gaps[:, 0] = True                                                 # no input from the very start
    last, want = core.scan(core.init(3), x, 2, gaps)
    state, outs = core.init(3), []
    for a, b in zip(x.split(n, 1), gaps.split(n, 1)): state, o = core.scan(state, a, 2, b); outs.append(o)
    for k in (0, 1): close(torch.cat([o[k] for o in outs], 1), want[k])
    assert want.sync.isfinite().all()
    a, b = (dict(s.to_tensordict().items(True, True)) for s in (state, last))
    for k in a: close(a[k], b[k])

@pytest.mark.parametrize('kw', CONFIGS, ids=str)
def test_rows_dont_mix(kw):
    m, x = made(**kw), torch.randn(4, 5, 8)
    want = m(m.init(4), x)[1].logits
    for b in range(4): close(m(m.init(1), x[b:b+1])[1].logits[0], want[b])

@pytest.mark.parametrize('kw', CONFIGS, ids=str)
def test_every_weight_learns(kw):
    m = made(**kw).requires_grad_()
    m(m.init(3), torch.randn(3, 5, 8))[1].logits.square().sum().backward()
    assert not [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().max() > 0 or not p.grad.isfinite().all()]

@pytest.mark.parametrize('kw', CONFIGS, ids=str)
def test_states_are_saved_to_the_bit(kw, tmp_path):
    m, x = made(**kw), torch.randn(3, 5, 8)
    state, _ = m(m.init(3), x, 3)
    save_state(tmp_path/'s', state); back, _ = load_state(tmp_path/'s', CoreState)
    a, b = (dict(s.to_tensordict().items(True, True)) for s in (state, back))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    close(m(back, x)[1].logits, m(state, x)[1].logits, 1e-6)
    joined = torch.cat([state[:1], m.init(2)])                        # sessions of different age in one batch
    close(m(joined, x)[1].logits[0], m(state, x)[1].logits[0]); close(m(joined, x)[1].logits[1:], m(m.init(2), x[1:])[1].logits)

@pytest.mark.parametrize('kw', CONFIGS[:5], ids=str)
def test_early_exit(kw):
    m, x = made(**kw), torch.randn(5, 4, 8)
    full = m(m.init(5), x, 12)[1]
    until = full.certainty.amax(1).median().item()
    state, out = m(m.init(5), x, 12, until)
    for b in range(5):
        hit = (full.certainty[b] >= until-1e-7).nonzero()
        n = hit[0].item()+1 if len(hit) else 12
        assert out.used[b] == n, 'the first tick that is certain enough'
        one, alone = m(m.init(1), x[b:b+1], 12, until)
        assert alone.logits.shape[1] == n == alone.used
        close(alone.logits[0], full.logits[b, :n]); close(out.logits[b, :n], full.logits[b, :n]); close(one.z[0], state.z[b])
        close(one.sync.alpha[0], state.sync.alpha[b]); close(one.sync.beta[0], state.sync.beta[b])
    assert out.logits.shape[1] == out.used.max()

# Synchronisation

@pytest.mark.parametrize('measure', MEASURES)
def test_a_thousand_ticks_are_the_weighted_sum(measure):
    torch.manual_seed(1)
    m = Sync(pairs('random-pairing', 10, 16, generator(1), selfs=2), 10, measure).requires_grad_(False)
    m.decay.uniform_(0, .2)[:4] = 0
    zs, state, (i, j) = torch.randn(1000, 2, 10)+.5, m.init(2), m.pairs.view(2, -1)
    for t, z in enumerate(zs):
        state, s = m(state, z)
        if t not in (1, 9, 99, 500, 999): continue
        w = torch.exp(-m.decay.double()*torch.arange(t, -1, -1)[:, None])[:, None]
        mean = lambda x: (w*x).sum(0)/w.sum(0)
        a, b = zs[:t+1, :, i].double(), zs[:t+1, :, j].double()
        if measure == 'dot': want = (w*a*b).sum(0)/w.sum(0).sqrt()
        else: want = mean((a-mean(a))*(b-mean(b)))/(mean((a-mean(a))**2)*mean((b-mean(b))**2)).sqrt()
        close(s.double(), want)

def test_correlation_survives_a_long_day():
    m = Sync(torch.tensor([[0, 0, 1], [1, 0, 1]]), 2, 'correlation').requires_grad_(False)
    sums, how, z = unpack(m.init(1)), m.ready(), torch.randn(100, 2)+50
    for _ in range(200):
        for x in z: sums, s = m.step(sums, x[None], how)
    close(s[0], torch.stack([torch.corrcoef(z.T)[0, 1], torch.tensor(1.), torch.tensor(1.)]), 1e-3)

@pytest.mark.parametrize('kind,exact', [*itertools.product(PAIRS, (True, False))])
def test_pairs(kind, exact):
    for seed in range(20):
        p = pairs(kind, 9, 4, generator(seed), exact=exact, selfs=1 if 'random' != kind else 0)
        assert p.shape == (2, 10 if kind in PAIRS[:2] else 4) and p.min() >= 0 and p.max() < 9
        if not exact: assert len({tuple(sorted(x)) for x in p.T.tolist()}) == p.shape[1]
    every = pairs('random-pairing', 9, 36, generator(0))              # all there are
    assert len({tuple(sorted(x)) for x in every.T.tolist()}) == 36 and (every[0] != every[1]).all()

def test_decay_returns_from_beyond_the_clamp():
    m = Sync(torch.tensor([[0, 0], [0, 1]]), 2); m.decay.data.fill_(-.5)
    opt = torch.optim.SGD([m.decay], 1.)
    for _ in range(200):
        state, _ = m(m.init(1), torch.ones(1, 2)); _, s = m(state, torch.full((1, 2), .5))
        opt.zero_grad(); (s-.6).square().sum().backward(); opt.step()
    torch.testing.assert_close(s, torch.full((1, 2), .6), rtol=0, atol=1e-3)
    assert (m.decay > 0).all(), 'a target that needs forgetting pulls it back inside'

# The code itself

def test_no_shortcuts_in_the_core():
    for mod in (nlm, sync, machine, thinker):
        src = Path(mod.__file__).read_text()
        assert len(src.splitlines()) <= 300
        for node in ast.walk(ast.parse(src)):
            if isinstance(node, ast.Attribute): assert node.attr not in ('data', 'item', 'numpy'), f'{mod.__name__} line {node.lineno}: .{node.attr}'
            if isinstance(node, ast.Call): assert getattr(node.func, 'id', '') != 'print', f'{mod.__name__} line {node.lineno}'

def test_errors_name_what_is_wrong():
    m = made()
    for call, words in ((lambda: tiny(regions=5), 'regions'), (lambda: tiny(pairs='some'), 'pairs'), (lambda: tiny(heads=3), 'heads'), (lambda: NLM(6, 4, regions=4), 'regions: got 4'),
                        (lambda: synapse(3, 4, 'deep'), "depth: got 'deep'"), (lambda: m.core(m.init(2), torch.zeros(2, 9)), r'drive: got shape \[2, 9\], expected \[2, 8\]'),
                        (lambda: m(m.init(2), torch.zeros(3, 5, 8)), 'x: got shape'), (lambda: m.keys_values(torch.zeros(2, 5, 8), m.keys_values(torch.zeros(2, 5, 8)), mask=torch.ones(2, 5).bool()), 'mask')):
        with pytest.raises(ValueError, match=words): call()

# What the lines mean, by hand

def test_dropout_is_for_training_only():
    "In use a machine with dropout is the machine without, to the bit; in training it differs from run to run, in every part that has dropout"
    a, b = made(dropout=.5, depth=2).eval(), made(dropout=0., depth=2).eval()
    b.load_state_dict({k: v for k, v in zip(b.state_dict(), a.state_dict().values())})
    x = torch.randn(2, 5, 8)
    assert torch.equal(a(a.init(2), x)[1].logits, b(b.init(2), x)[1].logits)
    seen, q, z = a.keys_values(x), torch.randn(2, a.core.n_synch_action), torch.randn(2, 24)
    parts = (lambda m: m.attend(q, seen.k, seen.v), lambda m: m.core.nlm(torch.randn(2, 24, 5, generator=generator(3))), lambda m: m.core.synapse(torch.cat([x[:, 0], z], -1)))
    for f in parts:
        a.eval(); assert torch.equal(f(a), f(a)) and torch.equal(f(a), f(b))
        a.train(); assert not torch.equal(f(a), f(a))
        b.train(); assert torch.equal(f(b), f(b)), 'without dropout training changes nothing'; b.eval()

def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    l = nlm.NeuronLinear(1, 2, 1, dropout=.25).requires_grad_(False).train()
    l.w.fill_(1.)
    y = l(torch.ones(1, 2, 20000))
    assert y.mean().item() == pytest.approx(2., abs=.03) and sorted(y.unique().tolist()) == pytest.approx([0., 4/3, 8/3])

def starve(core, ticks, n):
    "What the pairs say at the last frame with input, and at n frames without"
    drive = torch.randn(1, 3+n, 8)
    gaps = torch.arange(3+n)[None] >= 3
    s = core.scan(core.init(1), drive, ticks, gaps)[1].sync[0]
    return s[2], s[3:]

@pytest.mark.parametrize('measure', MEASURES)
@pytest.mark.parametrize('ticks', (1, 3))
def test_drift_halves_in_its_half_life(measure, ticks):
    "The first frame without input is one frame old"
    held, gone = starve(made(cls=Core, measure=measure, drift='decay', half_life=2.), ticks, 5)
    assert held.abs().min() > 1e-6
    close(gone, held*torch.tensor([2**-.5, .5, 2**-1.5, .25, 2**-2.5])[:, None])

def test_drift_swings_in_its_period():
    held, gone = starve(made(cls=Core, drift='oscillate', half_life=4., period=4.), 1, 4)
    close(gone, held*torch.tensor([0., -2**-.5, 0., .5])[:, None])
    held, gone = starve(made(cls=Core), 1, 4)
    close(gone, held.expand_as(gone))

def test_idle_ends_with_input():
    core = made(cls=Core, drift='decay', half_life=1.)
    state, _ = core.scan(core.init(1), torch.randn(1, 6, 8), 1, torch.tensor([[0, 1, 1, 0, 1, 1]]).bool())
    assert state.sync.idle.tolist() == [2]

def test_a_history_drops_its_oldest():
    assert nlm.shift(torch.tensor([[[1., 2., 3.]]]), torch.tensor([[4.]])).tolist() == [[[2., 3., 4.]]]

def test_the_newest_that_was_seen_is_kept():
    m = made()
    a, b = torch.randn(2, 3, 8), torch.randn(2, 2, 8)
    seen = m.keys_values(b, m.keys_values(a), keep=3)
    close(seen.k, torch.cat([m.keys_values(a).k[:, :, 2:], m.keys_values(b).k], 2)); close(seen.v, torch.cat([m.keys_values(a).v[:, :, 2:], m.keys_values(b).v], 2))

def test_the_usual_by_hand():
    "Two frames of sound, of which the first is kept by a half; then silence, which counts for nothing and fades by its own rate"
    s = update(init_sums(1, 1), torch.tensor([[4.]]), torch.tensor([1.]), .5, .1)
    s = update(s, torch.tensor([[6.]]), torch.tensor([1.]), .5, .1)
    assert (s.count.item(), s.total.item(), s.square.item()) == pytest.approx((1.5, 8., 44.))
    mean, var = mean_var(s, prior=.5)                                 # as if half a frame of N(0,1) had come before
    assert (mean.item(), var.item()) == pytest.approx((4., 44.5/2-16))
    s = update(s, torch.tensor([[9.]]), torch.tensor([0.]), .5, .1)
    assert (s.count.item(), s.total.item(), s.square.item()) == pytest.approx((.15, .8, 4.4))

def test_steps_and_views_by_hand():
    x, new = torch.tensor([[[1.], [4.], [2.]]]), torch.tensor([[False, False, True]])
    assert with_steps(torch.tensor([[3.]]), x, new).tolist() == [[[1., 2.], [4., 3.], [2., 0.]]]
    assert pool_parts(torch.tensor([1., 10., 3., 20., 8., 0.]), 3).tolist() == [4., 10., 3.5, 15.], 'mean of three parts, and mean size of the two steps'

def test_certainty_of_heads_by_hand():
    assert most_certain('ce', torch.tensor([.2, .5, .3]).log()).item() == pytest.approx(.5)
    assert most_certain('bce', torch.logit(torch.tensor([.1, .7]))).item() == pytest.approx(.7), 'the less certain of two questions'
    p = torch.tensor([.8])
    assert calibrate(p, torch.tensor([[1., 0.]])).item() == pytest.approx(.8) and calibrate(p, torch.tensor([[.5, 0.]])).item() == pytest.approx(2/3)
    assert calibrate(p, torch.tensor([[1., -math.log(4)]])).item() == pytest.approx(.5)
    g = generator(0)
    said = torch.rand(4000, generator=g)*.98+.01
    right = torch.rand(4000, generator=g) < torch.sigmoid(.5*torch.logit(said)-.7)
    assert fit_platt(said, right) == pytest.approx((.5, -.7), abs=.1)
