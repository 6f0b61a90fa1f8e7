"""saves: blocks that were gathered into the buffer, until they are saved."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvservice_adapters.gpu.loads import Run
from kvservice_adapters.gpu.streams import Event
from kvservice_client import InvalidRequest


class Gathered:
    """Blocks in the buffer, in the order in which they were named. To be saved or discarded, once.

    Attributes:
        blocks: how many.
        after: when their bytes are there.
        is_done: whether nobody reads them any more.
    """

    def __init__(self, run: Run, first: int, blocks: int, after: Event) -> None:
        """Of the run's blocks those from `first` on."""
        self.blocks = blocks
        self.after = after
        self.is_done = False
        self._run = run
        self._first = first
        self._lock = threading.Lock()
        self._is_claimed = False
        run.hold(self)

    @property
    def block_ids(self) -> range:
        """Where they are in the buffer."""
        first = self._run.first + self._first
        return range(first, first + self.blocks)

    def split(self, sizes: Sequence[int]) -> list[Gathered]:
        """The same blocks in parts of these sizes, each to be saved or discarded for itself, instead of this.

        Raises:
            InvalidRequest: the sizes do not add up, or these blocks were saved, discarded or split before.
        """
        if sum(sizes) != self.blocks or min(sizes, default=0) < 0:
            raise InvalidRequest(f"parts of {list(sizes)} blocks of {self.blocks}")
        with self.spent():
            firsts = [self._first + sum(sizes[:place]) for place in range(len(sizes))]
            return [Gathered(self._run, first, size, self.after) for first, size in zip(firsts, sizes, strict=True)]

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Use them for the last time. Raises InvalidRequest: they were used before."""
        with self._lock:
            if self._is_claimed:
                raise InvalidRequest("these blocks were saved or discarded before")
            self._is_claimed = True
        try:
            yield
        finally:
            self.is_done = True
