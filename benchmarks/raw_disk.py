"""raw_disk: plain reads and writes as fast as they go: O_DIRECT, preadv and pwritev, a few threads, no service."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter

Place = tuple[int, int]
"""(descriptor, offset) of one block."""

Call = Callable[[int, Sequence[memoryview], int], int]


class RawDisk:
    """Blocks between memory and files, as many at once as there are threads."""

    def __init__(self, *, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)

    def read(self, places: Sequence[Place], memory: Sequence[memoryview]) -> float:
        """Seconds of reading a block from each place."""
        return self._timed(os.preadv, places, memory, flushed=())

    def write(self, places: Sequence[Place], memory: Sequence[memoryview]) -> float:
        """Seconds of writing a block to each place and flushing every file once."""
        return self._timed(os.pwritev, places, memory, flushed=dict.fromkeys(descriptor for descriptor, _ in places))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _timed(
        self, call: Call, places: Sequence[Place], memory: Sequence[memoryview], *, flushed: Iterable[int]
    ) -> float:
        def one(place: Place, block: memoryview) -> int:
            descriptor, offset = place
            return call(descriptor, [block], offset)

        started_s = perf_counter()
        sizes = list(self._pool.map(one, places, memory))
        for descriptor in flushed:
            os.fdatasync(descriptor)
        elapsed_s = perf_counter() - started_s
        assert sizes == [len(block) for block in memory], "fewer bytes than asked for"
        return elapsed_s


@contextmanager
def opened(paths: Sequence[Path], flags: int) -> Iterator[list[int]]:
    """Descriptors of the files, for direct access."""
    with ExitStack() as stack:
        descriptors = []
        for path in paths:
            descriptors.append(os.open(path, flags | os.O_DIRECT, 0o600))
            stack.callback(os.close, descriptors[-1])
        yield descriptors
