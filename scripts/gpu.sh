#!/usr/bin/env bash
# Everything that needs a GPU: its tests, then what benchmarks measure there. Nobody has run it yet;
# it should take about 20 minutes on an H100. Results go to benchmarks/results/, with hardware and
# versions.
#
#   scripts/gpu.sh
#
# PYTHON  one with jaxpeft's dependencies and a jax for the GPU; bitsandbytes, peft and torch for
#         the comparison (default: python3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=cuda,cpu
failed=0
run() { printf '\n== %s\n' "$*"; "$@" || { echo "failed: $*" >&2; failed=1; }; }

run "$python" -m pytest -q -m gpu -p no:cacheprovider tests/quant/test_gpu.py
everything=(qlora kernels lora bitsandbytes floor matvec matvec_kernels copy)
run "$python" benchmarks/qlora.py --shape 1b --contenders "${everything[@]}"
run "$python" benchmarks/qlora.py --shape 7b --contenders "${everything[@]}"
run "$python" benchmarks/qlora.py --shape 70b --contenders matvec matvec_kernels copy
run "$python" benchmarks/train_step.py --shape 1b
exit "$failed"
