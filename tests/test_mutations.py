"Tests of the tests: each mistake of the table in mutations.py must be noticed"
import ast, pytest
from mutations import ROWS, judge, mutated, run, score

def test_the_table_is_up_to_date():
    stale = [(r.file, r.old) for r in ROWS if mutated(r) is None]
    assert not stale, f'text that is not there exactly once: {stale}'
    assert len(ROWS) == len({(r.file, r.old) for r in ROWS}) >= 45
    for r in ROWS: assert r.old != r.new and ast.parse(mutated(r)) is not None

def test_what_is_not_there_is_stale(tmp_path):
    assert judge(ROWS[0]._replace(old='no such line'), tmp_path) == judge(ROWS[0]._replace(old='return'), tmp_path) == 'stale'

@pytest.mark.slow
def test_mistakes_are_noticed():
    out = run()
    assert not [r for r, v in out.items() if v in ('stale', 'broken')]
    print(f'score {score(out):.3f}')
    assert score(out) >= .9
