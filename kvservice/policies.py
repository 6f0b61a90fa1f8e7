"""policies: in which order blocks leave when space is needed.

A policy sees rows of one namespace's index and never a byte. It only orders: whether a row may
leave (no holder, no block behind it) is the index's business, asked through `is_evictable`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from kvservice.blocks import Rows
from kvservice.errors import ConfigError


class EvictionPolicy(Protocol):
    """Orders rows for eviction. Deterministic: same calls, same order."""

    name: str

    def touch(self, rows: Rows) -> None:
        """The chain `rows` (root first) was used or stored just now."""
        ...

    def forget(self, row: int) -> None:
        """The row left the index; its number may be used again."""
        ...

    def exposed(self, row: int) -> None:
        """The last block behind `row` left: it is the end of its chain now."""
        ...

    def victims(self, is_evictable: Callable[[int], bool]) -> Iterator[int]:
        """Rows to evict, best first.

        The caller takes each row out of the index (calling `forget`, then `exposed` for its
        parent) before it asks for the next. Rows that are not evictable are passed over and
        come back at their next `touch` or `exposed`.
        """
        ...


class LeastRecentlyUsed:
    """Evicts what was used longest ago, the deepest block of a chain first.

    A log of touches instead of a linked list: a touch of a chain is two vector writes whatever
    its length, where a list in Python costs about a microsecond a block. An entry of the log is
    current only while it carries its row's latest stamp; stale ones are passed over, and the log
    is rewritten when they are the majority.
    """

    name = "lru"

    def __init__(self) -> None:
        self._stamps = np.zeros(1024, dtype=np.int64)  # a row's latest touch; 0: not in the log
        self._log: deque[tuple[np.ndarray, np.ndarray]] = deque()  # (rows, stamps), oldest first
        self._logged = 0
        self._current = 0
        self._clock = 0
        self._exposed: dict[int, None] = {}  # ends of chains whose turn has passed; last in, first out

    def touch(self, rows: Rows) -> None:
        if len(rows) == 0:
            return
        self._clock += 1
        self._reach(int(rows.max()))
        self._current += int(np.count_nonzero(self._stamps[rows] == 0))
        self._stamps[rows] = self._clock
        deepest_first = rows[::-1].copy()
        # A stride of zero: one number stands for the whole entry's stamps.
        self._log.append((deepest_first, np.broadcast_to(np.int64(self._clock), deepest_first.shape)))
        self._logged += len(rows)
        if self._logged > 2 * self._current + 4096:
            self._rewrite()

    def forget(self, row: int) -> None:
        if row < len(self._stamps) and self._stamps[row]:
            self._stamps[row] = 0
            self._current -= 1

    def exposed(self, row: int) -> None:
        # Still in the log: its turn comes there. Otherwise its turn has passed while blocks
        # behind it kept it, so it is older than everything in the log.
        if row >= len(self._stamps) or not self._stamps[row]:
            self._exposed[row] = None

    def victims(self, is_evictable: Callable[[int], bool]) -> Iterator[int]:
        while True:
            while self._exposed:
                row, _ = self._exposed.popitem()
                if (row >= len(self._stamps) or not self._stamps[row]) and is_evictable(row):
                    yield row
            if not self._log:
                return
            oldest = self._take_oldest()
            if oldest is not None and is_evictable(oldest):
                yield oldest

    def _take_oldest(self) -> int | None:
        rows, stamps = self._log[0]
        if len(rows) > 1:
            self._log[0] = (rows[1:], stamps[1:])
        else:
            self._log.popleft()
        self._logged -= 1
        row = int(rows[0])
        if self._stamps[row] != stamps[0]:
            return None
        self._stamps[row] = 0
        self._current -= 1
        return row

    def _rewrite(self) -> None:
        rows = np.concatenate([entry[0] for entry in self._log])
        stamps = np.concatenate([entry[1] for entry in self._log])
        current = self._stamps[rows] == stamps
        rows, stamps = rows[current], stamps[current]
        self._log.clear()
        # In pieces, so that taking from the front never holds on to the whole.
        for start in range(0, len(rows), 65_536):
            self._log.append((rows[start : start + 65_536].copy(), stamps[start : start + 65_536].copy()))
        self._logged = len(rows)

    def _reach(self, row: int) -> None:
        if row >= len(self._stamps):
            grown = np.zeros(max(row + 1, 2 * len(self._stamps)), dtype=np.int64)
            grown[: len(self._stamps)] = self._stamps
            self._stamps = grown


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LeastRecentlyUsed}


def make_policy(name: str) -> EvictionPolicy:
    """A fresh policy of that name.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    try:
        return POLICIES[name]()
    except KeyError:
        raise ConfigError(f"unknown policy {name!r}; choose one of: {', '.join(sorted(POLICIES))}") from None
