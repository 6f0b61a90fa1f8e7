"""pod_security: the Pod Security Standards as checks, so that a manifest is judged without a cluster.

Follows the controls of the published levels "baseline" and "restricted", for pods on Linux.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Spec = Mapping[str, Any]

BASELINE_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP",
    "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
SAFE_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SECCOMP_TYPES = {"RuntimeDefault", "Localhost"}


def baseline(pod: Spec) -> set[str]:
    """The controls of "baseline" that the pod violates, each as "control: where"."""
    return set(_baseline(pod))


def restricted(pod: Spec) -> set[str]:
    """The same for "restricted", which contains "baseline"."""
    return {*_baseline(pod), *_restricted(pod)}


def _baseline(pod: Spec) -> Iterator[str]:
    yield from (f"host namespaces: {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name))
    yield from (f"hostPath: {volume['name']}" for volume in pod.get("volumes", ()) if "hostPath" in volume)
    for where, context in _contexts(pod):
        if context.get("privileged"):
            yield f"privileged: {where}"
        if context.get("windowsOptions", {}).get("hostProcess"):
            yield f"hostProcess: {where}"
        if set(context.get("capabilities", {}).get("add", ())) - BASELINE_CAPABILITIES:
            yield f"capabilities: {where}"
        if context.get("procMount", "Default") != "Default":
            yield f"procMount: {where}"
        if context.get("seccompProfile", {}).get("type", "RuntimeDefault") not in SECCOMP_TYPES:
            yield f"seccomp: {where}"
        if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in {"RuntimeDefault", "Localhost"}:
            yield f"apparmor: {where}"
        selinux = context.get("seLinuxOptions", {})
        if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
            yield f"selinux: {where}"
        if {sysctl["name"] for sysctl in context.get("sysctls", ())} - SAFE_SYSCTLS:
            yield f"sysctls: {where}"
    for container in containers(pod):
        if any(port.get("hostPort") for port in container.get("ports", ())):
            yield f"hostPort: {container['name']}"


def _restricted(pod: Spec) -> Iterator[str]:
    for volume in pod.get("volumes", ()):
        if not set(volume) - {"name"} <= RESTRICTED_VOLUMES:
            yield f"volume type: {volume['name']}"
    of_pod = pod.get("securityContext", {})
    if of_pod.get("runAsUser") == 0:
        yield "runAsUser: pod"
    for container in containers(pod):
        where, context = container["name"], container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"allowPrivilegeEscalation: {where}"
        if context.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            yield f"runAsNonRoot: {where}"
        if context.get("runAsUser") == 0:
            yield f"runAsUser: {where}"
        if context.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type") not in SECCOMP_TYPES:
            yield f"seccomp: {where}"
        capabilities = context.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", ()) or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"capabilities: {where}"


def containers(pod: Spec) -> list[Spec]:
    """Every container of the pod, init and ephemeral ones included."""
    return [of for kind in ("initContainers", "containers", "ephemeralContainers") for of in pod.get(kind, ())]


def _contexts(pod: Spec) -> Iterator[tuple[str, Spec]]:
    yield "pod", pod.get("securityContext", {})
    for container in containers(pod):
        yield container["name"], container.get("securityContext", {})
