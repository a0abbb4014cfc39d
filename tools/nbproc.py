"""What the docs do to a notebook beyond nbdev.

Stored plotly figures become HTML, `names` link to this tree's modules, and what is a link already stays one."""
import os, re
from pathlib import Path
from types import SimpleNamespace
import nbdev.doclinks
from nbdev.config import get_config
from nbdev.process import Processor

PLOTLY = 'application/vnd.plotly.v1+json'

def own_index():
    "Look symbols up in this tree's `_modidx.py`, whether or not the package is installed"
    found, lib = nbdev.doclinks.entry_points, get_config().lib_path
    def load():
        ns = {}
        exec((lib/'_modidx.py').read_text(encoding='utf-8'), ns)
        public = lambda names: {k: v for k, v in names.items() if not k.rpartition('.')[2].startswith('_')}   # others have no place on a page
        return ns['d'] | dict(syms={m: public(names) for m, names in ns['d']['syms'].items()})
    own = SimpleNamespace(name=lib.name, dist=SimpleNamespace(name=lib.name), load=load)
    nbdev.doclinks.entry_points = lambda group: [o for o in found(group=group) if o.name != lib.name] + [own]
    nbdev.doclinks._build_lookup_table.cache_clear()

LINK = re.compile(r'(\[[^\[\]]*\]\([^()\s]*\))')
NAMED = re.compile(r'\[`([^`]+?)(?:\(\))?`\]\(([^()\s#]+\.ipynb)\)')

def placed(lookup, link):
    "A link from a name to a page, to the place of the name on that page if it has one"
    named = NAMED.fullmatch(link)
    site, _, place = (lookup.doc(named[1]) or '').partition('#') if named else ('', '', '')
    here = place and nbdev.doclinks._nbpath2html(Path(named[2])).name == site.rpartition('/')[2]
    return f'{link[:-1]}#{place})' if here else link

def own_links():
    "A link inside a link is none: nbdev would turn [`f`](page.ipynb) into one"
    names = nbdev.doclinks._re_backticks
    def link_line(self, line):
        parts = LINK.split(line)                                      # every other one is a link
        parts[::2] = [names.sub(self._link_sym, p) for p in parts[::2]]
        parts[1::2] = [placed(self, p) for p in parts[1::2]]
        return ''.join(parts)
    nbdev.doclinks.NbdevLookup.link_line = link_line

own_index()
own_links()

class plotly_html(Processor):
    "Turn stored plotly JSON into a `text/html` div; the page loads one `plotly.min.js` from the root of the site"
    def begin(self):
        here, root = Path(self.nb.path_).resolve().parent, get_config().nbs_path.resolve()
        self.js, self.loaded = Path(os.path.relpath(root/'plotly.min.js', here)).as_posix(), False

    def cell(self, cell):
        for i, o in enumerate(cell.get('outputs', [])):
            fig = o.get('data', {}).get(PLOTLY)
            if fig is not None: o['data'] = {'text/html': self.div(fig, f"fig-{cell.get('id', cell.idx_)}-{i}")}

    def div(self, fig, div_id):
        import plotly.graph_objects as go, plotly.io as pio
        fig = go.Figure(dict(data=fig['data'], layout=fig.get('layout', {})), skip_invalid=True)
        html = pio.to_html(fig, full_html=False, include_plotlyjs=False if self.loaded else self.js, div_id=div_id,
                           default_height='450px', config=dict(responsive=True, displaylogo=False))
        self.loaded = True
        return html.splitlines(keepends=True)
