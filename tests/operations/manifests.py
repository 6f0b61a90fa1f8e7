"""manifests: what kustomize makes of k8s/, and what the objects say."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvservice.config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "k8s"
TOOLS = ROOT / ".venv-kubernetes" / "bin"
OVERLAYS = ("sidecar", "cpu", "daemonset", "daemonset-tcp")
EXAMPLES = ("engine-on-a-node.yaml",)

Manifest = dict[str, Any]


def tool(name: str) -> str:
    """A program that scripts/install_kubernetes_tools.sh installs; skips without it, fails in CI."""
    found = shutil.which(name, path=str(TOOLS))
    if found is None:
        reason = f"{name} is not installed: scripts/install_kubernetes_tools.sh"
        if os.environ.get("REQUIRE_TEST_TOOLS") == "1":
            pytest.fail(f"{reason}, and REQUIRE_TEST_TOOLS=1 forbids skipping", pytrace=False)
        pytest.skip(reason)
    return found


def rendered(folder: str) -> list[Manifest]:
    """The objects of `kubectl apply -k k8s/FOLDER`, anew for each caller."""
    return [manifest for manifest in yaml.safe_load_all(_rendered_text(folder)) if manifest]


@functools.cache
def _rendered_text(folder: str) -> str:
    ended = subprocess.run(
        [tool("kubectl"), "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr, f"kustomize warns: {ended.stderr}"
    return ended.stdout


def example(name: str) -> list[Manifest]:
    """The objects of a file in k8s/examples."""
    return list(yaml.safe_load_all((FOLDER / "examples" / name).read_text(encoding="utf-8")))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The pod templates' specs."""
    for manifest in manifests:
        if manifest["kind"] in {"StatefulSet", "DaemonSet", "Deployment"}:
            yield manifest["spec"]["template"]["spec"]


def daemon_container(manifests: list[Manifest]) -> Manifest:
    """The container that runs `kvservice serve`."""
    (found,) = [
        container
        for pod in pods(manifests)
        for container in [*pod.get("initContainers", ()), *pod["containers"]]
        if container.get("args", [""])[0] == "serve"
    ]
    return dict(found)


def toml_of(manifests: list[Manifest]) -> str:
    """The TOML file in the ConfigMap."""
    (config_map,) = of_kind(manifests, "ConfigMap")
    return str(config_map["data"]["kvservice.toml"])


def environment_of(container: Manifest) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container.get("env", ())}


def config_of(manifests: list[Manifest], directory: Path) -> Config:
    """What the daemon makes of the ConfigMap's TOML and the container's environment."""
    file = directory / "kvservice.toml"
    file.write_text(toml_of(manifests), encoding="utf-8")
    return Config.load({}, environment_of(daemon_container(manifests)), config_file=str(file))


def quantity(text: str) -> int:
    """Bytes of a Kubernetes memory quantity."""
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
    return int(text[:-2]) * units[text[-2:]]
