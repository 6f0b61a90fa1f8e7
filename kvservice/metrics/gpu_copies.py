"""Series of the copies between DRAM and GPUs."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class GpuCopies:
    """Loads and saves that the daemon made by DMA. On the event loop.

    Args:
        registry: where the series live.
        bytes_moved, seconds: counters by the label `direction`, shared with the other movements.
    """

    def __init__(self, registry: CollectorRegistry, *, bytes_moved: Counter, seconds: Counter) -> None:
        copies = Counter(
            "kvservice_gpu_copies",
            "Copies between DRAM and a GPU that arrived: one for each load, or save, of some blocks.",
            ("direction",),
            registry=registry,
        )
        failures = Counter(
            "kvservice_gpu_copy_failures",
            "Copies between DRAM and a GPU that failed or did not begin; each is a miss for its engine.",
            ("direction",),
            registry=registry,
        )
        self._bytes = {way: bytes_moved.labels(direction=way) for way in ("dram_to_gpu", "gpu_to_dram")}
        self._seconds = {way: seconds.labels(direction=way) for way in self._bytes}
        self._copies = {way: copies.labels(direction=way) for way in self._bytes}
        self._failures = {way: failures.labels(direction=way) for way in self._bytes}

    def copied(self, way: str, size_bytes: int, seconds: float) -> None:
        """Count a copy that arrived; `seconds` from when it was asked for."""
        self._copies[way].inc()
        self._bytes[way].inc(size_bytes)
        self._seconds[way].inc(seconds)

    def failed(self, way: str) -> None:
        """Count one that did not."""
        self._failures[way].inc()
