#!/usr/bin/env bash
# Sets up a test environment where there is none, then runs every check that CI runs.
#
#   scripts/test.sh [pytest arguments]
#
# VENV    where the environment is (default: .venv-test)
# PYTHON  the Python to make it with (default: python3), 3.11 or newer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VENV:-.venv-test}"
step() { printf '\n== %s\n' "$*"; }

step "environment: $venv"
if [[ ! -x "$venv/bin/python" ]]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "jaxpeft needs Python 3.11 or newer: set PYTHON to one" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv "$venv"
fi
python="$venv/bin/python"
# torch goes first and by pip, which takes a CPU build where pip is set up to find one; uv would not
# look there. uv does the rest, because pip's resolver can take very long on it.
"$python" -m pip install --quiet uv torch==2.13.0
"$python" -m uv pip install --quiet --python "$python" --editable '.[test]'

# Small enough to run on any machine: eight virtual CPU devices, and nothing from a model hub.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .

step "mypy"
"$python" -m mypy

shopt -s nullglob
for example in examples/*.py; do
  step "$example --small"
  "$python" "$example" --small
done

step "tests and doctests"
if (($#)); then
  "$python" -m pytest "$@"
else
  # A file at a time on each core, because tests of one file share their models.
  "$python" -m pytest --quiet -n auto --dist loadfile --durations=25 --doctest-modules tests jaxpeft
fi
