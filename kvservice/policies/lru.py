"""lru: evicts what was used longest ago, the deepest block of a chain first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies.order import PlacedOrder, Stamps
from kvservice.policies.protocol import NO_MEMORY, Memories, Memory, Orders


class LeastRecentlyUsed:
    """Recency alone; knows nothing of the queue."""

    name = "lru"

    def __init__(self) -> None:
        self._stamps = Stamps()
        self._order = PlacedOrder(self._stamps)

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        self._order.place(rows[::-1])

    def touch(self, rows: Rows, now_s: float) -> None:
        self._order.place(rows[::-1])

    def released(self, rows: Rows) -> None:
        self._order.place(rows[::-1])

    def needed(self, rows: Rows, orders: Orders) -> None:
        pass

    def expect(self, rows: Rows, at_s: float) -> None:
        pass

    def demoted(self, row: int) -> None:
        self._stamps.remove(row)

    def forget(self, row: int) -> Memory:
        self._stamps.remove(row)
        return NO_MEMORY

    def exposed(self, row: int) -> None:
        # If its turn has passed while blocks behind it kept it, it is older than everything in the log.
        self._order.recall(row)

    def victims(self, is_evictable: Callable[[int], bool], now_s: float) -> Iterator[int]:
        while (row := self._order.take()) != NO_ROW:
            if is_evictable(row):
                yield row
