"What notebook 32_convergence can't show: any shape, any pattern of missing labels, any config; rows never mix"
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from chronomem.thought.convergence import *

quick = settings(max_examples=40)
seeds, sizes = st.integers(0, 2**31), st.integers(1, 6)

def thoughts(seed, B, T, P, C, missing=.3):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (B, P), generator=g).masked_fill(torch.rand(B, P, generator=g) < missing, -1)
    return torch.randint(-3, 4, (B, T, P, C), generator=g).float().requires_grad_(), y                # whole numbers: ties are common

def one_by_one(x, y, second):
    rows = [(x[b][:, y[b] >= 0], y[b][y[b] >= 0], b) for b in range(len(x)) if (y[b] >= 0).any()]
    if not rows: return torch.tensor(0.)
    L = [torch.stack([F.cross_entropy(x[t], y) for t in range(len(x))]) for x, y, _ in rows]
    return (torch.stack([l[l.tolist().index(l.min())] for l in L]).mean() + torch.stack([l[second(b)] for l, (*_, b) in zip(L, rows)]).mean())/2

@quick
@given(seeds, sizes, sizes, sizes, st.integers(2, 5), st.sampled_from((0., .4, 1.)))
def test_two_ticks_equal_a_loop(seed, B, T, P, C, missing):
    x, y = thoughts(seed, B, T, P, C, missing)
    sure = certainty(x).detach()
    assert sure.shape == (B, T) and (sure > -1e-5).all() and (sure < 1+1e-5).all()
    first = lambda b: sure[b].tolist().index(sure[b].max())
    torch.testing.assert_close(two_tick(x, y), one_by_one(x, y, first), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last_tick(x, y), one_by_one(x, y, lambda b: T-1), rtol=1e-5, atol=1e-6)
    two_tick(x, y).backward()
    assert x.grad.isfinite().all() and not x.grad.transpose(1, 2)[y < 0].any()
    assert ((x.grad.abs().sum((2, 3)) > 0).sum(1) <= 2).all()

def official_maze(predictions, certain, targets, ahead):
    "CTM's rule, sample by sample"
    total = 0
    for x, c, y in zip(predictions, certain, targets):                 # x [T,P,C]
        n = max(next((i for i in range(len(y)) if x[t].argmax(-1)[i] != y[i]), len(y)) for t in range(len(x)))
        upto = min(max(n, 1)-1+ahead, len(y))
        L = torch.stack([F.cross_entropy(x[t, :upto], y[:upto]) for t in range(len(x))])
        total = total + (L.min() + L[c.argmax()])/2
    return total/len(predictions)

@quick
@given(seeds, sizes, sizes, st.integers(1, 12), st.integers(1, 6))
def test_curriculum_equals_a_loop(seed, B, T, P, ahead):
    x, y = thoughts(seed, B, T, P, 3, 0.)
    loss, upto = prefix_curriculum(x, y, ahead)
    torch.testing.assert_close(loss, official_maze(x, certainty(x), y, ahead), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert not x.grad.transpose(1, 2)[torch.arange(P) >= upto[:, None]].any()

@st.composite
def configs(draw):
    kinds = draw(st.lists(st.sampled_from(('bce', 'ce', 'mse')), min_size=1, max_size=4))
    fs = [Feature(f'f{i}', k, draw(st.integers(0, 6)), draw(st.sampled_from((.5, 1., 2.)))) for i, k in enumerate(kinds)]
    return ConvergenceConfig(tuple(fs), adaptive=draw(st.sampled_from((0., .3, 1.))), shared=draw(st.booleans()), early=draw(st.sampled_from((0., 1.))))

def labelled(c, seed, B, T, missing):
    g = torch.Generator().manual_seed(seed)
    pred = {f.name: torch.randn(B, T, 3, generator=g, requires_grad=True) for f in c.features}
    y = {f.name: torch.randint(3, (B, T), generator=g) if f.kind == 'ce' else torch.randint(2, (B, T, 3), generator=g).float() for f in c.features}
    return pred, {k: v.masked_fill(torch.rand(v.shape, generator=g) < missing, math.nan if v.is_floating_point() else -1) for k, v in y.items()}

@quick
@given(configs(), seeds, sizes, st.integers(1, 9), st.sampled_from((0., .4, 1.)))
def test_missing_labels_never_count(c, seed, B, T, missing):
    m, (pred, y) = AdaptiveConvergenceLoss(c), labelled(c, seed, B, T, missing)
    loss, parts = m(pred, y)
    loss.backward()
    assert loss.isfinite() and loss.grad_fn is not None and all(p.grad is None or p.grad.isfinite().all() for p in pred.values())
    if missing == 1: assert loss == 0
    if c.early: return                                                 # its certainty may rest on a feature without a label
    for f in c.features:
        x, v = pred[f.name], y[f.name]
        gone = (v < 0)[..., None].expand_as(x) if f.kind == 'ce' else v.isnan()
        assert not x.grad[gone].any()
    if not c.adaptive: assert all(not pred[f.name].grad[:, :f.step].any() for f in c.features)

@quick
@given(configs(), seeds, st.integers(1, 4), st.integers(1, 9))
def test_rows_never_mix(c, seed, B, T):
    "Every row is labelled alike, so the loss of a batch is the mean of its rows'"
    m, (pred, y) = AdaptiveConvergenceLoss(c), labelled(c, seed, B, T, 0.)
    rows = [m({k: v[b:b+1] for k, v in pred.items()}, {k: v[b:b+1] for k, v in y.items()}) for b in range(B)]
    loss, parts = m(pred, y)
    torch.testing.assert_close(loss, torch.stack([l for l, _ in rows]).mean(), rtol=1e-4, atol=1e-6)
    assert torch.equal(parts['best'], torch.cat([p['best'] for _, p in rows]))

@quick
@given(seeds, st.integers(1, 50))
def test_measures_equal_their_definitions(seed, n):
    g = torch.Generator().manual_seed(seed)
    p, right = torch.randint(0, 6, (n,), generator=g)/5, torch.rand(n, generator=g) < .5
    a, b = p[right], p[~right]
    pairs = (a[:, None] > b).float() + .5*(a[:, None] == b)
    assert auroc(p, right).isnan() if not pairs.numel() else abs(auroc(p, right)-pairs.mean()) < 1e-5
    slow = sum(abs(p[k].mean()-right[k].float().mean())*k.sum()/n for i in range(4) for k in [(p*4).long().clamp(max=3) == i] if k.any())
    torch.testing.assert_close(ece(p, right, 4), torch.as_tensor(slow), rtol=1e-4, atol=1e-6)
    coverage, risk = risk_coverage(p, right)
    assert coverage[-1] == 1 and abs(risk[-1]-(~right).float().mean()) < 1e-6
    done = torch.rand(3, n, generator=g) < .8
    slow = [next((t for t in range(n) if done[b, t:].all()), math.inf) for b in range(3)]
    assert time_to_convergence(done).tolist() == slow

# What the lines mean, by hand

def even(p): return torch.tensor([p, 1-p]).log()

def test_certainty_by_hand():
    "One minus the entropy in bits of two classes"
    h = lambda p: -(p*math.log2(p) + (1-p)*math.log2(1-p))
    x = torch.stack([even(.5), even(.9), even(.01)])[None]            # [1,3,2]
    torch.testing.assert_close(certainty(x), torch.tensor([[0., 1-h(.9), 1-h(.01)]]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(certainty(torch.logit(torch.tensor([[[.5], [.9]]])), 'bce'), torch.tensor([[0., 1-h(.9)]]), rtol=1e-4, atol=1e-5)

def loss_of(fs, **kw): return AdaptiveConvergenceLoss(ConvergenceConfig(fs, **kw))

def test_pooled_certainty_is_of_those_that_have_one():
    "Weights 1 and 3, and a third feature of numbers, whose certainty is none: (1·a + 3·b)/4"
    m = loss_of((Feature('a', 'ce', 0, 1.), Feature('b', 'ce', 0, 3.), Feature('n', 'mse', 0, 4.)))
    L, M = torch.ones(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)
    sure = torch.tensor([[[.8, .4, -math.inf], [.2, .6, -math.inf]]])
    w = torch.tensor([1., 3., 4.])
    torch.testing.assert_close(m._pooled(L, M, sure, w)[2][..., 0], torch.tensor([[.5, .5]]))
    torch.testing.assert_close(m._pooled(L, M, torch.full_like(sure, -math.inf), w)[2][..., 0], torch.zeros(1, 2))
    L = torch.tensor([[[2., 4., 8.], [0., 4., 0.]]]); M = torch.tensor([[[True, True, False], [False, True, False]]])
    loss, has, _, _ = m._pooled(L, M, sure, w)                         # (2 + 12)/4, and the one that has a label
    torch.testing.assert_close(loss[..., 0], torch.tensor([[3.5, 4.]])); assert has.all()
    assert not m._pooled(L, torch.zeros_like(M), sure, w)[1].any()

@pytest.mark.parametrize('shared', (True, False))
def test_the_surest_tick_is_one_with_a_label(shared):
    "Most certain at tick 2, which nobody labelled; of the others tick 1 is surer, tick 0 is best"
    m = loss_of((Feature('a', 'ce', 0),), shared=shared, adaptive=1.)
    x = torch.stack([even(.9), even(.05), even(.999)])[None]           # the answer is the first class
    loss, parts = m(dict(a=x), dict(a=torch.tensor([[0, 0, -1]])), sure=torch.tensor([[.1, .5, .9]]))
    assert parts['best'].flatten().tolist() == [0] and parts['surest'].flatten().tolist() == [1]
    assert loss.item() == pytest.approx(-(math.log(.9) + math.log(.05))/2, rel=1e-4)
    loss, parts = m(dict(a=x), dict(a=torch.tensor([[-1, 0, 0]])), sure=torch.tensor([[.9, .5, .1]]))
    assert parts['best'].flatten().tolist() == [2] and parts['surest'].flatten().tolist() == [1]

def test_what_is_expected_when():
    m = loss_of((Feature('a', 'bce', 0), Feature('b', 'bce', 2)), after=.3)
    torch.testing.assert_close(m.expected(torch.arange(4)), torch.tensor([[1., 0.], [.3, 0.], [.3, 1.], [.3, .3]]))

def test_stopping_early_by_hand():
    "Certainties that say with odds of e when to stop; waiting to the end costs .3"
    losses, sure = torch.tensor([[1., .5, .25]]), torch.tensor([[0., .1, .1]])
    w = torch.tensor([1., math.e, math.e])/(1+2*math.e)
    torch.testing.assert_close(early(losses, sure), (w*torch.tensor([1., .65, .55])).sum())
    torch.testing.assert_close(early(losses, sure, has=torch.tensor([[True, True, False]])), (1. + math.e*.65)/(1+math.e)*torch.tensor(1.))

def test_a_temperature_undoes_a_factor():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3, generator=g)*2
    y = torch.multinomial(x.softmax(-1), 1, generator=g)[:, 0]
    assert abs(fit_temperature(3*x, y)-3) < .2
