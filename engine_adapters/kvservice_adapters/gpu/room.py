"""room: who uses which blocks of the buffer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from kvservice_adapters.gpu.loads import Piece, Run
from kvservice_adapters.gpu.runs import Runs

_LEAST_SHARE = 8  # less than such a part of the buffer is not worth a call of its own
_WAIT_S = 2.0
_POLL_S = 100e-6


class Room:
    """The buffer's blocks. Thread-safe. Runs come free unseen: whoever takes one looks first which are over."""

    def __init__(self, memory: torch.Tensor) -> None:
        """`memory`: uint8 [blocks, block_size_bytes]."""
        self._memory = memory
        self._lock = threading.Lock()
        self._runs = Runs(len(memory))
        self._taken: list[Run] = []

    @property
    def free_blocks(self) -> int:
        """How many nobody uses."""
        with self._lock:
            self._reap()
            return self._runs.free_blocks

    def take(self, most: int, *, least: int) -> Run | None:
        """A run of up to `most` blocks, as many as lie side by side; None: fewer than `least` do."""
        with self._lock:
            self._reap()
            blocks = min(most, self._runs.longest)
            first = self._runs.allocate(blocks) if blocks >= least else None
            if first is None:
                return None
            run = Run(first, blocks, self._memory[first : first + blocks])
            self._taken.append(run)
            return run

    def wait(self, blocks: int, land: Callable[[Piece], object], *, ends_at_s: float) -> Run | None:
        """A run of so many blocks, or of fewer where that is all there is to be had soon; None: there is none.

        Blocks, while others' runs come free by themselves, or are emptied: what has arrived and no stream has come to
        yet is scattered now. Without that, an engine's thread would wait here for what it is to do itself afterwards.

        Args:
            land: scatters what has arrived.
            ends_at_s: by the monotonic clock.
        """
        run = self.take(blocks, least=blocks)
        # In halves, so that one is scattered while the other is filled.
        most = min(blocks, max(1, len(self._memory) // 2))
        least = min(blocks, max(1, len(self._memory) // _LEAST_SHARE))
        ends_at_s = min(ends_at_s, time.monotonic() + _WAIT_S)
        while run is None:
            run = self.take(most, least=least)
            arrived = [] if run is not None else [piece for piece in self.pieces() if piece.can_land]
            for piece in arrived:
                land(piece)
            if run is None and not arrived:
                if time.monotonic() > ends_at_s or not self._comes_free():
                    return None
                time.sleep(_POLL_S)
        return run

    def shorten(self, run: Run, blocks: int) -> None:
        """Only its first blocks are needed, and nobody touches the others."""
        with self._lock:
            self._runs.free(run.first + blocks, run.blocks - blocks)
            run.blocks, run.memory = blocks, run.memory[:blocks]

    def pieces(self) -> list[Piece]:
        """What is being loaded."""
        with self._lock:
            holders = [each() for run in self._taken for each in list(run.holders)]
        return [holder for holder in holders if isinstance(holder, Piece)]

    @property
    def is_still(self) -> bool:
        """Whether nothing touches any of it."""
        with self._lock:
            return all(run.is_still for run in self._taken)

    def _comes_free(self) -> bool:
        """Whether any run does; one into which a daemon is late, or whose blocks have no place yet, may never."""
        waiting = [piece.run for piece in self.pieces() if piece.waits_for_place]
        with self._lock:
            coming = [run for run in self._taken if run not in waiting]
            return any(run.load is None or not run.load.has_failed for run in coming)

    def _reap(self) -> None:
        for run in [run for run in self._taken if run.is_over]:
            self._taken.remove(run)
            self._runs.free(run.first, run.blocks)
