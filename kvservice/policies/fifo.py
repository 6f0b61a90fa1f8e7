"""fifo: evicts what came in first, the deepest block of a chain first, however often it was used since."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies.order import PlacedOrder, Stamps
from kvservice.policies.protocol import NO_MEMORY, Memories, Memory, Orders


class FirstInFirstOut:
    """Age in the tier alone: for comparison, and for data that is used once."""

    name = "fifo"

    def __init__(self) -> None:
        self._stamps = Stamps()
        self._order = PlacedOrder(self._stamps)
        self._passed: set[int] = set()  # still in the tier, their turn has passed

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        self._order.place(rows[::-1])

    def touch(self, rows: Rows, now_s: float) -> None:
        self.released(rows)

    def released(self, rows: Rows) -> None:
        absent = rows[~self._stamps.is_placed(rows)]
        is_passed = np.fromiter((row in self._passed for row in absent.tolist()), dtype=bool, count=len(absent))
        self._order.place(absent[~is_passed][::-1])
        for row in absent[is_passed].tolist():
            self._order.recall(row)

    def needed(self, rows: Rows, orders: Orders) -> None:
        pass

    def expect(self, rows: Rows, at_s: float) -> None:
        pass

    def demoted(self, row: int) -> None:
        self._passed.discard(row)
        self._stamps.remove(row)

    def forget(self, row: int) -> Memory:
        self.demoted(row)
        return NO_MEMORY

    def exposed(self, row: int) -> None:
        self._order.recall(row)

    def victims(self, is_evictable: Callable[[int], bool], now_s: float) -> Iterator[int]:
        while (row := self._order.take()) != NO_ROW:
            if is_evictable(row):
                yield row
            else:
                self._passed.add(row)
