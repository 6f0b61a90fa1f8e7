"""metrics: every Prometheus series, in one place."""

from kvservice.metrics.latency import SHARED_MEMORY, Operations
from kvservice.metrics.savings import Savings
from kvservice.metrics.series import (
    CANCELLED,
    MISS_REASONS,
    PUT_OUTCOMES,
    Calls,
    Metrics,
    Snapshot,
    TierGauge,
)

__all__ = [
    "CANCELLED",
    "MISS_REASONS",
    "PUT_OUTCOMES",
    "SHARED_MEMORY",
    "Calls",
    "Metrics",
    "Operations",
    "Savings",
    "Snapshot",
    "TierGauge",
]
