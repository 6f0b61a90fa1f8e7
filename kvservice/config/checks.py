"""checks: what the values of several knobs must mean together."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from kvservice.config.fields import Knob
from kvservice.config.values import RULE_SETTINGS, format_size, refusal, shown

MESSAGE_BYTES_PER_HASH = 128
"""The most that one hash and its outcome take in a request or a response: 64 bytes of hash, or a slot with its
generation, each in a run of its own."""

SOCKET_DIR_BYTES_MAX = 107 - len("/control.sock")
"""The kernel's limit for the path of a Unix socket, less the longest name in the directory."""

_IDENTITY = re.compile(r"uid:\d{1,10}|cn:.{1,200}")
_TENANT_CHARACTERS_MAX = 100
_TLS_FILES = ("tls_cert_file", "tls_key_file", "tls_client_ca_file")

Refuse = Callable[[str, str], Exception]
"""(knob, what is wrong with it) -> the error to raise."""


def check_together(values: Mapping[str, Any], knobs: Mapping[str, Knob], origins: Mapping[str, str]) -> None:
    """Raise ConfigError where values, each sound by itself, contradict each other or name nothing that exists.

    Args:
        values: of all knobs. origins: where those that are no defaults came from.
    """

    def refuse(name: str, problem: str) -> Exception:
        return refusal(name, problem, origins.get(name, ""))

    _check_access(values, refuse)
    _check_memory(values, refuse)
    _check_directories(values, refuse)
    for glob, rule in values["namespaces"].items():
        for name in RULE_SETTINGS:
            described = dataclasses.replace(knobs[name], name=f'namespaces."{glob}".{name}')
            described.check(getattr(rule, name), origins.get("namespaces", ""))
    _check_network(values, refuse)


def _check_access(values: Mapping[str, Any], refuse: Refuse) -> None:
    socket_dir = values["socket_dir"]
    if not socket_dir.startswith("/"):
        raise refuse("socket_dir", f"{shown(socket_dir)} is not an absolute path")
    if len(socket_dir.encode()) > SOCKET_DIR_BYTES_MAX:
        raise refuse(
            "socket_dir", f"longer than {SOCKET_DIR_BYTES_MAX} bytes, and a socket's path must fit 107: shorten it"
        )
    for identity, tenant in values["tenants"].items():
        if _IDENTITY.fullmatch(identity) is None:
            raise refuse("tenants", f"{shown(identity)} is not an identity; write uid:NUMBER or cn:NAME")
        if not tenant.isprintable() or not 1 <= len(tenant) <= _TENANT_CHARACTERS_MAX:
            bound = f"1 to {_TENANT_CHARACTERS_MAX} printable characters"
            raise refuse("tenants", f"{shown(tenant)} is not a tenant name: {bound}")


def _check_memory(values: Mapping[str, Any], refuse: Refuse) -> None:
    dram_bytes, segment_bytes = values["dram_bytes"], values["dram_segment_bytes"]
    if segment_bytes > dram_bytes:
        raise refuse(
            "dram_segment_bytes",
            f"{format_size(segment_bytes)} is more than dram_bytes ({format_size(dram_bytes)}): "
            "not one segment fits; lower it, or raise dram_bytes",
        )
    low, high = values["low_watermark"], values["high_watermark"]
    if not low < high:
        raise refuse("low_watermark", f"{low} is not below high_watermark ({high}); lower it, or raise that")
    lease_s, lease_s_max = values["lease_s"], values["lease_s_max"]
    if lease_s > lease_s_max:
        raise refuse("lease_s", f"{lease_s} is more than lease_s_max ({lease_s_max})")
    hashes_max, message_bytes_max = values["hashes_per_call_max"], values["message_bytes_max"]
    needed_bytes = hashes_max * MESSAGE_BYTES_PER_HASH
    if needed_bytes > message_bytes_max:
        raise refuse(
            "message_bytes_max",
            f"{format_size(message_bytes_max)} does not fit hashes_per_call_max ({hashes_max}) "
            f"at {MESSAGE_BYTES_PER_HASH} bytes each; write at least {format_size(needed_bytes)}",
        )


def _check_directories(values: Mapping[str, Any], refuse: Refuse) -> None:
    directories = [os.path.normpath(directory) for directory in values["nvme_dirs"].split(":") if directory]
    for directory in directories:
        if directories.count(directory) > 1:
            raise refuse("nvme_dirs", f"{shown(directory)} is named twice; name each device's directory once")


def _check_network(values: Mapping[str, Any], refuse: Refuse) -> None:
    address = values["tcp_address"]
    if not address:
        return
    host, _, port = address.rpartition(":")
    if not host or re.fullmatch(r"\d{1,5}", port, re.ASCII) is None or int(port) > 65_535:
        raise refuse("tcp_address", f'{shown(address)} is not "host:port", as in "0.0.0.0:9478"')
    missing = [name for name in _TLS_FILES if not values[name]]
    if missing:
        raise refuse(
            "tcp_address", f"TCP demands mutual TLS: set {', '.join(missing)} as well, or leave tcp_address empty"
        )
