"""The open segment files of a volume: a bounded number, those used longest ago closed first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvservice.nvme.files import Files


@dataclass(slots=True)
class _Open:
    descriptor: int
    holders: int = 0


class Descriptors:
    """Descriptors by segment. Blocks where a file must be opened; for threads."""

    def __init__(self, files: Files, path_of: Callable[[int], str], *, limit: int) -> None:
        """Args:
        path_of: where a segment's file is.
        limit: open at once; only those in use may exceed it.
        """
        self._files = files
        self._path_of = path_of
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def borrowed(self, segment_id: int) -> Iterator[int]:
        """The segment's descriptor, open for as long as the context lasts. Raises OSError."""
        descriptor = self.hold(segment_id)
        try:
            yield descriptor
        finally:
            self.let_go(segment_id)

    def hold(self, segment_id: int) -> int:
        """The segment's descriptor; stays open until `let_go`, once for each hold. Raises OSError."""
        with self._lock:
            found = self._open.get(segment_id)
            if found is None:
                self._close_idle(self._limit - 1)
                path = self._path_of(segment_id)
                found = self._open[segment_id] = _Open(self._files.open(path, direct=True, create=True))
            found.holders += 1
            self._open.move_to_end(segment_id)
            return found.descriptor

    def let_go(self, segment_id: int) -> None:
        """One holder less."""
        with self._lock:
            self._open[segment_id].holders -= 1

    def close(self) -> None:
        """Close all; nobody uses any."""
        with self._lock:
            for opened in self._open.values():
                self._files.close(opened.descriptor)
            self._open.clear()

    def _close_idle(self, remaining: int) -> None:
        idle = [segment_id for segment_id, opened in self._open.items() if not opened.holders]
        for segment_id in idle[: max(0, len(self._open) - remaining)]:
            self._files.close(self._open.pop(segment_id).descriptor)
