"""What became of the blocks that Gets asked for: each is counted once, as it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import MappingProxyType
from typing import Self

import numpy as np

from kvservice.blocks import Tier
from kvservice.metrics import CANCELLED, MISS_REASONS, Metrics
from kvservice.status import HitCounts, MissLine
from kvservice.store import Namespace
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
        namespace: the one asked; its counters took every granted block for a hit.
        instance_id: who asked.
        started_s: when the call came, on time.perf_counter's clock.
    """

    def __init__(
        self, requests: BlockRequests, granted: Granted, namespace: Namespace, *, instance_id: int, started_s: float
    ) -> None:
        self._requests = requests
        self._spec = namespace.spec
        self._counters = namespace.counters
        self._instance_id = instance_id
        self._started_s = started_s
        self._blocks = granted.asked
        self._from_nvme = granted.from_nvme
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
        self._count_late_misses()
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
                self.missed(run.miss, run.blocks)
            else:
                self.handed_out(run.blocks)

    def handed_out(self, blocks: int) -> None:
        """Count blocks that the caller gets."""
        self._handed_out += blocks

    def missed(self, reason: pb.MissReason, blocks: int) -> None:
        """Count blocks that it does not get."""
        self._miss(MISS_REASONS[reason - 1], blocks)

    def _count_late_misses(self) -> None:
        late = self._from_nvme[self._handed_out :]
        if not len(late):
            return
        nvme = int(np.count_nonzero(late))
        self._counters.nvme_hits -= nvme
        self._counters.dram_hits -= len(late) - nvme
        self._counters.misses += len(late)

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
        nvme = int(np.count_nonzero(self._from_nvme[: self._handed_out]))
        dram = self._handed_out - nvme
        requests.dram += dram
        requests.nvme += nvme
        metrics.dram_hit_blocks.inc(dram)
        metrics.nvme_hit_blocks.inc(nvme)
        metrics.leased_bytes.inc(self._handed_out * self._stride_bytes)
        metrics.savings.count(self._handed_out * self._spec.tokens_per_block)
        metrics.operations.get[self._slowest].observe(seconds)
