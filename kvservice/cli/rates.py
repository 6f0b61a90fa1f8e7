"""rates: what happened between two stats of one daemon, per namespace and second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvservice_proto.v1 import kvservice_pb2 as pb

NamespaceKey = tuple[str, bytes]
"""Tenant and fingerprint."""


@dataclass(frozen=True, slots=True)
class NamespaceRates:
    """Blocks per second over the time between two stats; bytes per second where the name says so."""

    requested_per_s: float
    hits_per_s: float
    committed_per_s: float
    committed_bytes_per_s: float
    evicted_per_s: float


def key_of(namespace: pb.NamespaceStats) -> NamespaceKey:
    """What tells namespaces apart; labels need not differ."""
    return namespace.tenant, namespace.fingerprint


def rates_between(previous: pb.StatsResponse, current: pb.StatsResponse) -> Mapping[NamespaceKey, NamespaceRates]:
    """Rates of the namespaces that were there in both, by the daemon's own clock; none across a daemon's restart."""
    elapsed_s = current.uptime_s - previous.uptime_s
    if previous.daemon_epoch != current.daemon_epoch or elapsed_s <= 0:
        return {}
    before = {key_of(namespace): namespace for namespace in previous.namespaces}
    rates = {}
    for now in current.namespaces:
        was = before.get(key_of(now))
        # A namespace that went and came back counts from zero again.
        if was is None or now.requested_blocks < was.requested_blocks or now.committed_blocks < was.committed_blocks:
            continue
        hits = now.dram_hit_blocks + now.nvme_hit_blocks - was.dram_hit_blocks - was.nvme_hit_blocks
        committed_per_s = (now.committed_blocks - was.committed_blocks) / elapsed_s
        rates[key_of(now)] = NamespaceRates(
            requested_per_s=(now.requested_blocks - was.requested_blocks) / elapsed_s,
            hits_per_s=hits / elapsed_s,
            committed_per_s=committed_per_s,
            committed_bytes_per_s=committed_per_s * now.block_size_bytes,
            evicted_per_s=(now.evicted_blocks - was.evicted_blocks) / elapsed_s,
        )
    return rates
