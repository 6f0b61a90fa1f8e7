"""copier: blocks across the bus by the GPU's copy engines, in one direction, layer by layer.

Rows and large pieces go on the main stream. Small pieces leave a copy engine idle between two of them; several streams
fill the gaps (64 KiB pieces: 34 GB/s on one stream, 52 GB/s on sixteen, of 55), but each slows the engine a little: the
GPU gives another process's streams time slices of their own. The main stream joins them after each group of layers and
stores the progress where the waiting side, the GPU's streams or a CPU, can see it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from kvservice_cuda.api import CudaError
from kvservice_cuda.driver import Batch, Handle
from kvservice_cuda.plan import Pieces, Plan, Rows


class Direction(Enum):
    """Which way bytes go."""

    LOAD = "load"  # host to GPU
    SAVE = "save"


_STREAMS_MAX = 16
_BYTES_PER_STREAM = 1 << 20  # pieces of so many bytes fill the bus on one stream, of half as many on two
_GROUPS_AT_ONCE = 3  # groups of layers between which streams may be apart
_SHARE_PIECES_MIN = 16  # fewer are not worth another stream
# Progress is told after so much at least: smaller batches cost more than they carry. Nobody waits within a save.
_PROGRESS_BYTES = {Direction.LOAD: 16 << 20, Direction.SAVE: 1 << 62}

LAYER_BITS = 16
"""A progress word is the sequence number of a copy, shifted by so much, plus how many of its layers are done."""

WORD_BYTES = 8
LANE_BYTES = 4 * WORD_BYTES
"""A lane follows one copy at a time: its progress; the sequence of the last one that ended, stored after everything
else; the sequence of the last one that failed; and a word to fill up."""
ENDED_BYTES, FAILED_BYTES = 8, 16
"""Where in a lane those are."""


class Queue(Protocol):
    """What a copier needs of a GPU's context (`driver.Context`)."""

    def current(self) -> AbstractContextManager[None]: ...
    def stream(self, *, urgent: bool = False) -> Handle: ...
    def end_stream(self, stream: Handle) -> None: ...
    def event(self) -> Handle: ...
    def end_event(self, event: Handle) -> None: ...
    def record(self, event: Handle, stream: Handle) -> None: ...
    def synchronize(self, stream: Handle) -> None: ...
    def order_after(self, stream: Handle, event: Handle) -> None: ...
    def write_flag(self, stream: Handle, address: int, value: int) -> None: ...
    def copy_rows(self, stream: Handle, rows: Rows, *, to_device: bool) -> None: ...
    def copy_batch(self, stream: Handle, batch: Batch) -> None: ...


@dataclass(frozen=True, slots=True)
class _Batch:
    """Three contiguous arrays, in the order of the direction."""

    destinations: np.ndarray
    sources: np.ndarray
    sizes: np.ndarray

    @property
    def pieces(self) -> int:
        return len(self.sizes)

    @property
    def destinations_address(self) -> int:
        return int(self.destinations.ctypes.data)

    @property
    def sources_address(self) -> int:
        return int(self.sources.ctypes.data)

    @property
    def sizes_address(self) -> int:
        return int(self.sizes.ctypes.data)


def progress(sequence: int, layers: int) -> int:
    """The word that says: of copy `sequence`, so many layers are done."""
    return (sequence << LAYER_BITS) + layers


class Copier:
    """The streams of one direction of one GPU. One thread at a time may submit."""

    def __init__(self, queue: Queue, direction: Direction) -> None:
        """Raises CudaError."""
        self._queue = queue
        self._direction = direction
        self._main = queue.stream()
        # Made when small pieces first need them: each takes some megabytes of the GPU.
        self._streams: list[Handle] = []
        self._events: list[Handle] = []
        self._ends = [queue.event() for _ in range(_GROUPS_AT_ONCE)]
        self._next = 0

    def submit(
        self,
        plan: Plan,
        blocks: np.ndarray,
        host: np.ndarray,
        *,
        lane_address: int,
        sequence: int,
        has_begun: Callable[[], None] = lambda: None,
    ) -> None:
        """Queue everything; the lane's words follow. Does not wait for bytes.

        Args:
            blocks, host: see `Plan.moves`.
            lane_address: of the lane in pinned memory, as the GPU knows it.
            has_begun: called when the first group of layers is queued, where there are more.

        Raises:
            CudaError: some of it may be queued and will run.
        """
        is_load = self._direction is Direction.LOAD
        with self._queue.current():
            groups = plan.moves(blocks, host, group_bytes=_PROGRESS_BYTES[self._direction])
            for number, moves in enumerate(groups):
                if number == 1:
                    has_begun()
                end = self._ends[number % _GROUPS_AT_ONCE]
                used = self._share_out(moves.pieces, after=end if number >= _GROUPS_AT_ONCE else 0)
                for rows in moves.rows:
                    self._queue.copy_rows(self._main, rows, to_device=is_load)
                for stream in used:
                    self._queue.order_after(self._main, self._events[stream])
                self._queue.record(end, self._main)
                self._queue.write_flag(self._main, lane_address, progress(sequence, moves.layers_done))
            self._queue.write_flag(self._main, lane_address + ENDED_BYTES, sequence)

    def finish_event(self) -> Handle:
        """A new event that is over when all that was submitted is done; the caller ends it. Raises CudaError."""
        event = self._queue.event()
        with self._queue.current():
            self._queue.record(event, self._main)
        return event

    def drain(self) -> None:
        """Wait until nothing that was submitted moves any more, also where the GPU is lost. Blocks."""
        for stream in (*self._streams, self._main):
            with suppress(CudaError):  # a lost context runs nothing
                self._queue.synchronize(stream)

    def close(self) -> None:
        """Give the streams back. What is queued still runs."""
        for event in (*self._events, *self._ends):
            self._queue.end_event(event)
        for stream in (*self._streams, self._main):
            self._queue.end_stream(stream)

    def _share_out(self, pieces: Pieces, *, after: Handle) -> list[int]:
        """Give each stream a share, to begin when the event `after` (0: none) has passed; which got some.

        The GPU gives streams time in slices that are longer than a layer takes: without the event one stream would
        copy its shares of many layers before another begins with the first.
        """
        used: list[int] = []
        parts = shares(pieces)
        if len(parts) == 1:
            self._queue.copy_batch(self._main, self._batch(pieces))
            return used
        while len(self._streams) < len(parts):
            self._streams.append(self._queue.stream())
            self._events.append(self._queue.event())
        for share in parts:
            stream = self._next
            if after:
                self._queue.order_after(self._streams[stream], after)
            self._queue.copy_batch(self._streams[stream], self._batch(pieces[share]))
            self._queue.record(self._events[stream], self._streams[stream])
            used.append(stream)
            self._next = (stream + 1) % len(self._streams)
        return used

    def _batch(self, pieces: Pieces) -> _Batch:
        is_load = self._direction is Direction.LOAD
        ends = (pieces.device, pieces.host) if is_load else (pieces.host, pieces.device)
        return _Batch(*ends, pieces.sizes)


def shares(pieces: Pieces) -> list[slice]:
    """Cut pieces, of about one length, into one share per stream: the smaller they are, the more."""
    if not len(pieces):
        return []
    streams = min(_STREAMS_MAX, max(1, _BYTES_PER_STREAM * len(pieces) // pieces.size_bytes))
    pieces_per_share = max(_SHARE_PIECES_MIN, -(-len(pieces) // streams))
    return [slice(start, start + pieces_per_share) for start in range(0, len(pieces), pieces_per_share)]
