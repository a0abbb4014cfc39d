"The tools, on a scratch project"
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

def notebook(*sources, kept='kept'):
    "A notebook whose code cells all hold the output `kept`"
    out = dict(output_type='stream', name='stdout', text=[kept])
    def cell(i, s):
        c = dict(id=f'c{i}', metadata={}, source=s.splitlines(True))
        if s.startswith('# '): return dict(c, cell_type='markdown')
        return dict(c, cell_type='code', execution_count=None, outputs=[out])
    return json.dumps(dict(cells=[cell(*o) for o in enumerate(sources)], metadata={}, nbformat=4, nbformat_minor=5))

@pytest.fixture
def project(tmp_path):
    (tmp_path/'nbs').mkdir()
    shutil.copytree(ROOT/'tools', tmp_path/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', tmp_path)
    return tmp_path

def tool(project, name, *args):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'IN_TEST')}
    return subprocess.run([sys.executable, f'tools/{name}.py', *args], cwd=project, env=env, capture_output=True, text=True)

def stored(path): return [''.join(o.get('text') or o['data'].get('text/plain', '')) for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', [])]

def test_execute_stores_results_only(project):
    nb = project/'nbs'/'a.ipynb'
    nb.write_text(notebook('# A', 'import sys\nprint("out"); print("err", file=sys.stderr)', '#| slow\nprint("slow")',
                           '#| eval: false\n1/0', '2+2', 'import ipywidgets; ipywidgets.Button()', 'None',
                           'import plotly.graph_objects as go; go.Figure(go.Scatter(y=[1]))'))
    r = tool(project, 'execute', 'nbs/a.ipynb')
    assert r.returncode == 0, r.stderr
    first = nb.read_bytes()
    assert stored(nb) == ['out\n', 'kept', 'kept', '4', '']
    assert b'application/vnd.plotly.v1+json' in first and len(first) < 40_000
    assert tool(project, 'execute', 'nbs/a.ipynb').returncode == 0 and nb.read_bytes() == first
    assert tool(project, 'execute', 'nbs/a.ipynb', '--slow').returncode == 0 and stored(nb)[1] == 'slow\n'

@pytest.mark.parametrize('bad', ['1/0', 'class A:\n    def _repr_html_(self): 1/0\nA()'], ids=['cell', 'repr'])
def test_execute_fails_and_leaves_the_file(project, bad):
    nb = project/'nbs'/'a.ipynb'
    nb.write_text(notebook('# A', bad))
    before, r = nb.read_bytes(), tool(project, 'execute', 'nbs/a.ipynb')
    assert r.returncode == 1 and 'ZeroDivisionError' in r.stderr and nb.read_bytes() == before

def test_readme_links_and_hides(project):
    (project/'chronomem').mkdir()
    (project/'chronomem'/'_modidx.py').write_text("d = {'settings': {'doc_host': 'https://chronomem.github.io', 'doc_baseurl': '/chronomem', "
        "'git_url': 'https://x.org', 'branch': 'main'}, 'syms': {'chronomem.core': {'chronomem.core.f': ('core.html#f', 'chronomem/core.py')}}}")
    (project/'nbs'/'00_core.ipynb').write_text(notebook('# core'))
    (project/'nbs'/'index.ipynb').write_text(notebook('# Front\n\nCall `f`, see [`f`](00_core.ipynb), [`f`](00_core.ipynb#y), [`g`](00_core.ipynb), read [core](00_core.ipynb#x), ![p](images/p.png), [site](https://x.org/y).\n\n```sh\na `f` [b](c)\n```',
                                                      '#| hide\nsecret', 'f()', '#| echo: false\nquiet()'))
    r = tool(project, 'readme')
    assert r.returncode == 0, r.stderr
    md = (project/'README.md').read_text()
    assert 'Call [`f`](nbs/00_core.ipynb), see [`f`](nbs/00_core.ipynb#f), [`f`](nbs/00_core.ipynb#y), [`g`](nbs/00_core.ipynb), read [core](nbs/00_core.ipynb#x), ![p](nbs/images/p.png), [site](https://x.org/y).' in md
    assert 'a `f` [b](c)' in md and 'secret' not in md and 'quiet' not in md
    assert '```python\nf()\n```\n\n```text\nkept\n```' in md

def test_sidebar_follows_the_notebooks(project):
    navbar = '  navbar:\n    left:\n      - text: How-to\n        menu: # here\n          - gone.ipynb\n      - text: Front\n        href: index.ipynb\n'
    (project/'_quarto.yml').write_text(f'website:\n{navbar}  sidebar:\n    contents: # here\n      - gone.ipynb\nmetadata-files: [nbdev.yml]\n')
    for p in ['index', '20_ladder', '00_core', 'glossary', 'reference', 'how_to/ask', 'tutorials/first', 'results/span']:
        (project/'nbs'/p).parent.mkdir(exist_ok=True)
        (project/'nbs'/f'{p}.ipynb').write_text(notebook('# x'))
    assert tool(project, 'sidebar').returncode == 0
    import yaml
    web = yaml.safe_load((project/'_quarto.yml').read_text())['website']
    assert web['navbar']['left'] == [dict(text='How-to', menu=['how_to/ask.ipynb']), dict(text='Front', href='index.ipynb')]
    side = web['sidebar']['contents']
    assert side == ['index.ipynb', 'reference.ipynb', 'glossary.ipynb', *[dict(section=s, contents=[p]) for s, p in [('How to', 'how_to/ask.ipynb'), ('Foundations', '00_core.ipynb'), ('Cadence ladder', '20_ladder.ipynb'),
                    ('Results', 'results/span.ipynb'), ('Tutorials', 'tutorials/first.ipynb')]]]

# The test command

def sh(project, *args, **env):
    base = {k: v for k, v in os.environ.items() if k not in ('CHRONOMEM_DATA', 'CHRONOMEM_VENV', 'IN_TEST')}
    return subprocess.run(['bash', *args], cwd=project, env={**base, 'PYTHONPATH': str(ROOT), **env}, capture_output=True, text=True)

def test_test_command_refuses_what_it_does_not_know(project):
    r = sh(project, 'tools/test.sh', '--no-instal')
    assert r.returncode == 2 and '--no-instal' in r.stderr and not (project/'.venv').exists()

def test_data_part_without_data(project):
    shutil.copytree(ROOT/'chronomem', project/'chronomem', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
    r = sh(project, 'tools/test.sh', '--no-install', '--data', PYTHONPATH='', PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    assert r.returncode == 0 and r.stdout.startswith('no data: '), r.stdout + r.stderr

def test_data_part_runs_what_reads_data(project):
    "Only notebooks that read data are run, and pytest has the last word"
    from shutil import which
    if not which('nbdev_test'): pytest.skip('nbdev_test is not on the path')
    (project/'nbs'/'00_reads.ipynb').write_text(notebook('# A', 'from chronomem.core import data_root\nprint(data_root().name)'))
    (project/'nbs'/'01_not.ipynb').write_text(notebook('# A', '1/0'))
    (project/'tests').mkdir()
    (project/'tests'/'test_x.py').write_text('import pytest\n@pytest.mark.data\ndef test_a(): pass\ndef test_b(): 1/0\n')
    (project/'records').mkdir()
    r = sh(project, 'tools/test.sh', '--no-install', '--data', CHRONOMEM_DATA=str(project/'records'))
    assert r.returncode == 0 and '00_reads' in r.stdout and '01_not' not in r.stdout, r.stdout + r.stderr
    assert '1 passed' in r.stdout.strip().splitlines()[-1]

def test_set_up_names_the_python_it_needs(project):
    fake = project/'python'
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n'); fake.chmod(0o755)
    r = sh(project, '-euc', '. tools/setup.sh base; echo went on', PYTHON=str(fake))
    assert r.returncode == 1 and '3.11 or newer, got Python 3.9.1' in r.stderr and 'went on' not in r.stdout

def test_a_venv_left_half_made_is_made_again(project):
    (project/'.venv'/'bin').mkdir(parents=True)
    (project/'.venv'/'bin'/'python').symlink_to(sys.executable)
    fake = project/'python'
    fake.write_text('#!/bin/sh\necho "$@" >> calls; [ "$1" = -c ] && exit 0\nmkdir -p .venv/bin; echo "echo active; exit 7" > .venv/bin/activate\n'); fake.chmod(0o755)
    r = sh(project, '-euc', '. tools/setup.sh base', PYTHON=str(fake))
    assert r.returncode == 7 and 'active' in r.stdout and '-m venv --clear .venv' in (project/'calls').read_text()

def test_ci_hands_on_tracked_files_alone(tmp_path):
    "The copy holds what git tracks, knows of no data, and its environment serves the second part"
    clone = tmp_path/'clone'
    (clone/'tools').mkdir(parents=True); (clone/'.ci').mkdir()
    shutil.copy(ROOT/'.ci'/'run', clone/'.ci')
    (clone/'tools'/'test.sh').write_text('echo "$PWD|$*|${CHRONOMEM_DATA-unset}|${CHRONOMEM_VENV-unset}|$(ls)" >> "$LOG"\n[ -z "$*" ] || exit 3\n')
    (clone/'a b.txt').write_text('x')
    for cmd in (['init', '-q'], ['add', '-A']): subprocess.run(['git', *cmd], cwd=clone, check=True)
    (clone/'stray').touch()
    r = sh(tmp_path, str(clone/'.ci'/'run'), LOG=str(tmp_path/'log'), CHRONOMEM_DATA='/x', TMPDIR=str(tmp_path))
    assert r.returncode == 3, r.stderr                                  # the second part's verdict counts
    first, second = [l.split('|') for l in (tmp_path/'log').read_text().replace('\ntools', ' tools').replace('\nstray', ' stray').splitlines()]
    assert first[1:4] == ['', 'unset', 'unset'] and first[4] == 'a b.txt tools' and first[0].endswith('/clone/chronomem') and not Path(first[0]).exists()
    assert second[:4] == [str(clone), '--no-install --data', '/x', first[0] + '/.venv']
