#!/usr/bin/env python3
"""Write the navigation of _quarto.yml.

The sidebar has every notebook in teaching order, one section per band of numbers and per folder; the menu of the
navbar has the how-to pages."""
import json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BANDS = ['Foundations', 'Senses', 'Cadence ladder', 'Thought', 'Trace store', 'Backbone', 'Delta learner',
         'Training and evaluation', 'Living system', 'Applications']
FRONT = ('index.ipynb', 'rooms.ipynb', 'reference.ipynb', 'glossary.ipynb')
MARK = re.compile(r'(?m)^(    contents:.*\n)(?:      .*\n)*')
MENU = re.compile(r'(?m)^(        menu:.*\n)(?:          .*\n)*')

def notebooks(root=ROOT):
    "All notebooks, relative to `nbs`"
    nbs = root/'nbs'
    paths = (p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    return sorted(p.as_posix() for p in paths if not any(o[0] in '._' for o in p.parts))

def section(path):
    "The title of the section of a notebook; None for the front pages"
    folder, _, name = path.rpartition('/')
    if folder: return folder.split('/')[0].replace('_', ' ').capitalize()
    if name in FRONT: return None
    n = re.match(r'(\d)\d[a-z]?_', name)
    return BANDS[int(n[1])] if n else 'More'

def contents(root=ROOT):
    "Sections with their notebooks"
    res = {}
    for p in notebooks(root): res.setdefault(section(p), []).append(p)
    if None in res: res[None].sort(key=FRONT.index)
    order = [None, 'How to', *BANDS, 'More', 'Results', 'Tutorials']
    return sorted(res.items(), key=lambda o: order.index(o[0]) if o[0] in order else len(order))

def render(root=ROOT):
    lines = []
    for title, paths in contents(root):
        if title: lines.append(f'      - section: {json.dumps(title)}\n        contents:\n')
        lines += [f"{'          ' if title else '      '}- {p}\n" for p in paths]
    return ''.join(lines)

def menu(root=ROOT): return ''.join(f'          - {p}\n' for p in notebooks(root) if p.startswith('how_to/'))

def main(root=ROOT):
    f = root/'_quarto.yml'
    old = f.read_text(encoding='utf-8')
    new = MARK.sub(lambda m: m[1] + render(root), old, count=1)
    new = MENU.sub(lambda m: m[1] + menu(root), new, count=1)
    if new != old: f.write_text(new, encoding='utf-8')

if __name__ == '__main__': main()
