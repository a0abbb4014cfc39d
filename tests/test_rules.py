"Rules of writing, reading and shaping under any config: rows never mix, skips keep the bits, saved states go on, nothing turns NaN"
import math, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from chronomem.core import load_state, save_state
from chronomem.ladder.bridges import BRIDGES
from chronomem.ladder.ladder import LadderConfig, LadderState, WriteLog
from chronomem.ladder.rungs import GATES
from chronomem.ladder.reading import ReadingConfig, count_read
from chronomem.ladder.shaping import ShapingConfig, info_nce, memory_gap, nested, orthogonality, unexplained, width_by_entropy, written_from
from chronomem.ladder.vision_ladder import Attend, newest
from chronomem.ladder.build import LadderOptions, build_ladder
from chronomem.ladder.writing import EVICT, POLICIES, WritingConfig, collect, delta_kl, entropy, entropy_rise, least_used, novelty, reinforce, track
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import add_memory, tiny_lm
from chronomem.backbone.episodes import unroll
from chronomem.learn.tasks import VOCAB, TASKS
from chronomem.learn.train import TrainConfig, Trainer
from chronomem.core import generator

D_IN, D_OUT = 6, 4
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

@st.composite
def ladders(draw):
    n = draw(st.integers(1, 3))
    c = LadderConfig(taus=(1, 3, 7)[:n], dims=(5, 6, 4)[:n], slots=draw(st.tuples(*[st.integers(1, 3)]*n)), phases=(0, 1, 2)[:n], tokens=draw(st.integers(1, 2)), hidden=8, learned=draw(st.booleans()))
    when = draw(st.one_of(st.just(()), st.tuples(*[st.sampled_from(POLICIES)]*n)))
    writing = WritingConfig(when=when, gated=draw(st.booleans()), score=draw(st.sampled_from(('novelty', 'reconstruction', 'hint'))),
                            promote=draw(st.integers(0, 2)) if 'surprise' in when else 0, evict=draw(st.sampled_from(EVICT)), feed=draw(st.booleans()))
    shaping = ShapingConfig(bits=draw(st.sampled_from((0, 4, 8))), quantise_from=draw(st.sampled_from((1, 64))), recon=draw(st.sampled_from((0., .2))))
    rules = LadderOptions(writing, ReadingConfig(attend=draw(st.booleans()), decay=draw(st.booleans())), shaping, draw(st.sampled_from((*BRIDGES,))))
    torch.manual_seed(draw(st.integers(0, 99)))
    return build_ladder(c, rules, D_IN, D_OUT).requires_grad_(False)

def flat(s): return dict(s.to_tensordict().items(True, True))

@quick
@given(ladders(), st.sampled_from(GATES))
def test_rows_skips_and_saved_states(tmp_path, m, gate):
    h, hint = torch.randn(3, 12, D_IN), torch.rand(3, 12)
    live = torch.rand(3, 12) < .8
    s = m.init(3)
    for i in range(12):
        torch.manual_seed(i); new, log = m.write(s, h[:, i], live[:, i], gate, hint[:, i])
        for j, n in enumerate(m.rungs):
            a, b = s.rungs[n], new.rungs[n]
            kept = b['born'] == a['born']
            assert torch.equal((~kept).sum(1), log.open[:, j].long())
            assert torch.equal(b['z'][kept], a['z'][kept])
        assert not (log.open & ~log.due).any() and not (log.early & ~log.due).any() and not (log.due & ~live[:, i, None]).any()
        s = new
    soft, mask = m.read(s, h[:, 0])
    assert soft.isfinite().all() and not soft.masked_select(~mask[..., None] & (torch.tensor(m.asks))).isnan().any()
    save_state(tmp_path/'s', s, {})
    back = load_state(tmp_path/'s', LadderState)[0]
    torch.manual_seed(0); one = m.write(s, h[:, 0], None, gate, hint[:, 0])[0]
    torch.manual_seed(0); two = m.write(back, h[:, 0], None, gate, hint[:, 0])[0]
    assert all(torch.equal(v, flat(two)[k]) for k, v in flat(one).items())
    if gate != 'sample':
        alone = m.write(s[1:2], h[1:2, 0], None, gate, hint[1:2, 0])[0]
        for k, v in flat(alone).items(): torch.testing.assert_close(v, flat(one)[k][1:2], rtol=1e-4, atol=1e-4)

@quick
@given(ladders())
def test_promotions_are_few_and_rested(m):
    w = m.writing
    if not getattr(w, 'config', None) or not w.config.promote: return
    s, h, told, score = m.init(2), torch.randn(2, 40, D_IN), [], w.score
    def noted(rung, state, new, now):
        u = score(rung, state, new, now)
        told.append((u > w.config.margin*state['usual']) & (w.when[rung.i] == 'surprise'))
        return u
    w.score = noted
    for i in range(40):
        before, told[:] = {n: s.rungs[n, 'born'].max(1).values for n in m.rungs}, []
        s, log = m.write(s, h[:, i], gate='always', hint=torch.rand(2))
        surprised = torch.stack(told, 1)
        for j, (n, r) in enumerate(m.rungs.items()):
            early = log.early[:, j]
            assert not early.any() or surprised[early, :j].any(1).all(), 'only above a surprised rung'
            assert ((i - before[n] >= max(1, r.tau//2)) | (before[n] < 0))[early].all()
        assert (log.early.sum(1) <= w.config.promote*surprised[:, :-1].sum(1)).all(), 'each surprise lets so many write'

# Writing, by hand

def surprised(taus, phases, hints, **kw):
    "What each rung did while the model was told how surprised it was: the log [T,R] of one session whose fastest rung alone is of policy 'surprise'"
    n = len(taus)
    c = LadderConfig(taus=taus, dims=(4,)*n, slots=(1,)*n, phases=phases, hidden=4)
    w = WritingConfig(**dict(when=('surprise', *('clock',)*(n-1)), score='hint', gated=False, promote=1) | kw)
    torch.manual_seed(0)
    m = build_ladder(c, LadderOptions(writing=w), D_IN, D_OUT).requires_grad_(False)
    hint = torch.tensor([hints])
    return m.scan(m.init(1), torch.randn(1, len(hints), D_IN), hint=hint)[1][0]

def yes(x): return ''.join('.x'[int(v)] for v in x)

def test_a_promoted_rung_has_rested_exactly_half_a_cadence():
    log = surprised((1, 4), (0, 1), [1., 1., 9., 9., 9., 9., 9., 9.])
    # at 0 it was never written; due by the clock at 1 and 5; one inference after a write is too soon, two are half of four
    assert yes(log.early[:, 1]) == 'x..x...x'
    assert yes(log.open[:, 1]) == 'xx.x.x.x'
    assert yes(surprised((1, 4), (0, 1), [1., 1., 9., 9., 9., 9., 9., 9.], cooldown=.75).early[:, 1]) == 'x...x...'

@pytest.mark.parametrize('promote, early', [(0, '....'), (1, '.x..'), (2, '.xx.')])
def test_a_surprise_promotes_so_many_rungs_and_no_more(promote, early):
    log = surprised((1, 2, 4, 8), (0, 1, 1, 1), [1.], promote=promote)
    assert yes(log.early[0]) == early and yes(log.open[0]) == 'x' + early[1:]

def test_surprising_is_what_exceeds_the_margin():
    "After one score of 1 the usual is 1: 1.2 is within a quarter of it, 1.3 is not"
    assert [yes(surprised((1, 4), (0, 3), [1., h]).open[:, 0]) for h in (.5, 1.2, 1.3)] == ['x.', 'x.', 'xx']

def test_the_usual_follows_the_scores():
    usual, all_ = torch.tensor([2., 2., 2., 0.]), torch.ones(4, dtype=torch.bool)
    got = track(usual, torch.tensor([9., .1, 2., .7]), all_)
    torch.testing.assert_close(got, torch.tensor([2*1.0512711, 2/1.0512711, 2., .7]))
    assert torch.equal(track(usual, torch.ones(4), ~all_), usual)

def test_novelty_is_the_distance_from_the_nearest():
    new, z = torch.tensor([[1., 0.]]), torch.tensor([[[0., 2.], [3., 3.], [5., 0.]]])
    for born, want in (([0, 1, 2], 0.), ([0, 1, -1], 1-.5**.5), ([0, -1, -1], 1.), ([-1, -1, -1], 1.)):
        torch.testing.assert_close(novelty(new, z, torch.tensor([born])), torch.tensor([want]))
    torch.testing.assert_close(novelty(-new, z[:, 2:], torch.tensor([[0]])), torch.tensor([2.]))

def test_old_and_seldom_read_gives_way():
    "At 20: (2 reads + 1)/(1 + 20 - born)"
    reads, born, t = torch.tensor([[2., 2., 0.]]), torch.tensor([[10, 0, 18]]), torch.tensor([20])   # 3/11, 3/21, 1/3
    assert least_used(reads, born, t).item() == 1
    assert least_used(reads, torch.tensor([[10, 0, -1]]), t).item() == 2, 'an empty slot first'

def test_kl_and_entropy_by_hand():
    p, q = torch.tensor([[[.5, .5], [.9, .1]]]).log(), torch.tensor([[[.25, .75], [.1, .9]]]).log()
    m = torch.tensor([[1, 0]])
    torch.testing.assert_close(delta_kl(p, q, m), torch.tensor([.5*math.log(2) + .5*math.log(2/3)]))
    torch.testing.assert_close(entropy(p, m), torch.tensor([math.log(2)]))
    assert entropy_rise(p, q, m) > 0

def test_policy_gradient_by_hand():
    "Two lives, rewards 1 and 0: each is compared with the other; what was done in the good one becomes likelier"
    p = torch.tensor([[[.6]], [[.6]]], requires_grad=True)
    yes_ = torch.ones(2, 1, 1, dtype=torch.bool)
    log = WriteLog(p=p, open=yes_, due=yes_, early=~yes_, batch_size=[2, 1])
    loss = reinforce(log, torch.tensor([1., 0.]))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.))
    torch.testing.assert_close(p.grad.flatten(), torch.tensor([-.5/.6, .5/.6]))

def counting(taus=(1, 4), slots=(2, 2)):
    "A ladder that counts how often its slots were looked at, and a full state at inference 100"
    n = len(taus)
    torch.manual_seed(0)
    c = LadderConfig(taus=taus, dims=(4,)*n, slots=slots, phases=(0,)*n, hidden=4)
    m = build_ladder(c, LadderOptions(WritingConfig(evict='unread'), ReadingConfig(attend=True, decay=True)), D_IN, D_OUT).requires_grad_(False)
    s = m.init(1); s.t += 100
    for r in s.rungs.values(): r['z'].normal_(); r['born'].fill_(90)
    return m, s

def test_a_slot_goes_after_so_many_cadences():
    m, s = counting()
    s.rungs['tau1', 'born'][0] = torch.tensor([92, 91])              # 8 and 9 inferences ago, of a cadence of 1
    s.rungs['tau4', 'born'][0] = torch.tensor([68, 67])              # 32 and 33, of a cadence of 4
    left = collect(m, s, older=8.)
    assert left.rungs['tau1', 'born'][0].tolist() == [92, -1] and left.rungs['tau4', 'born'][0].tolist() == [68, -1]
    assert left.rungs['tau4', 'z'][0, 0].any() and not left.rungs['tau4', 'z'][0, 1].any()
    s.rungs['tau4', 'reads'][0] = .34                                # more than .01 per inference
    assert collect(m, s, older=8.).rungs['tau4', 'born'][0].tolist() == [68, 67], 'what is read stays'

# Reading, by hand

def test_a_read_minds_neither_size_nor_shift_of_the_question():
    m, s = counting()
    q = torch.randn(1, D_IN)
    one, two = count_read(m, s, q), count_read(m, s, 50*q+7)
    for n in m.rungs:
        w = one.rungs[n, 'reads']
        torch.testing.assert_close(w.sum(1), torch.ones(1)); assert (w[0, 0]-w[0, 1]).abs() > 1e-3, 'it prefers one'
        torch.testing.assert_close(two.rungs[n, 'reads'], w, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(count_read(m, one, q).rungs[n, 'reads'], 2*w)

def test_age_fades_what_is_read():
    m, s = counting(slots=(3, 3))
    for r in s.rungs.values(): r['born'][0] = torch.tensor([99, 60, -1])
    for r in m.rungs.values():
        w = m.reading.weights(r, s.rungs[f'tau{r.tau}'], s.t)[0]
        d = math.log1p(math.exp(-1))                                  # softplus of the first delta, -1
        a, b = (1 + 1/r.tau)**-d, (1 + 40/r.tau)**-d
        torch.testing.assert_close(w, torch.tensor([a/(a+b), b/(a+b), 0.]))

# Shaping, by hand

def test_wishes_point_the_right_way():
    one = lambda *x: torch.tensor(x)
    assert memory_gap(one(1.), one(3.), .5) == 0 and memory_gap(one(3.), one(3.), .5) == .5 and memory_gap(one(3.), one(1.), .5) == 2.5
    torch.testing.assert_close(width_by_entropy(one(1., 2., 9., .1), 4.), one(.25, .5, 1., .25))
    z = torch.tensor([[3., 4., 5., 6.]])
    torch.testing.assert_close(nested(z, one(.5)), torch.tensor([[1.2, 1.6, 0., 0.]]))
    torch.testing.assert_close(nested(z, one(.6))[0, 3], torch.tensor(0.)); assert nested(z, one(.6))[0, 2] > 0, 'a part of an element is kept whole'
    torch.testing.assert_close(unexplained(torch.zeros(1, 4), z), one(1.)); assert unexplained(z, z) == 0
    a = torch.eye(3)
    assert info_nce(a, a) < 1e-3 < 5 < info_nce(a, a.roll(1, 0))
    born = torch.tensor([[0, 1]]).expand(2, 2)
    apart, alike = torch.tensor([[[1., 0.], [0., 1.]], [[-1., 0.], [0., -1.]]]), torch.tensor([[[1., 0.], [1., 0.]], [[-1., 0.], [-1., 0.]]])
    torch.testing.assert_close(torch.stack([orthogonality(apart, born), orthogonality(alike, born)]), one(0., 1.))

def test_the_input_of_a_slot_is_found_by_the_clock():
    "Clock 5 before a window of four, the second of which is not lived: inferences 5, 6 and 7 are its first, third and fourth"
    h, live = torch.arange(4.)[None, :, None], torch.tensor([[True, False, True, True]])
    x, there = written_from(h, torch.tensor([[5, 6, 7, 4, -1]]), torch.tensor([5]), live)
    assert x[0, :3, 0].tolist() == [0., 2., 3.] and there.tolist() == [[True, True, True, False, False]]

def test_near_in_time_is_attended_first():
    torch.manual_seed(0)
    m = Attend(4, 2).requires_grad_(False)
    m.q.weight.zero_(); m.v.weight.copy_(torch.eye(4)); m.o.weight.copy_(torch.eye(4))
    y = torch.tensor([[[1., 1., 1., 1.], [-1., -1., -1., -1.]]])
    out = m(torch.zeros(1, 1, 4), y, torch.ones(1, 2, dtype=torch.bool), torch.tensor([[[0., 30.]]]))
    assert (out > .3).all(), 'mostly the first, which is of the same moment'
    assert newest((y, torch.tensor([[True, True]]), torch.tensor([[3, 8]])), 2)[2].tolist() == [[8, 3]]

@pytest.mark.parametrize('rules', [dict(), dict(writing=dict(when=('surprise',)*2, promote=1)), dict(reading=dict(attend=True, decay=True), writing=dict(evict='unread')),
    dict(shaping=dict(recon=.2, contrast=.2, ortho=.1, entropy=.01, tax=.1, gap=.1, critic=.1, bits=8, quantise_from=1)), dict(bridge='hier_ae'), dict(bridge='attention'),
    dict(writing=dict(when=('surprise', 'clock'), score='hint', feed=True), shaping=dict(width=True))])
@pytest.mark.parametrize('train', [dict(), dict(window=3, replay=True), dict(unlock=True, reward=.1, learn_first=False)])
def test_every_rule_trains_behind_a_language_model(rules, train, tmp_path):
    c = MemoryConfig(ladder=LadderConfig(taus=(1, 2), dims=(8, 8), slots=(2, 1), phases=(0, 1), hidden=8), rules=LadderOptions.from_dict(rules), n_mem=1)
    m = add_memory(tiny_lm('llama', vocab=len(VOCAB), d=16, layers=1), c, train_backbone=True)
    t = Trainer(m, lambda n, g: TASKS['passkey'][0](8, n, g), TrainConfig(lengths=(1, 4), updates=3, settle=1, **train), tmp_path)
    t.fit(progress=False)
    assert all(p.isfinite().all() for p in m.parameters())
    again = Trainer(add_memory(tiny_lm('llama', vocab=len(VOCAB), d=16, layers=1), c, train_backbone=True), t.make, t.config, tmp_path).load()
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), again.model.parameters()))
    m.save_pretrained(tmp_path/'m', backbone=True)
    back = type(m).from_pretrained(tmp_path/'m')
    ep = TASKS['passkey'][0](4, 3, generator(0))
    with torch.no_grad(): a, b = (unroll(x.eval(), ep)[1]['loss'] for x in (m, back))
    torch.testing.assert_close(a, b)
