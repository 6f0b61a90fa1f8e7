"""Progress words: a page of memory per registration in which the GPU and the daemon tell an engine how far copies are.

What the words of a lane are is in `kvservice_cuda.copier`. The engine maps the page read-write (it must be able to end
its own streams' waits when this process is gone), so nothing here is ever read back.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

from kvservice.dram import address_of, sealed_memfd
from kvservice_cuda.copier import ENDED_BYTES, FAILED_BYTES, LANE_BYTES, WORD_BYTES, progress

LANES = 256
LANE_WORDS = LANE_BYTES // WORD_BYTES
PAGE_BYTES = LANES * LANE_BYTES


class ProgressPage:
    """The words of one registration."""

    def __init__(self) -> None:
        """Make the memory. Raises OSError."""
        self.size_bytes = PAGE_BYTES
        self.descriptor = sealed_memfd("kvservice-progress", PAGE_BYTES)
        self._memory = mmap.mmap(self.descriptor, PAGE_BYTES)
        self.address = address_of(self._memory)
        self.device_address = 0
        """As the GPU knows it, once it is pinned."""

    def lane_address(self, lane: int) -> int:
        """Where the GPU stores a lane's words."""
        return self.device_address + lane * LANE_BYTES

    def fail(self, lane: int, sequence: int, *, layers: int) -> None:
        """Say that the copy failed, and let nobody wait for it. No copy of it may be under way."""
        words = np.frombuffer(self._memory, dtype=np.uint64)[lane * LANE_WORDS :]
        words[FAILED_BYTES // WORD_BYTES] = sequence  # first: who sees that it ended must see this
        words[0] = progress(sequence, layers)
        words[ENDED_BYTES // WORD_BYTES] = sequence

    def close(self) -> None:
        """Give the memory back; the engine's mapping stays its own."""
        self._memory.close()
        os.close(self.descriptor)
