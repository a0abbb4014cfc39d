"What every test sees: no network, one thread, figures as small JSON; `--slow` runs the tests marked slow"
import os, sys
from pathlib import Path
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', PLOTLY_RENDERER='plotly_mimetype')
os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
from hypothesis import settings

settings.register_profile('chronomem', deadline=None, derandomize=True)
settings.load_profile('chronomem')

def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='run the tests marked slow too')

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; run with --slow')
    config.addinivalue_line('markers', 'data: reads real recordings, books or clips; skipped where there are none')

def pytest_collection_modifyitems(config, items):
    from chronomem.core import data_root
    if data_root() is None:
        for item in items:
            if 'data' in item.keywords: item.add_marker(pytest.mark.skip(reason='no data: set CHRONOMEM_DATA to the folder of the data sets'))
    if config.getoption('--slow'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))
