"""k8s/: kustomize renders it, the schemas take it, it needs no privileges, and it fits the daemon that it starts."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.blocks import namespace
from tests.certificates import Authority
from tests.daemons import MIB, DaemonProcess
from tests.engines import EngineProcess
from tests.operations.manifests import (
    EXAMPLES,
    OVERLAYS,
    ROOT,
    Manifest,
    config_of,
    daemon_container,
    environment_of,
    example,
    of_kind,
    pods,
    quantity,
    rendered,
    toml_of,
    tool,
)
from tests.operations.pod_security import baseline, containers, restricted

pytestmark = [pytest.mark.operations, pytest.mark.timeout(120)]

VERSIONS = ("1.35", "1.36", "1.37")
OVERHEAD_BYTES = 2 << 30
"""Memory of the container besides the arena: the index of a full NVMe tier, history, buffers, Python."""
ADAPTERS = ROOT / "engine_adapters"
CONFIG = ROOT / "k8s" / "base" / "kvservice.toml"
STOP_MARGIN_S = 5.0
ENGINE_STOP_S = 60.0
"""What a sidecar leaves the engine, which ends before it and within the same grace period."""
DAEMONSETS = [name for name in OVERLAYS if name.startswith("daemonset")]
SIDECARS = [name for name in OVERLAYS if not name.startswith("daemonset")]


def validated(manifests: list[Manifest]) -> str:
    """What the schemas of Kubernetes and of the Prometheus Operator find wrong."""
    program = Path(__file__).parent / "programs" / "validate.py"
    ended = subprocess.run(
        [tool("python"), str(program), *VERSIONS],
        input=json.dumps(manifests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_every_object_is_valid_in_three_minor_versions_and_has_no_unknown_field() -> None:
    everything = [
        manifest
        for manifests in (*(rendered(f"overlays/{name}") for name in OVERLAYS), rendered("monitoring"))
        for manifest in manifests
    ] + [manifest for name in EXAMPLES for manifest in example(name)]
    assert {"StatefulSet", "DaemonSet", "PodMonitor", "PrometheusRule", "NetworkPolicy"} <= {
        manifest["kind"] for manifest in everything
    }
    assert validated(everything) == ""


def test_an_unknown_field_would_be_found_in_each_kind_of_schema() -> None:
    everything = rendered("overlays/sidecar") + rendered("monitoring")
    changed = [of_kind(everything, kind)[0] for kind in ("StatefulSet", "PodMonitor", "PrometheusRule")]
    changed[0]["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 30
    changed[1]["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    changed[2]["spec"]["groups"][0]["rules"][0]["four"] = "2m"
    problems = validated(changed)
    for word in ("terminationGracePeriodSecond", "intervall", "four"):
        assert problems.count(f"'{word}'") == len(VERSIONS), problems


@pytest.mark.parametrize("name", SIDECARS)
def test_sidecar_and_engine_pass_restricted(name: str) -> None:
    (pod,) = pods(rendered(f"overlays/{name}"))
    assert [container["name"] for container in containers(pod)] == ["kvservice", "vllm"]
    assert restricted(pod) == set()


@pytest.mark.parametrize("name", DAEMONSETS)
def test_host_paths_are_all_that_keeps_the_daemonset_from_baseline(name: str) -> None:
    (pod,) = pods(rendered(f"overlays/{name}"))
    assert baseline(pod) == {"hostPath: sockets", "hostPath: nvme"}


def test_an_engine_beside_the_daemonset_needs_its_socket_directory_and_nothing_else() -> None:
    (pod,) = pods(example("engine-on-a-node.yaml"))
    assert restricted(pod) == {"hostPath: sockets", "volume type: sockets"}
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "sockets"]
    assert mount["readOnly"] is True


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (lambda pod: pod.update(hostIPC=True), "host namespaces: hostIPC"),
        (lambda pod: pod["containers"][0]["securityContext"].update(privileged=True), "privileged: vllm"),
        (lambda pod: pod["initContainers"][0]["securityContext"].pop("capabilities"), "capabilities: kvservice"),
        (lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
         "allowPrivilegeEscalation: vllm"),
        (lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
         "capabilities: vllm"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccomp: kvservice"),
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "runAsNonRoot: vllm"),
        (lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}), "hostPath: host"),
        (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=80), "hostPort: vllm"),
    ],
)  # fmt: skip
def test_a_pod_that_asks_for_more_would_be_found(change: Callable[[Manifest], Any], violation: str) -> None:
    (pod,) = pods(rendered("overlays/sidecar"))
    change(pod)
    assert violation in restricted(pod)


@pytest.mark.parametrize("name", OVERLAYS)
def test_nothing_can_be_written_but_volumes_and_no_token_is_mounted(name: str) -> None:
    manifests = rendered(f"overlays/{name}")
    (account,) = of_kind(manifests, "ServiceAccount")
    (pod,) = pods(manifests)
    assert account["automountServiceAccountToken"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert all(container["securityContext"]["readOnlyRootFilesystem"] for container in containers(pod))


@pytest.mark.parametrize("name", OVERLAYS)
def test_memory_holds_the_arena_and_what_comes_with_it(name: str, tmp_path: Path) -> None:
    manifests = rendered(f"overlays/{name}")
    config, resources = config_of(manifests, tmp_path), daemon_container(manifests)["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"], "or the arena is what the node reclaims"
    assert quantity(resources["limits"]["memory"]) >= config.dram_bytes + OVERHEAD_BYTES


@pytest.mark.parametrize("name", OVERLAYS)
def test_disks_hold_the_tier_and_the_tenth_that_is_never_taken(name: str, tmp_path: Path) -> None:
    manifests = rendered(f"overlays/{name}")
    config = config_of(manifests, tmp_path)
    (pod,) = pods(manifests)
    empty = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "nvme" and "emptyDir" in volume]
    (workload,) = [manifest for manifest in manifests if manifest["kind"] in {"StatefulSet", "DaemonSet"}]
    claims = workload["spec"].get("volumeClaimTemplates", ())
    sizes = [of["sizeLimit"] for of in empty] + [of["spec"]["resources"]["requests"]["storage"] for of in claims]
    assert sizes or name in DAEMONSETS
    assert all(0.9 * quantity(size) >= config.nvme_bytes for size in sizes)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_grace_period_leaves_time_to_write_what_waits(name: str, tmp_path: Path) -> None:
    manifests = rendered(f"overlays/{name}")
    config = config_of(manifests, tmp_path)
    (pod,) = pods(manifests)
    # A drain waits for holds, then writes what the write-behind window still holds, all within drain_s.
    assert config.drain_s >= 5 * config.nvme_write_behind_s
    before_s = 0.0 if name in DAEMONSETS else ENGINE_STOP_S
    assert pod["terminationGracePeriodSeconds"] >= before_s + config.drain_s + STOP_MARGIN_S


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_and_services_point_at_ports_that_the_configuration_serves(name: str, tmp_path: Path) -> None:
    manifests = rendered(f"overlays/{name}")
    config, container = config_of(manifests, tmp_path), daemon_container(manifests)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["metrics"] == config.http_port
    assert config.http_host == "0.0.0.0"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "metrics"
    if config.tcp_address:
        (service,) = of_kind(manifests, "Service")
        assert service["spec"]["internalTrafficPolicy"] == "Local"
        (port,) = service["spec"]["ports"]
        assert ports[port["targetPort"]] == port["port"] == int(config.tcp_address.rpartition(":")[2])
    selected = {"kvservice": "daemon"}
    (workload,) = [manifest for manifest in manifests if manifest["kind"] in {"StatefulSet", "DaemonSet"}]
    assert selected.items() <= workload["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ["sidecar", "cpu", *EXAMPLES])
def test_engines_load_the_connector_that_there_is_and_never_fail_for_it(name: str) -> None:
    (pod,) = pods(example(name) if name in EXAMPLES else rendered(f"overlays/{name}"))
    (engine,) = pod["containers"]
    config = json.loads(engine["args"][engine["args"].index("--kv-transfer-config") + 1])
    path = ADAPTERS / f"{config['kv_connector_module_path'].replace('.', '/')}.py"
    classes = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)}
    assert config["kv_connector"] in classes
    assert config["kv_load_failure_policy"] == "recompute"
    (directory,) = {environment_of(engine)["KVSERVICE_SOCKET_DIR"]}
    assert directory == tomllib.loads(CONFIG.read_text(encoding="utf-8"))["socket_dir"]
    assert any(directory.startswith(mount["mountPath"]) for mount in engine["volumeMounts"])


def test_the_engine_image_has_a_vllm_that_the_connector_accepts() -> None:
    versions = set(re.findall(r"vllm/vllm-openai:v([0-9.]+)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = project["optional-dependencies"]["vllm"]
    assert versions
    assert all(Requirement(requirement).specifier.contains(version) for version in versions)


def test_both_ways_run_the_daemon_alike() -> None:
    sidecar, daemonset = (daemon_container(rendered(f"overlays/{name}")) for name in ("sidecar", "daemonset"))
    assert sidecar.pop("restartPolicy") == "Always"
    assert sidecar == daemonset


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_daemon_sees_gpus_without_requesting_one(name: str) -> None:
    container = daemon_container(rendered(f"overlays/{name}"))
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert environment_of(container)["NVIDIA_VISIBLE_DEVICES"] == ("void" if name == "cpu" else "all")


@pytest.mark.parametrize("name", ["sidecar", "daemonset-tcp"])
def test_the_daemon_starts_with_the_config_map_and_answers_the_probes(
    name: str, tmp_path: Path, stack: ExitStack
) -> None:
    """Only what this machine cannot give is different: paths, sizes, free ports, and the user."""
    manifests = rendered(f"overlays/{name}")
    container = daemon_container(manifests)
    file = tmp_path / "kvservice.toml"
    file.write_text(toml_of(manifests), encoding="utf-8")
    directory = Path(tempfile.mkdtemp(prefix="kvs-"))
    stack.callback(shutil.rmtree, directory)
    here: dict[str, Any] = {
        "config": file,
        "nvme_dirs": directory / "nvme",
        "nvme_bytes": 64 * MIB,
        "nvme_segment_bytes": 4 * MIB,
        "socket_group": os.getgid(),
        "allowed_uids": os.getuid(),
    }
    environ = {key: value for key, value in environment_of(container).items() if key.startswith("KVSERVICE_")}
    if "KVSERVICE_TCP_ADDRESS" in environ:
        authority = Authority("clients")
        certificate, key = authority.server().write(tmp_path, "tls")
        clients = tmp_path / "ca.crt"
        clients.write_bytes(authority.certificate)
        here |= {"tcp_address": "127.0.0.1:0", "tls_cert_file": certificate, "tls_key_file": key}
        here |= {"tls_client_ca_file": clients}
    daemon = stack.enter_context(DaemonProcess(directory / "daemon", environ=environ, **here))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert daemon.get(container[probe]["httpGet"]["path"])[0] == 200
    assert daemon.get("/metrics")[0] == 200
    assert bool(daemon.event("ready")["tcp_port"]) == ("KVSERVICE_TCP_ADDRESS" in environ)
    daemon.terminate()
    assert daemon.wait() == 0


def test_engines_of_the_group_attach_to_a_directory_made_for_a_daemon_without_privileges(
    stack: ExitStack, require_tool: Callable[[str, str], str]
) -> None:
    """The DaemonSet's init container as it stands, root without a capability; daemon and engine as their users."""
    if os.geteuid() != 0:
        pytest.skip("becoming other users needs root")
    setpriv = require_tool("setpriv", "util-linux")
    (pod,) = pods(rendered("overlays/daemonset"))
    (prepare,) = pod["initContainers"]
    mounted = Path(tempfile.mkdtemp(prefix="kvs-"))
    stack.callback(shutil.rmtree, mounted)
    mounted.chmod(0o755)
    group = pod["securityContext"]["runAsGroup"]
    bare = [setpriv, "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", f"--regid={group}"]
    script = prepare["args"][0]
    as_root = [*bare, "--reuid=0", sys.executable, "-c", script, str(mounted)]
    subprocess.run(as_root, check=True)
    assert mounted.stat().st_mode & 0o7777 == 0o1770
    daemon = stack.enter_context(
        DaemonProcess(
            mounted / "sockets",
            launcher=[*bare, f"--reuid={pod['securityContext']['runAsUser']}"],
            socket_group=group,
            allowed_uids=pod["securityContext"]["runAsUser"],
            allowed_gids=group,
            nvme_dirs=mounted / "blocks",
            nvme_bytes=64 * MIB,
            nvme_segment_bytes=4 * MIB,
        )
    )
    (engine_pod,) = pods(example("engine-on-a-node.yaml"))
    context = engine_pod["securityContext"]
    engine = stack.enter_context(EngineProcess(uid=context["runAsUser"], gid=context["runAsGroup"]))
    assert engine.attach(daemon.socket_dir, namespace()) == "attached"
    stranger = [*bare[:-1], "--regid=65000", "--reuid=65000", "ls", str(mounted)]
    assert subprocess.run(stranger, capture_output=True, check=False).returncode != 0
    thief = [*bare, f"--reuid={context['runAsUser']}", "mv", str(mounted / "sockets"), str(mounted / "mine")]
    assert subprocess.run(thief, capture_output=True, check=False).returncode != 0, "an engine took the directory away"
