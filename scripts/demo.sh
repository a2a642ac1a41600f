#!/usr/bin/env bash
# Installs jaxpeft into an environment of its own where there is none, then runs the demo.
#
#   scripts/demo.sh [arguments of `jaxpeft demo`]
#
# VENV    where the environment is (default: .venv)
# PYTHON  the Python to make it with (default: python3), 3.11 or newer
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
if [[ ! -x "$venv/bin/python" ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "jaxpeft needs Python 3.11 or newer: set PYTHON to one" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet uv
"$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" --editable "$root"
exec "$venv/bin/jaxpeft" demo "$@"
