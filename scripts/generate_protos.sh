#!/usr/bin/env bash
# Regenerate client/kvservice_proto from protos/ with the oldest supported toolchain,
# so that the output loads on every protobuf an engine may carry (5.29 and newer).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=build/protoc-venv
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q "grpcio-tools==1.71.2"
fi
out=${1:-client}
"$venv/bin/python" -m grpc_tools.protoc -I kvservice_proto/v1=protos/kvservice/v1 \
    --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
    protos/kvservice/v1/kvservice.proto
