#!/usr/bin/env bash
# Install into .venv, then run the demo; arguments go to `chronomem demo`
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" base
exec chronomem demo "$@"
