#!/usr/bin/env bash
# The prompts of a `farkv eval` answered with NVIDIA's kvpress, in an environment of its own: kvpress 0.5 asks for
# transformers below 5.3, farkv for 5.16 and above.
#
#     benchmarks/kvpress_peer.sh DIR [options of benchmarks/kvpress_peer.py]
#
# DIR is what `farkv eval --out DIR` wrote; DIR/results-kvpress.jsonl is written. PYTHON names the interpreter,
# KVPRESS_VENV another folder for the environment (1.4 GB), PIP_FLAGS options for pip, for example an index with CPU
# builds of torch, FARKV_PYTHON the interpreter that has farkv: with it the two versions' logits are compared first.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${KVPRESS_VENV:-.venv-kvpress}
if ! "$venv/bin/python" -c 'import jaxtyping, kvpress' >/dev/null 2>&1; then
    [ -x "$venv/bin/pip" ] || "${PYTHON:-python3.11}" -m venv "$venv"
    # The same torch as farkv's own environment; jaxtyping for farkv's measures; the rest is kvpress's to say.
    grep -E '^(torch|numpy|safetensors|jaxtyping)==' constraints.txt >"$venv/constraints.txt"
    # shellcheck disable=SC2086 # PIP_FLAGS are several words
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check ${PIP_FLAGS:-} -c "$venv/constraints.txt" \
        torch 'transformers==5.2.0' 'kvpress==0.5.5' jaxtyping
fi
farkv=${FARKV_PYTHON:-.venv/bin/python}
[ -x "$farkv" ] && set -- --reference "$farkv" "$@"
# Scores and closeness are farkv's own files, which import torch alone.
PYTHONPATH=src exec "$venv/bin/python" benchmarks/kvpress_peer.py "$@"
