"""outcome: what a run measured, and as the row of the summary."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

GPU_HOUR_PRICE = 5.0
DRAM_GB_HOUR_PRICE = 0.0088
SSD_GB_HOUR_PRICE = 0.000082
"""Dollars: an A100, and memory and storage, as the paper takes them from AWS (CachedAttention, section 4.2)."""

_GB = 1e9


@dataclass(slots=True)
class Outcome:
    """One run: a policy at one size."""

    policy: str
    queue_window: int
    """Requests of the queue that eviction is told of; 0: none, -1: as many as wait."""
    dram_blocks: int
    nvme_blocks: int
    asked: list[int] = field(default_factory=list)
    """Blocks of each request, in order of arrival in the untimed replay, else of start."""
    dram_hits: list[int] = field(default_factory=list)
    nvme_hits: list[int] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    gpus: int = 0
    gpu_seconds: float = 0.0
    elapsed_s: float = 0.0
    fetched_blocks: int = 0
    """From NVMe into DRAM, by whomever."""
    written_blocks: int = 0
    """From DRAM to NVMe."""
    recomputed_blocks: int = 0
    """Held, and computed nevertheless: that was faster."""
    queue_mean: float = 0.0

    def hit_of(self, asked: int, *, dram: int, nvme: int) -> None:
        """The next request found that many of its blocks."""
        self.asked.append(asked)
        self.dram_hits.append(dram)
        self.nvme_hits.append(nvme)

    @property
    def hit_ratio(self) -> float:
        """Leading blocks held over all blocks."""
        return self.hit_ratio_from(0)

    def hit_ratio_from(self, first: int) -> float:
        """The same for the requests from number `first` on."""
        asked = sum(self.asked[first:])
        return (sum(self.dram_hits[first:]) + sum(self.nvme_hits[first:])) / asked if asked else 0.0

    @property
    def dram_hit_share(self) -> float:
        """Of the blocks held when their requests started, those that were in DRAM."""
        hits = sum(self.dram_hits) + sum(self.nvme_hits)
        return sum(self.dram_hits) / hits if hits else 0.0

    def cost(self, block_bytes: int) -> float:
        """Dollars per million tokens, prompts and replies: GPUs, memory and disk for as long as the GPUs worked."""
        if not self.tokens or not self.gpus:
            return 0.0
        hours = self.gpu_seconds / self.gpus / 3600
        dram_gb, nvme_gb = self.dram_blocks * block_bytes / _GB, self.nvme_blocks * block_bytes / _GB
        per_hour = self.gpus * GPU_HOUR_PRICE + dram_gb * DRAM_GB_HOUR_PRICE + nvme_gb * SSD_GB_HOUR_PRICE
        return hours * per_hour / self.tokens * 1e6

    def row(self, *, unique_blocks: int, reusable_blocks: int, block_bytes: int) -> dict[str, object]:
        """The row of summary.json.

        Args:
            unique_blocks: of the whole workload.
            reusable_blocks: how many hits nothing but the first uses would leave: those of an endless store.
        """
        hits = sum(self.dram_hits) + sum(self.nvme_hits)
        return {
            "policy": self.policy,
            "queue_window": self.queue_window,
            "dram_blocks": self.dram_blocks,
            "nvme_blocks": self.nvme_blocks,
            "dram_share": self.dram_blocks / unique_blocks,
            "hit_ratio": self.hit_ratio,
            "hit_ratio_second_half": self.hit_ratio_from(len(self.asked) // 2),
            "reusable_hit_ratio": hits / reusable_blocks if reusable_blocks else 0.0,
            "dram_hit_share": self.dram_hit_share,
            "ttft_ms_mean": 1e3 * float(np.mean(self.ttft_s)) if self.ttft_s else None,
            "ttft_ms_p50": 1e3 * float(np.percentile(self.ttft_s, 50)) if self.ttft_s else None,
            "ttft_ms_p99": 1e3 * float(np.percentile(self.ttft_s, 99)) if self.ttft_s else None,
            "queue_mean": self.queue_mean if self.ttft_s else None,
            "gpu_seconds": self.gpu_seconds if self.ttft_s else None,
            "bytes_moved": (self.fetched_blocks + self.written_blocks + sum(self.dram_hits)) * block_bytes
            if self.ttft_s
            else None,
            "bytes_written": self.written_blocks * block_bytes if self.ttft_s else None,
            "recomputed_share": self.recomputed_blocks / hits if self.recomputed_blocks else None,
            "cost": self.cost(block_bytes) if self.ttft_s else None,
        }
