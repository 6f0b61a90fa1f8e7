"""What became of the blocks that were read from NVMe ahead of need, and of the requests that they were read for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Histogram

LEAD_SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0)
"""From the nick of time to long before."""

START_STATES = ("ready", "late", "absent", "nothing_held")
"""Where the blocks held for a queued request were when it started."""


class Prefetches:
    """Counters of the look-ahead."""

    def __init__(self, registry: CollectorRegistry) -> None:
        blocks = Counter(
            "kvservice_prefetch_blocks",
            "Blocks read from NVMe because somebody will need them, by what became of it: started; then useful (in "
            "DRAM before a Get wanted it), late (a Get had to wait), wasted (left DRAM unused) or cancelled (unread).",
            ("outcome",),
            registry=registry,
        )
        self.started = blocks.labels(outcome="started")
        self.useful = blocks.labels(outcome="useful")
        self.late = blocks.labels(outcome="late")
        self.wasted = blocks.labels(outcome="wasted")
        self.cancelled = blocks.labels(outcome="cancelled")
        starts = Counter(
            "kvservice_prefetch_request_starts",
            "Queued requests that started, by where the blocks held for them were: ready (all in DRAM), late (some on "
            "their way), absent (some not even that) or nothing_held.",
            ("blocks",),
            registry=registry,
        )
        self.request_starts: Mapping[str, Counter] = MappingProxyType(
            {state: starts.labels(blocks=state) for state in START_STATES}
        )
        self.lead_seconds = Histogram(
            "kvservice_prefetch_lead_seconds",
            "Time between the end of the last fetch for a queued request and its start.",
            buckets=LEAD_SECONDS_BUCKETS,
            registry=registry,
        )
