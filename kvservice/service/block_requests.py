"""What became of the blocks that Gets asked for: each is counted once, as it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import MappingProxyType
from typing import Self

from kvservice.blocks import NamespaceSpec, Tier
from kvservice.metrics import CANCELLED, MISS_REASONS, Metrics
from kvservice.status import HitCounts, MissLine
from kvservice.store.outcomes import Granted
from kvservice_proto.v1 import kvservice_pb2 as pb

MISSES_MAX = 12


class BlockRequests:
    """Totals for the status page and the series; on the event loop."""

    def __init__(self, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        self.metrics = metrics
        self.clock = clock
        self.started_at_s = clock()
        self.dram = 0
        self.nvme = 0
        self.misses: dict[str, int] = {}
        self.recent: deque[MissLine] = deque(maxlen=MISSES_MAX)
        """Gets that missed something, the newest last."""

    def counts(self) -> HitCounts:
        """The totals now, as a value of their own."""
        return HitCounts(self.dram, self.nvme, MappingProxyType(dict(self.misses)))

    def missed(self, reason: str, blocks: int) -> None:
        """Count misses."""
        self.misses[reason] = self.misses.get(reason, 0) + blocks
        self.metrics.miss_blocks[reason].inc(blocks)


class RequestedBlocks:
    """The blocks of one Get. A context manager: what was neither handed out nor a miss at its end was cancelled.

    Args:
        requests: the totals.
        granted: what the store answered.
        spec: the namespace asked.
        instance_id: who asked.
        started_s: when the call came, on time.perf_counter's clock.
    """

    def __init__(
        self, requests: BlockRequests, granted: Granted, spec: NamespaceSpec, *, instance_id: int, started_s: float
    ) -> None:
        self._requests = requests
        self._spec = spec
        self._instance_id = instance_id
        self._started_s = started_s
        self._blocks = len(granted.slots) + granted.missed
        self._dram_blocks = len(granted.slots) - granted.nvme_blocks
        self._slowest = Tier.NVME if granted.pending else Tier.DRAM
        self._stride_bytes = granted.pool.stride_bytes
        self._handed_out = 0
        self._missed = 0
        self._first_reason = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        left = self._blocks - self._handed_out - self._missed
        if left > 0:
            self._miss(CANCELLED, left)
        self._count_hits()
        if self._missed:
            requests = self._requests
            requests.recent.append(
                MissLine(
                    at_s=requests.clock(),
                    instance_id=self._instance_id,
                    label=self._spec.label,
                    missed_blocks=self._missed,
                    requested_blocks=self._blocks,
                    reason=self._first_reason,
                )
            )

    def answered(self, response: pb.GetResponse) -> None:
        """Count what one message of the answer says."""
        for run in response.runs:
            if run.WhichOneof("outcome") == "miss":
                self._miss(MISS_REASONS[run.miss - 1], run.blocks)
            else:
                self._handed_out += run.blocks

    def _miss(self, reason: str, blocks: int) -> None:
        self._first_reason = self._first_reason or reason
        self._missed += blocks
        self._requests.missed(reason, blocks)

    def _count_hits(self) -> None:
        requests, metrics = self._requests, self._requests.metrics
        seconds = time.perf_counter() - self._started_s
        if not self._handed_out:
            metrics.operations.get_missed.observe(seconds)
            return
        dram = min(self._handed_out, self._dram_blocks)
        nvme = self._handed_out - dram
        requests.dram += dram
        requests.nvme += nvme
        metrics.dram_hit_blocks.inc(dram)
        metrics.nvme_hit_blocks.inc(nvme)
        metrics.leased_bytes.inc(self._handed_out * self._stride_bytes)
        metrics.savings.count(self._handed_out * self._spec.tokens_per_block)
        metrics.operations.get[self._slowest].observe(seconds)
