"Tests of the tests: each mistake of the table in mutations.py must be noticed"
import ast, subprocess, sys
from pathlib import Path
import pytest
from mutations import ROWS, judge, mutated

def test_the_table_is_up_to_date():
    stale = [(r.file, r.old) for r in ROWS if mutated(r) is None]
    assert not stale, f'text that is not there exactly once: {stale}'
    assert len(ROWS) == len({(r.file, r.old) for r in ROWS}) >= 45
    for r in ROWS: assert r.old != r.new and ast.parse(mutated(r)) is not None

def test_what_is_not_there_is_stale():
    assert judge(ROWS[0]._replace(old='no such line')) == judge(ROWS[0]._replace(old='return')) == 'stale'

@pytest.mark.slow
def test_mistakes_are_noticed():
    "In a process of its own, as it forks; it fails below .9, and if a row is stale or a named test fails by itself"
    p = subprocess.run([sys.executable, Path(__file__).with_name('mutations.py')], capture_output=True, text=True)
    print(p.stdout)
    assert p.returncode == 0, p.stdout + p.stderr
