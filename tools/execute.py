#!/usr/bin/env python3
"""Run notebooks and store their outputs: python tools/execute.py [nbs/00_core.ipynb ...] [--slow]

Cells run under the rules of nbdev_test (`#| eval: false`, `skip_exec`, the flags of `tst_flags`); a cell that is
skipped keeps the outputs it has. `--slow` runs the cells flagged `#| slow` too. No notebook named: all of them.
Only results are stored: no stderr, no widget views, no empty outputs; so two runs of the same cells write the same file.
A notebook with a failing cell is left as it was, its traceback printed, and the exit code is 1."""
import argparse, json, os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDGET, PLOTLY = 'application/vnd.jupyter.widget-view+json', 'application/vnd.plotly.v1+json'

def environment():
    "What every run of a notebook sees; plotly figures are stored as small JSON"
    os.environ['PLOTLY_RENDERER'] = 'plotly_mimetype'
    os.environ.pop('IN_TEST', None)                                   # stored outputs are those of the full run
    for k, v in dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false').items():
        os.environ.setdefault(k, v)

def keep(out):
    "Is this output worth storing?"
    if out['output_type'] == 'stream': return out['name'] == 'stdout' and bool(''.join(out['text']).strip())
    return bool(out.get('data')) and WIDGET not in out['data']

def tidy(outs):
    "The outputs to store, as plain JSON"
    outs = [o for o in json.loads(json.dumps(outs)) if keep(o)]
    for o in outs:
        for trace in o.get('data', {}).get(PLOTLY, {}).get('data', []): trace.pop('uid', None)
    return outs

def source(cell): return ''.join(cell['source'])

def run(path, slow=False):
    "Run the notebook at `path`; its new outputs by cell id, with the source that made them"
    from execnb.nbio import write_nb
    from execnb.shell import CaptureShell
    from fastcore.basics import str2bool
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor, nb_lang
    raw = json.loads(path.read_text(encoding='utf-8'))
    if any('id' not in c for c in raw['cells']):
        clean_nb(raw)
        write_nb(raw, path)
    skip = set() if slow else set(get_config(path=path).tst_flags.split())
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str2bool(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)) or nb_lang(nb) != 'python': return {}
    made, srcs = {}, {c['id']: source(c) for c in raw['cells']}

    def skipped(cell):
        if cell.cell_type != 'code': return True
        flags = getattr(cell, 'directives_', None) or {}
        no = 'nbdev_export(' in cell.source or flags.get('eval:', [''])[0].lower() == 'false' or bool(skip & flags.keys())
        if not no: cell.outputs = []
        return no
    def ran(cell):
        if shown and not shell.exc: shell.exc = shown.pop()           # a repr or display failed: IPython only prints it
        made[cell.id] = srcs[cell.id], tidy(cell.outputs)

    os.chdir(path.parent)
    sys.path.insert(0, str(ROOT))
    shell, shown = CaptureShell(path), []
    shell.showtraceback = lambda exc=None, *args, **kw: shown.append((exc or sys.exc_info())[1])
    try: shell.run_all(nb, exc_stop=True, preproc=skipped, postproc=ran)
    except BaseException:
        if not shell.exc: raise
        sys.exit(shell.prettytb(fname=path.name))
    return made

def execute(path, slow=False):
    "Run the notebook at `path` and write its outputs; a cell edited meanwhile keeps what it has"
    from execnb.nbio import write_nb
    from nbdev.clean import clean_nb
    made = run(path, slow)
    nb = json.loads(path.read_text(encoding='utf-8'))
    for c in nb['cells']:
        src, outs = made.get(c.get('id'), (None, None))
        if src == source(c): c['outputs'] = outs
        c['source'] = source(c).splitlines(keepends=True)
    clean_nb(nb)
    write_nb(nb, path)

def notebooks(names):
    if names: return [Path(o).resolve() for o in names]
    return [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(ROOT).parts)]

def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('notebooks', nargs='*')
    ap.add_argument('--slow', action='store_true', help='run the cells flagged `#| slow` too')
    a = ap.parse_args()
    environment()
    paths = notebooks(a.notebooks)
    if len(paths) == 1: return execute(paths[0], a.slow)
    failed = []
    for p in paths:                                                   # a process each: nothing leaks between notebooks
        t, cmd = time.time(), [sys.executable, __file__, str(p)] + ['--slow']*a.slow
        ok = subprocess.run(cmd).returncode == 0
        print(f"{'ok    ' if ok else 'FAILED'} {p.name} {time.time()-t:.0f} s", flush=True)
        if not ok: failed.append(p.name)
    if failed: sys.exit('failed: ' + ', '.join(failed))

if __name__ == '__main__': main()
