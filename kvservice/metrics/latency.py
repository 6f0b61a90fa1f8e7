"""How long Get, Put and Prefetch take, by where the bytes were and how they travel; and how old evicted blocks were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Histogram

from kvservice.blocks import DropReason, Tier

SHARED_MEMORY = "shared_memory"
"""The plane label of bytes that clients read and write in the arena's mapping."""

OPERATION_SECONDS_BUCKETS = (
    100e-6,
    250e-6,
    500e-6,
    1e-3,
    2.5e-3,
    5e-3,
    10e-3,
    25e-3,
    50e-3,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    10,
)
"""From a hit in DRAM to a read that waits behind a busy disk."""

RESIDENCE_SECONDS_BUCKETS = (1, 10, 60, 300, 900, 3600, 3 * 3600, 12 * 3600, 86_400, 7 * 86_400)
"""From thrashing to a week."""

EVICTIONS = (DropReason.CAPACITY, DropReason.QUOTA, DropReason.RECLAIMED)
"""Drops that more room would have avoided."""


class Operations:
    """`kvservice_operation_duration_seconds`: what an engine waits for, longer than one RPC where bytes move.

    A Get lasts until its last block was handed out, and its tier is the slowest one that it needed ("none": nothing
    was held). A Put lasts from the reservation to the Commit that ends it. A Prefetch lasts from its submission until
    a transfer has landed in DRAM.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._histogram = Histogram(
            "kvservice_operation_duration_seconds",
            "Time of one get (until its last block was handed out), put (reservation to commit) or prefetch "
            "(submission to arrival in DRAM, per transfer), by the slowest tier it needed (none: nothing was held) and "
            "by the plane on which the bytes travel.",
            ("operation", "tier", "plane"),
            buckets=OPERATION_SECONDS_BUCKETS,
            registry=registry,
        )
        self.get: Mapping[Tier, Histogram] = MappingProxyType({tier: self._bind("get", tier.value) for tier in Tier})
        self.get_missed = self._bind("get", "none")
        self.put = self._bind("put", Tier.DRAM.value)
        self.prefetch = self._bind("prefetch", Tier.NVME.value)

    def _bind(self, operation: str, tier: str) -> Histogram:
        child: Histogram = self._histogram.labels(operation=operation, tier=tier, plane=SHARED_MEMORY)
        return child


class Evictions:
    """How long evicted blocks had been held, and how long unused."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._age = self._bind(
            "kvservice_evicted_block_age_seconds",
            "Time from commit (before a restart: from the last use known) to eviction, by reason.",
            EVICTIONS,
            registry,
        )
        self._idle = self._bind(
            "kvservice_evicted_block_idle_seconds",
            "Time from the last use to eviction, by reason. Short: the tiers are smaller than the working set.",
            EVICTIONS,
            registry,
        )

    def evicted(self, reason: DropReason, *, age_s: float, idle_s: float) -> None:
        """Count one block that left; reasons other than an eviction's are not counted here."""
        if reason in self._age:
            self._age[reason].observe(age_s)
            self._idle[reason].observe(idle_s)

    @staticmethod
    def _bind(
        name: str, about: str, reasons: Iterable[DropReason], registry: CollectorRegistry
    ) -> Mapping[DropReason, Histogram]:
        histogram = Histogram(name, about, ("reason",), buckets=RESIDENCE_SECONDS_BUCKETS, registry=registry)
        return MappingProxyType({reason: histogram.labels(reason=reason.value) for reason in reasons})
