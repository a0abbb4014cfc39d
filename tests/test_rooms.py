"One class wherever it was imported from: every method that a room adds is found without importing that room"
import ast, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]

def patched(cls):
    "Public methods that modules add to a class by @patch: name -> module"
    out = {}
    for p in sorted((ROOT/'chronomem').glob('*/*.py')):
        for n in ast.parse(p.read_text(encoding='utf-8')).body:
            if not isinstance(n, ast.FunctionDef) or n.name.startswith('_') or not n.args.args: continue
            first = n.args.args[0].annotation
            if first is not None and ast.unparse(first) == cls and any('patch' in ast.unparse(d) for d in n.decorator_list):
                out[n.name] = '.'.join(p.relative_to(ROOT).with_suffix('').parts)
    return out

MODEL = """
import warnings; warnings.filterwarnings('ignore')
from {module} import ChronoModel
from chronomem.backbone.backbone import MemoryConfig
from chronomem.backbone.families import add_memory, tiny_lm
from chronomem.backbone.text import byte_tokenizer
from chronomem.ladder.ladder import LadderConfig
lm = add_memory(tiny_lm(vocab=258), MemoryConfig(ladder=LadderConfig.of(1, dims=(16,), slots=(1,), hidden=16)))
model = ChronoModel(lm, byte_tokenizer(), 'toy')
"""

def run(code): return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=200)

@pytest.mark.parametrize('module', ['chronomem', 'chronomem.backbone.model', 'chronomem.backbone.chat'])
def test_a_model_is_whole_however_it_is_imported(module):
    names = [n for n in patched('ChronoModel') if n not in ('from_pretrained', 'default')]
    p = run(MODEL.format(module=module) + f'print([n for n in {names} if not hasattr(model, n)], hasattr(model, "nonsense"))')
    assert p.stdout.split('\n')[0] == '[] False', p.stdout + p.stderr

@pytest.mark.parametrize('module', ['chronomem', 'chronomem.live.session'])
def test_a_session_is_whole_however_it_is_imported(module):
    names = [*patched('Session')]
    code = f'import {module}\n' + MODEL.format(module='chronomem.backbone.model')
    p = run(code + f's = model.session("ada", incognito=True)\nprint([n for n in {names} if not hasattr(s, n)], hasattr(s, "nonsense"))')
    assert p.stdout.split('\n')[0] == '[] False', p.stdout + p.stderr

def test_a_word_is_asked_without_importing_a_verb():
    "From the lowest room up: nothing but the model's class was imported"
    p = run(MODEL.format(module='chronomem.backbone.chat') + 's = model.session("ada", incognito=True)\ns.ingest("tea")\nprint(s.t, type(s.ask("tea?", max_new_tokens=1)).__name__)')
    assert p.stdout.split('\n')[0] == '1 str', p.stdout + p.stderr
