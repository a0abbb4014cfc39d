"The sighted ladder against plain formulas, and what must always hold: missing senses, rows that never mix, gradients"
import math, pytest, torch, torch.nn as nn, torch.nn.functional as F
from fastcore.test import test_close as close, test_eq as eq
from chronomem.core import seed_all
from chronomem.ladder.ladder import CadenceLadder, LadderConfig
from chronomem.ladder.vision_ladder import CoAttend, Concat, VisionLadderConfig, VisionLadder, moments, own_tokens

def small(join='coattend', tau=64, **kw):
    "Three rungs' worth of sight, always the same weights"
    seed_all(0)
    shape = dict(dims=(8, 12), slots=(1, 2), hidden=16)
    language = CadenceLadder(LadderConfig(taus=(1, tau), phases=(0, 1), **shape), 10, 6)
    vision = LadderConfig(taus=(1, 2*tau), phases=(0, 3), **shape)
    return VisionLadder(VisionLadderConfig(vision=vision, join=join, width=16, from_tau=tau, **kw), language, 7, 6)

def same(a, b):
    b = b.to_tensordict()
    return all(torch.equal(v, b[k]) for k, v in a.to_tensordict().items(True, True))

@pytest.fixture
def life():
    "Hidden states and frames of twelve inferences, and the state after 130"
    m = small()
    h, frames = torch.randn(3, 130, 10), torch.randn(3, 130, 2, 7)
    with torch.no_grad(): end, _, _ = m.scan(m.init(3), h, frames, gate='always')
    return h[:, :12], frames[:, :12], end

def test_configs():
    c = VisionLadderConfig.from_dict(dict(width=32, vision=dict(taus=[1, 128], dims=[8, 8], slots=[1, 2], phases=[0, 1])))
    assert VisionLadderConfig.from_dict(c.to_dict()) == c and c.vision.taus == (1, 128)
    with pytest.raises(ValueError, match='multiple of heads = 4'): VisionLadderConfig(width=30)
    with pytest.raises(ValueError, match=r"expected one of \['none', 'concat', 'coattend'\]"): VisionLadderConfig(join='sum')

def test_moments_by_hand():
    live = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    clock = torch.tensor([[7, 7, 8, 8], [3, 3, 4, 4]])
    born, start = torch.tensor([[28, 31, -1], [10, 11, 9]]), torch.tensor([28, 10])
    at = torch.tensor([[5, 5, -1], [2, 2, 2]])
    eq(moments(at, born, start, live, clock), torch.tensor([[7, 8, -1], [3, 4, 2]]))

def view(x, at): return torch.tensor(x)[None, :, None].expand(1, -1, 4), torch.tensor([at]) >= 0, torch.tensor([at])

def test_concat_without_its_mlp_adds_the_newest():
    with torch.no_grad():
        join = Concat(3, 2, 4)
        join.mlp[-1].weight.zero_()
        join.mlp[-1].bias.zero_()
        x, held, at = join(view([1., 0., 2.], [5, -1, 9]), view([0., 10.], [-1, 4]))
    eq((x[0, :, 0], held[0], at[0]), (torch.tensor([12., 1., 0.]), torch.tensor([True, True, False]), torch.tensor([9, 5, 0])))

def slowly(m, x, y, held, apart):
    "`Attend`, slot by slot and head by head"
    q, k, v = m.q(x).view(-1, 2, 4), m.k(y).view(-1, 2, 4), m.v(y).view(-1, 2, 4)
    s = F.softplus(m.slope)
    w = torch.stack([torch.exp((q[:, h] @ k[:, h].T)/2)*(1+apart)**-s[h]*held for h in range(2)], 1)
    w = w/w.sum(-1, keepdim=True).clamp(min=1e-9)
    return x + m.o(torch.einsum('ihj,jhd->ihd', w, v).flatten(1))

def test_co_attention_is_its_formula():
    "Three slots look at two; in the first life one of these is empty, in the last both"
    seed_all(0)
    x, y, s, t = torch.randn(3, 3, 8), torch.randn(3, 2, 8), torch.randint(99, (3, 3)), torch.randint(99, (3, 2))
    join = CoAttend(3, 2, 8, 2)
    m, n = torch.rand(3, 3) < .7, torch.tensor([[1, 0], [1, 1], [0, 0]]).bool()
    d = (s[:, :, None]-t[:, None]).abs()
    with torch.no_grad():
        got = join((x, m, s), (y, n, t))[0]
        look = [slowly(join.look, x[i], y[i], n[i], d[i]) for i in range(3)]
        listen = [slowly(join.listen, y[i], x[i], m[i], d[i].T) for i in range(3)]
    close(got, torch.cat([torch.stack(look), torch.stack(listen)], 1), 1e-5)
    eq(got[2, :3], x[2])

class Brief(CadenceLadder):
    "Its reading leaves out the first token"
    def read(self, state, h=None): return tuple(o[:, 1:] for o in super().read(state))

def test_own_tokens_are_asked_of_the_ladder():
    m = small(tau=64)
    brief = Brief(m.language.config, 10, 6)
    eq([own_tokens(l, t) for l in (m.language, brief) for t in (1, 64, 65)], [0, 1, 3, 0, 0, 2])

def test_errors_say_what_came(life):
    (h, frames, end), m = life, small(tau=4)
    with pytest.raises(ValueError, match=r'frame: got shape \[3, 9\], expected \[B, d_vision\] = \[3, 7\]'):
        m.write_vision(end, torch.randn(3, 9))
    with pytest.raises(ValueError, match=r"got shape \[3, 11, 2, 7\], expected \[B, T, N, d_vision\] = \[3, 12, 'N', 7\]"):
        m.scan(end, h, frames[:, 1:])
    fast = CadenceLadder(LadderConfig(taus=(1, 4), dims=(8, 8), slots=(1, 1), phases=(0, 1)), 10, 6)
    with pytest.raises(ValueError, match=r"language: got rungs \['tau1', 'tau4'\], expected one with tau >= from_tau = 64"):
        VisionLadder(VisionLadderConfig(), fast, 7, 6)

@pytest.mark.parametrize('join', ['concat', 'coattend'])
def test_a_sense_that_is_missing_is_only_missing(life, join):
    (h, frames, _), m = life, small(join, 4).requires_grad_(False)
    blind = torch.tensor([True, False, True])
    dark = frames.masked_fill(blind[:, None, None, None], math.nan)
    s = m.scan(m.init(3), h, dark, sees=~blind[:, None, None].expand(3, 12, 2), gate='always')[0]
    soft, mask = m.read(s)
    assert same(m.write_vision(s, frames[:, 0, 0].masked_fill(blind[:, None], math.nan), ~blind)[0][blind], s[blind])
    eq(s.vision.t, torch.tensor([0, 24, 0]))
    assert soft.isfinite().all() and mask[:, 2:].any(1).all()
    full, bad = m.fusion(s)[0], s.clone()
    bad.vision.rungs['tau8', 'z'][blind] = math.nan
    assert torch.equal(m.fusion(bad)[0], full), 'what an empty slot contains has no influence'
    nothing, held = m.fusion(m.init(3))
    assert nothing.isfinite().all() and not held.any()
    if join == 'coattend':
        m.fusion.joins[0].look.v.weight.mul_(-9)
        eq((m.fusion(s)[0] == full)[:, :2].all((1, 2)), blind)

@pytest.mark.parametrize('join', ['none', 'concat', 'coattend'])
def test_rows_never_mix(life, join):
    (_, _, end), m = life, small(join).requires_grad_(False)
    swapped, order = end.clone(), torch.tensor([2, 1, 0])
    swapped.vision, swapped.at = end.vision[order], end.at[order]
    eq((m.read(swapped)[0] == m.read(end)[0]).all((1, 2)), torch.tensor([False, True, False]))
    close(m.read(end[order])[0], m.read(end)[0][order], 1e-6)

@pytest.mark.parametrize('join', ['concat', 'coattend'])
def test_both_ladders_learn_from_what_is_fused(life, join):
    (h, frames, _), m = life, small(join, 4)
    s = m.scan(m.init(3), h, frames, gate='sample')[0]
    rungs = *m.language.rungs.values(), *m.vision.rungs.values()
    for loss in ((m.fusion(s)[0]-1).pow(2).sum(), m.align(s)):
        m.zero_grad()
        loss.backward(retain_graph=True)
        assert all(r.enc[0].weight.grad.norm() > 0 for r in rungs)
    m.zero_grad()
    ((m.fusion(s)[0]-1).pow(2).sum() + m.align(s)).backward()
    assert [n for n, p in m.fusion.named_parameters() if p.grad is None or not p.grad.norm() > 0] == []
