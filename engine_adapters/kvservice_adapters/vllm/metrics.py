"""metrics: what the adapter did and did not do, as vLLM's own metrics carry it."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter as PromCounter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvservice_adapters.vllm.counters import SEPARATOR

SERIES = {
    "lookups": "Requests that were looked up in the store.",
    "hit_blocks": "Blocks that the store held and the engine did not.",
    "late_lookups": "Requests that were computed because their lookup took too long.",
    "failed_lookups": "Lookups that the daemon did not answer, by reason; the requests were computed.",
    "prefetches": "Requests whose blocks were fetched from NVMe ahead of their turn.",
    "loaded_blocks": "Blocks that were loaded instead of computed.",
    "loaded_bytes": "Bytes of loaded blocks.",
    "load_seconds": "Time that loads took, all together.",
    "unloaded_blocks": "Blocks that a load was promised and did not get, by reason; they were computed.",
    "shifted_blocks": "Loaded blocks of truncated sessions whose keys were turned to their new positions.",
    "truncated_requests": "Requests that began with parts of a conversation, whose blocks were looked for.",
    "refused_truncations": "Requests whose truncation was refused, by reason; they were computed.",
    "saved_blocks": "Blocks that were saved.",
    "saved_bytes": "Bytes of saved blocks.",
    "held_blocks": "Blocks that needed no saving: the store has them, or is being given them.",
    "unsaved_blocks": "Blocks that were not saved, by reason.",
    "hook_errors": "Unexpected errors in the adapter, by type; each cost reuse, never a request.",
}
"""Every count by its name; Prometheus calls it vllm:kvservice_<name>_total."""


class AdapterStats(KVConnectorStats):
    """Counts of one interval; `data` maps a name, or name:reason, to a sum."""

    data: dict[str, float]

    def reset(self) -> None:
        """Start anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both together."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        return {f"kvservice {name.replace('_', ' ')}": round(amount, 3) for name, amount in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class AdapterPromMetrics(KVConnectorPromMetrics):
    """The series on vLLM's /metrics page."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._series = {
            name: metric_types[PromCounter](
                name=f"vllm:kvservice_{name}", documentation=about, labelnames=[*labelnames, "reason"]
            )
            for name, about in SERIES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's counts."""
        for key, amount in transfer_stats_data.items():
            name, _, reason = key.partition(SEPARATOR)
            self._series[name].labels(*self.per_engine_labelvalues[engine_idx], reason).inc(amount)
