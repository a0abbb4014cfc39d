#!/usr/bin/env python3
"""Build the site into _docs: with Quarto when it is installed, else with smalldocs (pure Python, no network).

Stored outputs are shown as they are; only imports, exported cells and show_doc run."""
import os, re, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KATEX = re.compile(r'https://cdn\.jsdelivr\.net/npm/katex@([\d.]+)/dist')

def process(cfg):
    "Processed notebooks in _proc"
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    import plotly
    refresh_quarto_yml()
    proc = proc_nbs(force=True, n_workers=2)
    shutil.copy(Path(plotly.__file__).parent/'package_data'/'plotly.min.js', proc)
    return proc

def up(page, site): return '../' * len(page.relative_to(site).parts[:-1])

def rename(site):
    "Pages under nbdev's names (00_core.html becomes core.html), which smalldocs does not know"
    from nbdev.doclinks import _nbpath2html
    names = {}
    for p in sorted(site.rglob('*.html')):
        new = _nbpath2html(p.with_suffix('.ipynb')).name
        if new != p.name and 'site_libs' not in p.parts:
            names[p.name] = new
            p.rename(p.with_name(new))
    if not names: return
    old = re.compile(r'(?<![\w.-])(' + '|'.join(map(re.escape, names)) + r')\b')
    for p in site.rglob('*'):
        if p.suffix in ('.html', '.json', '.xml') and 'site_libs' not in p.parts:
            p.write_text(old.sub(lambda m: names[m[1]], p.read_text(encoding='utf-8')), encoding='utf-8')

def relative(site, url):
    "Links to our own site, as links that also work on a disk"
    own = re.compile(r'(<a\b[^>]*?\bhref=")' + re.escape(url) + r'/?(?=[#"\w])')
    for p in site.rglob('*.html'):
        html, root = p.read_text(encoding='utf-8'), up(p, site) or './'
        p.write_text(own.sub(r'\1' + root, html), encoding='utf-8')

def maths(site):
    "Serve KaTeX from the site when npm can fetch it; otherwise pages load it from its CDN"
    pages = [p for p in site.rglob('*.html') if KATEX.search(p.read_text(encoding='utf-8'))]
    if not pages: return
    version, npm = KATEX.search(pages[0].read_text(encoding='utf-8'))[1], shutil.which('npm')
    with tempfile.TemporaryDirectory() as tmp:
        cmd = [npm or '', 'pack', f'katex@{version}', '--silent', '--fetch-retries=0', '--fetch-timeout=20000']
        if not npm or subprocess.run(cmd, cwd=tmp, capture_output=True).returncode:
            return print('maths: KaTeX could not be fetched, pages load it from its CDN')
        tarfile.open(next(Path(tmp).glob('*.tgz'))).extractall(tmp, filter='data')
        dist, dest = Path(tmp)/'package'/'dist', site/'site_libs'/'katex'
        for f in ['katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js', *(o.relative_to(dist) for o in dist.glob('fonts/*.woff2'))]:
            (dest/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(dist/f, dest/f)
    for p in pages:
        p.write_text(KATEX.sub(up(p, site) + 'site_libs/katex', p.read_text(encoding='utf-8')), encoding='utf-8')

def main():
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    from nbdev.config import get_config
    cfg = get_config()
    proc, out = process(cfg), cfg.doc_path
    if shutil.which('quarto'): subprocess.run(['quarto', 'render', '--no-cache'], cwd=proc, check=True)
    else:
        from smalldocs.site import build
        for w in build(proc, quiet=True).warnings:
            if 'output-file' not in w: print('warning:', w)               # `rename` does what it asks
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(proc/out.name, out)
    if not shutil.which('quarto'): rename(out)
    relative(out, cfg.doc_host + cfg.doc_baseurl)
    maths(out)
    print(f"{out.name}: {sum('site_libs' not in p.parts for p in out.rglob('*.html'))} pages")

if __name__ == '__main__': main()
