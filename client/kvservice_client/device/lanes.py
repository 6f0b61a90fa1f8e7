"""Lanes: the words in pinned memory by which this process and its GPU's streams follow copies.

Whoever copies stores the progress from the GPU, behind the bytes. A stream of the engine waits on a word without the
CPU; the CPU reads the same words. When the copying side is gone, `release` ends the streams' waits from here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

from kvservice_client.errors import DaemonUnreachable, Overloaded
from kvservice_cuda.copier import ENDED_BYTES, FAILED_BYTES, LANE_BYTES, LAYER_BITS, WORD_BYTES, progress
from kvservice_cuda.driver import Context

_MADV_DONTFORK = 10
_ALL_LAYERS = (1 << LAYER_BITS) - 1  # more than any copy has: past every wait
_WORDS = LANE_BYTES // WORD_BYTES

_kept: list[mmap.mmap] = []
"""Pages stay mapped and pinned for the life of the process: a stream may still have to look at one of a daemon that is
gone. One page of 8 KiB for each attachment."""


class Lanes:
    """The lanes of one page. Thread-safe."""

    def __init__(self, context: Context, *, lanes: int, descriptor: int = -1, size_bytes: int = 0) -> None:
        """Map the page behind the descriptor and take that over, or make one of this process's own.

        Raises:
            DaemonUnreachable: the page is too small. CudaError, OSError.
        """
        needed_bytes = lanes * LANE_BYTES
        try:
            if descriptor >= 0 and size_bytes < needed_bytes:
                raise DaemonUnreachable(f"progress words of {size_bytes} bytes for {lanes} lanes")
            self._memory = mmap.mmap(descriptor, needed_bytes)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        _kept.append(self._memory)
        self._memory.madvise(_MADV_DONTFORK)
        self._words = (ctypes.c_uint64 * (lanes * _WORDS)).from_buffer(self._memory)
        self._device_address = context.pin(ctypes.addressof(self._words), needed_bytes)
        self._lock = threading.Lock()
        self._free = list(range(lanes))
        self._sequences = [0] * lanes

    def take(self) -> tuple[int, int]:
        """A lane that nobody uses, and the sequence number of its next copy. Raises Overloaded: there is none."""
        with self._lock:
            if not self._free:
                raise Overloaded(f"{len(self._sequences)} copies are under way")
            lane = self._free.pop()
            self._sequences[lane] += 1
            return lane, self._sequences[lane]

    def give_back(self, lane: int) -> None:
        """Nothing will store to the lane any more."""
        with self._lock:
            self._free.append(lane)

    def device_address(self, lane: int) -> int:
        """Where the lane is, as streams know it."""
        return self._device_address + lane * LANE_BYTES

    def has_ended(self, lane: int, sequence: int) -> bool:
        """Whether no byte of the copy moves any more."""
        return self._word(lane, ENDED_BYTES) >= sequence

    def has_failed(self, lane: int, sequence: int) -> bool:
        """Whether not all bytes of the copy arrived, as far as known: ask after it ended."""
        return self._word(lane, FAILED_BYTES) >= sequence

    def layers_done(self, lane: int, sequence: int) -> int:
        """How many of the copy's layers are there."""
        word = self._word(lane, 0)
        return word & _ALL_LAYERS if word >> LAYER_BITS == sequence else 0

    def release(self, lane: int, sequence: int) -> None:
        """Let no stream wait for the copy. To be repeated until it has ended: a late store may take it back."""
        if self._word(lane, 0) < progress(sequence, _ALL_LAYERS):
            self._words[lane * _WORDS] = progress(sequence, _ALL_LAYERS)

    def _word(self, lane: int, offset_bytes: int) -> int:
        return int(self._words[lane * _WORDS + offset_bytes // WORD_BYTES])
