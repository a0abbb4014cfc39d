"Rules of writing, reading and shaping under any config: rows never mix, skips keep the bits, saved states go on, nothing turns NaN"
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from chronomem.core import load_state, save_state
from chronomem.ladder.bridges import BRIDGES
from chronomem.ladder.ladder import GATES, LadderConfig, LadderState
from chronomem.ladder.reading import ReadingConfig
from chronomem.ladder.shaping import ShapingConfig
from chronomem.ladder.whole import LadderRules, make_ladder
from chronomem.ladder.writing import EVICT, POLICIES, WritingConfig
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import add_memory, tiny_lm
from chronomem.learn.tasks import VOCAB, TASKS, unroll
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
    rules = LadderRules(writing, ReadingConfig(attend=draw(st.booleans()), decay=draw(st.booleans())), shaping, draw(st.sampled_from((*BRIDGES,))))
    torch.manual_seed(draw(st.integers(0, 99)))
    return make_ladder(c, rules, D_IN, D_OUT).requires_grad_(False)

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
    s, h, last = m.init(2), torch.randn(2, 40, D_IN), {}
    for i in range(40):
        before = {n: s.rungs[n, 'born'].max(1).values for n in m.rungs}
        s, log = m.write(s, h[:, i], gate='always', hint=torch.rand(2))
        assert (log.early.sum(1) <= 2*(len(m.rungs)-1)).all() and not log.early[:, 0].any()
        for j, (n, r) in enumerate(m.rungs.items()):
            early = log.early[:, j]
            assert ((i - before[n] >= max(1, r.tau//2)) | (before[n] < 0))[early].all()

@pytest.mark.parametrize('rules', [dict(), dict(writing=dict(when=('surprise',)*2, promote=1)), dict(reading=dict(attend=True, decay=True), writing=dict(evict='unread')),
    dict(shaping=dict(recon=.2, contrast=.2, ortho=.1, entropy=.01, tax=.1, gap=.1, critic=.1, bits=8, quantise_from=1)), dict(bridge='hier_ae'), dict(bridge='attention'),
    dict(writing=dict(when=('surprise', 'clock'), score='hint', feed=True), shaping=dict(width=True))])
@pytest.mark.parametrize('train', [dict(), dict(window=3, replay=True), dict(unlock=True, reward=.1, learn_first=False)])
def test_every_rule_trains_behind_a_language_model(rules, train, tmp_path):
    c = MemoryConfig(ladder=LadderConfig(taus=(1, 2), dims=(8, 8), slots=(2, 1), phases=(0, 1), hidden=8), rules=LadderRules.from_dict(rules), n_mem=1)
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
