"""The image is pinned, not root, and checks the page that the daemon serves; its commands are proved by a script."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from kvservice.config import Config
from scripts.build_image_in_chroot import ROOT, instructions

pytestmark = pytest.mark.unit

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stage(name: str) -> dict[str, list[str]]:
    """The instructions of one stage, by word, in order."""
    found: dict[str, list[str]] = {}
    current = ""
    for word, rest in instructions(TEXT):
        current = rest.split(" AS ")[1] if word == "FROM" else current
        if current == name:
            found.setdefault(word, []).append(rest)
    return found


def test_continued_lines_are_one_instruction_and_comments_are_none() -> None:
    assert instructions("# note\nRUN a \\\n    && b\n\nUSER 1:2\n") == [("RUN", "a  && b"), ("USER", "1:2")]


def test_every_image_and_package_has_a_version() -> None:
    images = dict(rest.split("=") for word, rest in instructions(TEXT) if word == "ARG" and "IMAGE" in rest)
    assert set(images) == {"BASE_IMAGE", "ENGINE_IMAGE"}
    assert all(re.search(r":v?\d+\.\d+", image) for image in images.values())
    assert {rest.split(" AS ")[0] for word, rest in instructions(TEXT) if word == "FROM"} <= {
        f"${{{name}}}" for name in images
    }
    for file in (*Path(ROOT / "image").glob("*-constraints.txt"), ROOT / "constraints.txt"):
        pins = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert pins
        assert all("==" in pin for pin in pins), file


def test_the_extra_that_it_installs_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (extra,) = set(re.findall(r"\.whl\)\[([a-z,]+)\]", TEXT))
    for requirement in extras[extra]:
        assert re.split(r"[><=\[]", requirement)[0].lower() in {pin.partition("==")[0].lower() for pin in pins}


def test_the_variant_is_a_value_that_the_knob_takes() -> None:
    variants = set(re.findall(r"--build-arg DEVICE_PLANE=(\w+)", TEXT))
    assert variants == {"off", "auto"}
    for variant in variants:
        assert Config.load({}, {"KVSERVICE_DEVICE_PLANE": variant}).device_plane == variant
    assert "KVSERVICE_DEVICE_PLANE=${DEVICE_PLANE}" in stage("daemon")["ENV"]


def test_the_daemon_runs_as_the_user_of_the_manifests() -> None:
    workload = yaml.safe_load((ROOT / "k8s/overlays/daemonset/daemonset.yaml").read_text(encoding="utf-8"))
    context = workload["spec"]["template"]["spec"]["securityContext"]
    daemon = stage("daemon")
    assert daemon["USER"] == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert daemon["ENTRYPOINT"] == ['["kvservice"]']
    words = list(daemon)
    assert words.index("RUN") < words.index("USER"), "what the image needs is installed before it stops being root"


def test_the_health_check_asks_the_port_that_is_the_default() -> None:
    (health,) = stage("daemon")["HEALTHCHECK"]
    assert f"http://127.0.0.1:{Config().http_port}/livez" in health
    assert Config().http_host == "127.0.0.1"
