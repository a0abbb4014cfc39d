#!/usr/bin/env python3
"Write README.md from the stored outputs of nbs/index.ipynb; links go to the notebooks of this repository"
import os, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.process import NBProcessor
import tools.nbproc  # noqa: F401  names link to this tree's modules
from tools.sidebar import notebooks

def text(o): return ''.join(o) if isinstance(o, list) else o
def off(flags, key): return flags.get(f'{key}:', [''])[0].lower() == 'false'

def output(o):
    "Markdown of one output; figures stay in the notebook"
    if o['output_type'] == 'stream': body = text(o['text']) if o['name'] == 'stdout' else ''
    else:
        data = o.get('data', {})
        if 'text/markdown' in data: return text(data['text/markdown'])
        body = text(data.get('text/plain', ''))
    body = re.sub(r'\x1b\[[0-9;]*m', '', body).rstrip()
    return f'```text\n{body}\n```' if body else ''

def code(cell):
    flags = cell.directives_
    if flags.keys() & {'hide', 'default_exp', 'export', 'exporti'} or off(flags, 'include'): return
    src = re.sub(r'(?m)^#\|.*\n?', '', cell.source).strip()
    if src and not off(flags, 'echo'): yield f'```python\n{src}\n```'
    if not off(flags, 'output'): yield from filter(None, map(output, cell.outputs))

def relink(md, site):
    "Links into the site and between notebooks, as paths of this repository"
    pages = {_nbpath2html(Path(p)).as_posix(): p for p in notebooks()}
    md = re.sub(re.escape(site) + r'/?([^)\s#"]*)(#[^)\s"]*)?', lambda m: f'nbs/{pages[m[1]]}' if m[1] in pages else m[0], md)
    return re.sub(r'\]\((?!\w+:|#|/|\.\./|nbs/)', '](nbs/', md).replace('](../', '](')

def prose(md, site, lookup):
    "Linked markdown; fenced code stays as it is"
    parts = re.split(r'(?ms)^(```.*?^```[^\n]*)', lookup.linkify(md) or '')
    return ''.join(p if p.startswith('```') else relink(p, site) for p in parts).strip()

def readme():
    cfg, lookup = get_config(), NbdevLookup()
    site, parts = cfg.doc_host + cfg.doc_baseurl, []
    for c in NBProcessor(cfg.nbs_path/cfg.readme_nb).nb.cells:
        if c.cell_type == 'markdown': parts.append(prose(c.source, site, lookup))
        elif c.cell_type == 'code': parts += code(c)
    head = f'<!-- Written by tools/readme.py from nbs/{cfg.readme_nb}: edit that notebook -->'
    return '\n\n'.join([head, *filter(None, parts)]) + '\n'

if __name__ == '__main__':
    new, f = readme(), ROOT/'README.md'
    if not f.exists() or f.read_text(encoding='utf-8') != new: f.write_text(new, encoding='utf-8')
