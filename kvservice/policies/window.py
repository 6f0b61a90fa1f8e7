"""window: which rows the waiting requests need, and which request comes to them first.

Shared prefixes count once: a row's order is that of the earliest request that needs it. Whole chains are added and
withdrawn by vector operations. A row that leaves the index takes its need along, so that its number can be used again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies.protocol import Orders


@dataclass(slots=True)
class _Waiting:
    """One request's need."""

    rows: Rows
    """Its chain, root first."""
    lives: NDArray[np.uint32]
    """Which life of each row is meant: a number used again is another block."""
    order: float


class Window:
    """The queue as eviction sees it. How many requests wait, and with how many rows, is bounded by the caller."""

    def __init__(self) -> None:
        self._exempt_until = math.inf
        self._waiting: dict[Hashable, _Waiting] = {}
        self._by_root: dict[int, dict[Hashable, None]] = {}
        self._orders = np.full(1024, math.inf, dtype=np.float64)
        self._requests = np.zeros(1024, dtype=np.int32)  # how many need the row
        self._lives = np.zeros(1024, dtype=np.uint32)

    def __len__(self) -> int:
        return len(self._waiting)

    def order_of(self, rows: Rows) -> Orders:
        """The order of the earliest request that needs each row; infinite where none does."""
        if len(rows):
            self._reach(int(rows.max()))
        return self._orders[rows]

    def is_exempt(self, row: int) -> bool:
        """Whether a request inside the eviction window needs the row."""
        return row < len(self._orders) and math.inf > self._orders[row] <= self._exempt_until

    def exempt(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of the rows a request inside the eviction window needs, as a mask."""
        orders = self.order_of(rows)
        return (orders <= self._exempt_until) & (orders < math.inf)

    def rows_of(self, request: Hashable) -> Rows:
        """What is left of the chain that the request waits for; empty where it is unknown."""
        waiting = self._waiting.get(request)
        if waiting is None:
            return np.zeros(0, dtype=np.int32)
        # A block leaves only after all behind it: what is left of a chain is its front.
        rows: Rows = waiting.rows[self._lives[waiting.rows] == waiting.lives]
        return rows

    def queue(self, request: Hashable, rows: Rows, order: float) -> Rows:
        """The request waits for the chain `rows` (root first) at that order; replaces what was said of it before.

        Returns:
            The rows whose order is another one now.
        """
        assert math.isfinite(order), "an order is finite"
        before = self.unqueue(request)
        if not len(rows):
            return before
        self._reach(int(rows.max()))
        self._waiting[request] = _Waiting(rows.copy(), self._lives[rows], order)
        self._by_root.setdefault(int(rows[0]), {})[request] = None
        self._requests[rows] += 1
        sooner: Rows = rows[self._orders[rows] > order]
        self._orders[sooner] = order
        return np.union1d(before, sooner).astype(np.int32) if len(before) else sooner

    def exempt_until(self, order: float) -> Rows:
        """The eviction window ends with that order, included; at first it has no end.

        Returns:
            Rows that may leave the store now and might not before.
        """
        before, self._exempt_until = self._exempt_until, order
        outside = [one for one in self._waiting.values() if order < one.order <= before]
        if not outside:
            return np.zeros(0, dtype=np.int32)
        alive = [one.rows[self._lives[one.rows] == one.lives] for one in outside]
        rows = np.unique(np.concatenate(alive)).astype(np.int32)
        return rows[self._orders[rows] > order]

    def unqueue(self, request: Hashable) -> Rows:
        """The request started or was cancelled; nothing happens where it is unknown.

        Returns:
            The rows whose order is another one now.
        """
        waiting = self._waiting.pop(request, None)
        if waiting is None:
            return np.zeros(0, dtype=np.int32)
        root = int(waiting.rows[0])
        beside = self._by_root[root]
        del beside[request]
        if not beside:
            del self._by_root[root]
        rows: Rows = waiting.rows[self._lives[waiting.rows] == waiting.lives]
        self._requests[rows] -= 1
        orders = np.full(len(rows), math.inf, dtype=np.float64)
        is_shared = self._requests[rows] > 0
        if is_shared.any():
            shared = len(rows) if is_shared.all() else int(np.argmin(is_shared))
            self._rank(rows[:shared], orders[:shared], [self._waiting[other] for other in beside])
            self._rank_elsewhere(rows, orders, is_shared & (orders == math.inf))
        changed: Rows = rows[self._orders[rows] != orders]
        self._orders[rows] = orders
        return changed

    def forget(self, row: int) -> None:
        """The row left the index."""
        if row < len(self._orders):
            self._orders[row] = math.inf
            self._requests[row] = 0
            self._lives[row] += 1

    def move(self, rows: Mapping[int, int]) -> Rows:
        """Every row has another number now, or none.

        Returns:
            The rows that waiting requests need, by their new numbers.
        """
        waiting = list(self._waiting.items())
        alive = [one.rows[self._lives[one.rows] == one.lives].tolist() for _, one in waiting]
        self._waiting, self._by_root = {}, {}
        self._orders[:], self._requests[:] = math.inf, 0
        for (request, one), old in zip(waiting, alive, strict=True):
            numbers = [rows.get(row, NO_ROW) for row in old]
            kept = numbers[: numbers.index(NO_ROW)] if NO_ROW in numbers else numbers
            self.queue(request, np.array(kept, dtype=np.int32), one.order)
        return np.flatnonzero(self._requests).astype(np.int32)

    def _rank(self, rows: Rows, orders: Orders, others: Sequence[_Waiting]) -> None:
        """Write into `orders` the earliest of the others that need each row; all rows are needed by at least one."""
        ranked = 0
        for other in sorted(others, key=lambda waiting: waiting.order):
            length = min(len(rows), len(other.rows))
            is_same = (other.rows[:length] == rows[:length]) & (other.lives[:length] == self._lives[rows[:length]])
            different = np.flatnonzero(~is_same)
            common = int(different[0]) if len(different) else length
            if common > ranked:
                orders[ranked:common] = other.order
                ranked = common
            if ranked == len(rows):
                return

    def _rank_elsewhere(self, rows: Rows, orders: Orders, left: NDArray[np.bool_]) -> None:
        """The same for rows that are part of chains with another beginning, as those of truncated conversations are."""
        if not left.any():
            return
        for other in sorted(self._waiting.values(), key=lambda waiting: waiting.order):
            alive = other.rows[self._lives[other.rows] == other.lives]
            found = left & np.isin(rows, alive)
            orders[found] = other.order
            left = left & ~found
            if not left.any():
                return

    def _reach(self, row: int) -> None:
        if row >= len(self._orders):
            more = max(row + 1, 2 * len(self._orders)) - len(self._orders)
            self._orders = np.concatenate([self._orders, np.full(more, math.inf)])
            self._requests = np.concatenate([self._requests, np.zeros(more, dtype=np.int32)])
            self._lives = np.concatenate([self._lives, np.zeros(more, dtype=np.uint32)])
