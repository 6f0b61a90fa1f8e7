#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, then the figures of docs/benchmarks.md. PYTHON chooses the interpreter;
# it needs torch with CUDA, triton, transformers, pytest and the daemon's dependencies. About ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
export PYTHONPATH=".:client:engine_adapters${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$PYTHON" -m pytest -m gpu tests/gpu
if command -v compute-sanitizer > /dev/null; then
    # The allocator's pool would hide what leaves a tensor.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -m tests.gpu.kernels_once
else
    echo "no compute-sanitizer here: the kernels' accesses were not checked"
fi
"$PYTHON" -m benchmarks.gpu
"$PYTHON" -m benchmarks.gpu_ttft
"$PYTHON" -m benchmarks.gpu_serving
