"""The series of one daemon: counters bound once, gauges read at the scrape.

Few series, whatever the traffic: labels take values from short lists written down here or in the contract, never a
name that a client chose. What is per namespace or per instance is in `kvservice stats`.

Counters that the hot path touches are children bound once: `metrics.dram_hit_blocks.inc(n)` looks up no label. What is
a state rather than an event (sizes, counts) is not kept here at all: one callable reads it when somebody scrapes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvservice.blocks import DropReason, Tier
from kvservice.metrics.disks import disk_families
from kvservice.metrics.gpu_copies import GpuCopies
from kvservice.metrics.latency import Evictions, Operations
from kvservice.metrics.prefetching import Prefetches
from kvservice.metrics.savings import Savings
from kvservice.tiers import DiskUsage

Key = TypeVar("Key")

RPC_SECONDS_BUCKETS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.5, 2.0, 10.0)
"""From below one lookup to a call that waited for space."""

MISS_REASONS = ("not_held", "being_written", "prefix_missing", "corrupt", "tier_offline", "over_limit", "other_session")
"""The contract's MissReason, in its order, without the first (unspecified)."""

CANCELLED = "cancelled"
"""Reason of what a caller no longer waited for; no answer carries it."""

PUT_OUTCOMES = ("reserved", "held", "being_written", "refused")
"""The contract's PutRun outcomes."""


@dataclass(frozen=True, slots=True)
class TierGauge:
    """One tier as scraped: capacity and use in bytes, and whether it is online."""

    tier: Tier
    capacity_bytes: int
    used_bytes: int
    online: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The daemon's state as scraped; plain counts."""

    tiers: Sequence[TierGauge]
    blocks: int
    sessions: int
    instances: int
    namespaces: int
    leases: int
    reservations: int
    quarantined_slots: int
    unchecksummed_blocks: int
    draining: bool
    event_loop_lag_s: float = 0.0
    call_connections: int = 0
    queued_requests: int = 0
    prefetch_window_requests: int = 0
    eviction_window_requests: int = 0
    prefetch_window_blocks: int = 0
    prefetch_window_dram_blocks: int = 0
    disks: Sequence[DiskUsage] = ()


_GAUGES: Mapping[str, str] = {
    "blocks": "Committed blocks in the index, all namespaces.",
    "sessions": "Conversations remembered.",
    "instances": "Engine processes attached.",
    "call_connections": "Connections of instances that carry calls beside gRPC.",
    "namespaces": "Namespaces that exist.",
    "leases": "Leases held by instances.",
    "reservations": "Reservations held by instances.",
    "quarantined_slots": "Slots whose holder expired and has neither released them nor hung up.",
    "unchecksummed_blocks": "Committed blocks whose checksum is still to be made.",
    "draining": "1 while the daemon takes no new work because it is shutting down.",
    "queued_requests": "Waiting requests that engines have told of.",
    "prefetch_window_requests": "Of these, those whose blocks are fetched into DRAM.",
    "eviction_window_requests": "Of these, those whose blocks do not leave the store.",
    "prefetch_window_blocks": "Held blocks that the requests of the prefetch window need; shared ones count each time.",
    "prefetch_window_dram_blocks": "Of these, those that are in DRAM: the window's coverage.",
}


_LAG = "kvservice_event_loop_lag_seconds"
_LAG_ABOUT = "Time since the event loop last came round; a tenth of a second is normal, above ten /livez fails."


_TIER_GAUGES = (
    ("kvservice_tier_capacity_bytes", "Size of a tier."),
    ("kvservice_tier_used_bytes", "Part of a tier that namespaces own."),
    ("kvservice_tier_online", "1 while the tier can be used."),
)


class Calls:
    """Latency of one RPC method, by the gRPC status code it ended with."""

    def __init__(self, histogram: Histogram, method: str) -> None:
        self._histogram = histogram
        self._method = method
        self._by_code: dict[str, Histogram] = {}
        self._ok = self._bind("OK")

    def observe(self, seconds: float, code: str) -> None:
        """Count one call that took `seconds` and ended with `code` (a name such as "OK" or "ABORTED")."""
        if code == "OK":
            self._ok.observe(seconds)
        else:
            (self._by_code.get(code) or self._bind(code)).observe(seconds)

    def _bind(self, code: str) -> Histogram:
        child: Histogram = self._histogram.labels(method=self._method, code=code)
        self._by_code[code] = child
        return child


class Metrics:
    """All series of one daemon, on a registry of their own, so that two daemons in one process do not collide.

    Counting may happen in any thread. `registry` goes to the HTTP room.

    Args:
        version: the daemon's version, for kvservice_build_info.
        prefill_tokens_per_gpu_s, gpu_hour_price: what saved tokens are worth; 0: not estimated.
    """

    def __init__(self, *, version: str, prefill_tokens_per_gpu_s: float = 0.0, gpu_hour_price: float = 0.0) -> None:
        # The library's _created gauges: as many series again, and kvservice_process_start_time_seconds says it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.operations = Operations(self.registry)
        self.evictions = Evictions(self.registry)
        self.prefetches = Prefetches(self.registry)
        self.savings = Savings(
            self.registry, prefill_tokens_per_gpu_s=prefill_tokens_per_gpu_s, gpu_hour_price=gpu_hour_price
        )
        self._rpc_seconds = Histogram(
            "kvservice_rpc_duration_seconds",
            "Time in the daemon of one RPC, by method and gRPC status code (streams: until their first message).",
            ("method", "code"),
            buckets=RPC_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._calls: dict[str, Calls] = {}
        self._bind_block_counters()
        self._bind_other_counters()
        self._task_up = Gauge(
            "kvservice_background_task_up",
            "1 while the background task runs, 0 after it died; a dead one also turns health to NOT_SERVING.",
            ("task",),
            registry=self.registry,
        )
        build = Gauge(
            "kvservice_build_info", "Always 1; the labels say what runs.", ("version", "python"), registry=self.registry
        )
        build.labels(version=version, python=platform.python_version()).set(1)
        # Resident memory, CPU time, open and allowed descriptors of this process.
        ProcessCollector(namespace="kvservice", registry=self.registry)

    def rpc(self, method: str) -> Calls:
        """The calls of a method such as "Lookup"; keep the result, so that a call costs no look-up."""
        if method not in self._calls:
            self._calls[method] = Calls(self._rpc_seconds, method)
        return self._calls[method]

    def background_task(self, task: str) -> Gauge:
        """The state of one background task: `.set(1)` when it starts, `.set(0)` when it died."""
        return self._task_up.labels(task=task)

    def watch(self, read: Callable[[], Snapshot]) -> None:
        """Have `read` called at every scrape, in the HTTP thread: it may read counts and lengths, and must not wait."""
        self.registry.register(_StateCollector(read))

    def _bind_block_counters(self) -> None:
        requested = self._counter(
            "kvservice_block_requests",
            "Blocks asked for by Get and Load, by outcome; a miss carries why (explain tells more about one block).",
            ("outcome", "reason"),
        )
        self.dram_hit_blocks = requested.labels(outcome="dram", reason="")
        self.nvme_hit_blocks = requested.labels(outcome="nvme", reason="")
        self.miss_blocks = _bind(
            (*MISS_REASONS, CANCELLED), lambda reason: requested.labels(outcome="miss", reason=reason)
        )
        looked_up = self._counter("kvservice_block_lookups", "Blocks asked for by Lookup, by outcome.", ("outcome",))
        self.lookup_held_blocks = looked_up.labels(outcome="held")
        self.lookup_miss_blocks = looked_up.labels(outcome="miss")
        put = self._counter("kvservice_block_puts", "Blocks asked for by Put, by outcome.", ("outcome",))
        self.put_blocks = _bind(PUT_OUTCOMES, lambda outcome: put.labels(outcome=outcome))
        self.committed_blocks = self._counter("kvservice_block_commits", "Blocks published by Commit.")
        dropped = self._counter(
            "kvservice_block_drops",
            "Blocks that left the store, by reason (evictions: capacity, quota).",
            ("reason",),
        )
        self.dropped_blocks = _bind(DropReason, lambda reason: dropped.labels(reason=reason.value))

    def _bind_other_counters(self) -> None:
        self.leased_bytes = self._counter(
            "kvservice_leased_bytes", "Bytes of the blocks handed to readers; clients copy them, the daemon does not."
        )
        self.committed_bytes = self._counter("kvservice_committed_bytes", "Bytes of the blocks published by Commit.")
        expired = self._counter(
            "kvservice_expirations", "Leases and reservations that ran out instead of being ended.", ("held",)
        )
        self.expired_leases = expired.labels(held="lease")
        self.expired_reservations = expired.labels(held="reservation")
        self.checksummed_blocks = self._counter("kvservice_checksums", "Block checksums made after commit.")
        self.checksum_failures = self._counter(
            "kvservice_checksum_failures", "Blocks whose bytes no longer match their checksum; each was dropped."
        )
        moved = self._counter("kvservice_transfer_bytes", "Bytes moved between tiers, by direction.", ("direction",))
        self.nvme_read_bytes = moved.labels(direction="nvme_to_dram")
        self.nvme_written_bytes = moved.labels(direction="dram_to_nvme")
        took = self._counter(
            "kvservice_transfer_seconds", "Time that transfers between tiers took, by direction.", ("direction",)
        )
        self.nvme_read_seconds = took.labels(direction="nvme_to_dram")
        self.nvme_written_seconds = took.labels(direction="dram_to_nvme")
        self.gpu_copies = GpuCopies(self.registry, bytes_moved=moved, seconds=took)
        self.nvme_given_up_blocks = self._counter(
            "kvservice_write_behind_given_up_blocks", "Committed blocks that no disk took: they live in DRAM only."
        )
        self.socket_calls = self._counter(
            "kvservice_socket_calls", "Unary RPCs that came over a call connection; the others came over gRPC."
        )
        self.refused_peers = self._counter(
            "kvservice_refused_peers", "Connections refused because the peer's identity is not allowed."
        )

    def _counter(self, name: str, about: str, labels: tuple[str, ...] = ()) -> Counter:
        # The client library appends "_total" to a counter's name.
        return Counter(name, about, labels, registry=self.registry)


class _StateCollector(Collector):
    """Turns one Snapshot into gauges at scrape time."""

    def __init__(self, read: Callable[[], Snapshot]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        # Told apart from collect, so that registering reads no state of a daemon that is still starting.
        families = [
            *((f"kvservice_{name}", about) for name, about in _GAUGES.items()),
            (_LAG, _LAG_ABOUT),
            *_TIER_GAUGES,
        ]
        return [*(GaugeMetricFamily(name, about) for name, about in families), *disk_families(())]

    def collect(self) -> Iterator[Metric]:
        snapshot = self._read()
        for name, about in _GAUGES.items():
            yield GaugeMetricFamily(f"kvservice_{name}", about, value=float(getattr(snapshot, name)))
        yield GaugeMetricFamily(_LAG, _LAG_ABOUT, value=snapshot.event_loop_lag_s)
        capacity, used, online = (GaugeMetricFamily(name, about, labels=("tier",)) for name, about in _TIER_GAUGES)
        for tier in snapshot.tiers:
            capacity.add_metric((tier.tier.value,), tier.capacity_bytes)
            used.add_metric((tier.tier.value,), tier.used_bytes)
            online.add_metric((tier.tier.value,), float(tier.online))
        yield from (capacity, used, online)
        yield from disk_families(snapshot.disks)


def _bind(keys: Iterable[Key], bind: Callable[[Key], Counter]) -> Mapping[Key, Counter]:
    return MappingProxyType({key: bind(key) for key in keys})
