"What is put among a model's embeddings must be as large as they are, whatever a family does to them on the way"
import pytest, torch
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import add_memory, tiny_lm
from chronomem.ladder.ladder import LadderConfig

def rms(x): return x.detach().float().pow(2).mean().sqrt().item()

@pytest.mark.parametrize('kind', ['ladder', 'recurrent'])
@pytest.mark.parametrize('family', ['llama', 'gemma3_text'])
def test_mem_tokens_and_soft_tokens_are_as_large_as_embeddings(family, kind):
    "gemma3's embeddings leave their table multiplied by the root of the width"
    lm = tiny_lm(family, vocab=300, d=64, layers=1)
    size = rms(lm.get_input_embeddings()(torch.arange(1, 300)))
    if family == 'gemma3_text': assert size > 7*rms(lm.get_input_embeddings().weight), 'the factor of 8 is on the way'
    torch.manual_seed(0)
    m = add_memory(lm, MemoryConfig(kind=kind, n_mem=8, ladder=LadderConfig(taus=(1,), dims=(64,), slots=(1,), phases=(0,), hidden=8)))
    assert rms(m.mem) == pytest.approx(size, rel=.15)
    assert m.memory.scale.item() == pytest.approx(10*size, rel=.05), 'ten times, as soft tokens begin with a factor of a tenth'
    if kind == 'ladder':
        s = m.memory.write(m.memory.init(1), torch.randn(1, 8*64), gate='always')[0]
        assert .3 < rms(m.memory.read(s)[0])/size < 3
