"""lookahead: first what no waiting request needs, then what the last of the queue needs (CachedAttention, 3.3.2)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

import numpy as np

from kvservice.blocks import Rows
from kvservice.policies.protocol import EvictionPolicy, Memories, Memory, Orders

_SLACK_ROWS = 4096


class LookAhead:
    """Another policy for the blocks that nobody waits for, with the queue on top.

    Blocks of the queue leave only when no others may, those of the latest request first and of one request the deepest
    first. That blocks inside the eviction window do not leave the store at all is for `is_evictable` to say.
    """

    def __init__(self, unneeded: EvictionPolicy, *, name: str) -> None:
        """Args:
        unneeded: orders what no waiting request needs.
        """
        self.name = name
        self._unneeded = unneeded
        self._orders = np.full(1024, math.inf)
        self._filed = np.zeros(1024, dtype=bool)  # has an entry in the heap
        self._heap: list[tuple[float, int, list[int]]] = []  # (-order, number, rows, the deepest last)
        self._number = 0
        self._heaped = 0
        self._needed = 0

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        self._unneeded.stored(rows, parents, now_s, memories)
        self._file(rows)

    def touch(self, rows: Rows, now_s: float) -> None:
        self._unneeded.touch(rows, now_s)
        self._file(rows)

    def released(self, rows: Rows) -> None:
        self._unneeded.released(rows)
        self._file(rows)

    def needed(self, rows: Rows, orders: Orders) -> None:
        if not len(rows):
            return
        self._reach(int(rows.max()))
        self._needed += int(np.count_nonzero(orders < math.inf)) - int(np.count_nonzero(self._orders[rows] < math.inf))
        self._orders[rows] = orders
        self._filed[rows] = False
        self._file(rows)

    def expect(self, rows: Rows, at_s: float) -> None:
        self._unneeded.expect(rows, at_s)

    def demoted(self, row: int) -> None:
        self._unneeded.demoted(row)

    def forget(self, row: int) -> Memory:
        if row < len(self._orders) and self._orders[row] < math.inf:
            self._orders[row], self._filed[row] = math.inf, False
            self._needed -= 1
        return self._unneeded.forget(row)

    def exposed(self, row: int) -> None:
        if self._needed and self._is_needed(row):
            if not self._filed[row]:
                self._push(-float(self._orders[row]), [row])
        else:
            self._unneeded.exposed(row)

    def victims(self, is_evictable: Callable[[int], bool], now_s: float) -> Iterator[int]:
        if not self._needed:
            yield from self._unneeded.victims(is_evictable, now_s)
            return
        yield from self._unneeded.victims(lambda row: not self._is_needed(row) and is_evictable(row), now_s)
        while self._heap:
            order, _, rows = self._heap[0]
            if not rows:
                heapq.heappop(self._heap)
                continue
            row = rows.pop()
            self._heaped -= 1
            if self._filed[row] and self._orders[row] == -order:
                self._filed[row] = False
                if is_evictable(row):
                    yield row

    def _is_needed(self, row: int) -> bool:
        return row < len(self._orders) and self._orders[row] < math.inf

    def _file(self, rows: Rows) -> None:
        """Give rows that are needed and have no entry in the heap one."""
        if not self._needed or not len(rows):
            return
        self._reach(int(rows.max()))
        rows = rows[(self._orders[rows] < math.inf) & ~self._filed[rows]]
        orders = self._orders[rows]
        for order in np.unique(orders).tolist():
            self._push(-order, rows[orders == order].tolist())
        if self._heaped > 2 * self._needed + _SLACK_ROWS:
            self._rewrite()

    def _push(self, key: float, rows: list[int]) -> None:
        self._filed[rows] = True
        self._number += 1
        self._heaped += len(rows)
        heapq.heappush(self._heap, (key, self._number, rows))

    def _rewrite(self) -> None:
        """Without the entries of rows that have another order by now."""
        kept: dict[int, None] = {}
        entries = []
        for key, number, rows in sorted(self._heap, reverse=True):
            current = [row for row in rows if self._filed[row] and self._orders[row] == -key and row not in kept]
            kept.update(dict.fromkeys(current))
            if current:
                entries.append((key, number, current))
        heapq.heapify(entries)
        self._heap, self._heaped = entries, len(kept)

    def _reach(self, row: int) -> None:
        if row >= len(self._orders):
            more = max(row + 1, 2 * len(self._orders)) - len(self._orders)
            self._orders = np.concatenate([self._orders, np.full(more, math.inf)])
            self._filed = np.concatenate([self._filed, np.zeros(more, dtype=bool)])
