#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: the environment, the GPU's tests, then one table and one JSON line.
#
#     benchmarks/gpu.sh [options of benchmarks/gpu.py]
#
# Takes at most 8 minutes on an H200-class machine where packages come quickly. PYTHON names another interpreter,
# FARKV_VENV another folder for the environment. Without a GPU it says so and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "benchmarks/gpu.sh: no NVIDIA GPU here (nvidia-smi finds none); run it on a machine that has one" >&2
    exit 2
fi

started=$SECONDS
has_all='import farkv, pytest, beartype, torch; assert torch.cuda.is_available()'
python=${PYTHON:-python3}
if ! "$python" -c "$has_all" >/dev/null 2>&1; then
    venv=${FARKV_VENV:-.venv-gpu}
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    python=$venv/bin/python
    if ! "$python" -c "$has_all" >/dev/null 2>&1; then
        # The plain index has torch's CUDA build; constraints.txt says which version, and which Triton goes with it.
        "$python" -m pip install --quiet --constraint constraints.txt torch
        "$python" -m pip install --quiet --constraint constraints.txt --editable '.[test]'
    fi
    "$python" -c "$has_all" || {
        echo "benchmarks/gpu.sh: torch sees no CUDA device in $venv; install a CUDA build of torch there" >&2
        exit 2
    }
fi

failed=0
timeout 180 "$python" -m pytest -m gpu -q -p no:cacheprovider tests/kernels tests/hf/test_gpu.py || failed=$?
left=$((470 - (SECONDS - started)))
if [ "$left" -lt 60 ]; then
    left=60
fi
"$python" benchmarks/gpu.py --budget "$left" "$@"
exit "$failed"
