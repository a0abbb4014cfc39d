"Every kind of causal LM in transformers, made tiny: with an empty memory it is exactly itself, or it is refused with a sentence; never silently wrong."
import json, sys
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from causal_types import NAMES, TABLE, examine

SOME = 'llama gpt2 mamba gemma2 modernbert-decoder cohere granite roberta bart marian bloom opt rwkv ctrl recurrent_gemma mixtral phimoe deepseek_v3 falcon_mamba olmo2 gpt_oss gemma4_text xlnet bert-generation moshi'.split()

def agrees(name):
    "The outcome, and whether it is the one in the table"
    got, table = examine(name), json.loads(TABLE.read_text())
    assert got[0] == table[name][0], (got, table[name])

@pytest.mark.parametrize('name', SOME)
def test_some_types(name): agrees(name)

@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_every_type(name): agrees(name)

def test_the_table_knows_every_type_and_no_type_is_wrong():
    table = json.loads(TABLE.read_text())
    assert {s for s, _ in table.values()} <= {'exact', 'refuses', 'not built'}
    assert all(why for s, why in table.values() if s != 'exact') and sum(s == 'exact' for s, _ in table.values()) > 150
