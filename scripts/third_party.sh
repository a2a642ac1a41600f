#!/usr/bin/env bash
# Tests the transform on published models: transformers 4 and its torch models, Tunix, Mamba 2,
# equimo and penzai, dense and with packed weights.
# They have an environment of their own, because transformers 4 is older than what jaxpeft needs.
#
#   scripts/third_party.sh [pytest arguments]
#
# VENV    where the environment is (default: .venv-third-party)
# PYTHON  the Python to make it with (default: python3), 3.11 or newer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-.venv-third-party}"
python="$venv/bin/python"
if [[ ! -x "$python" ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "jaxpeft needs Python 3.11 or newer: set PYTHON to one" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv "$venv"
fi
torch=torch==2.13.0
"$python" -m pip install --quiet uv "$torch"
"$python" -m uv pip install --quiet --python "$python" --editable ".[third_party]" "$torch" \
  'hypothesis>=6.100' 'pytest>=8.3'
"$python" -m uv pip install --quiet --python "$python" 'transformers==4.57.*' 'huggingface-hub<1'
exec "$python" -m pytest -m third_party -s tests/third_party "$@"
