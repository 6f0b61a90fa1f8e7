#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, then the figures of docs/benchmarks.md. PYTHON chooses the interpreter;
# it needs torch with CUDA, transformers, pytest and the daemon's dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
export PYTHONPATH=".:client:engine_adapters${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -m pytest -m gpu tests/gpu
"$PYTHON" -m benchmarks.gpu
"$PYTHON" -m benchmarks.gpu_ttft
