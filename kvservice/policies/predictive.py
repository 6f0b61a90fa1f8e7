"""predictive: evicts what is least likely to be used soon for the time that it would be kept, as learned from what was.

Blocks are sorted into kinds by what is known of them when they are used: how often they were used before and how
long ago the last time; of new ones, how many came at once and whether they end their chain. `reuse` learns how soon
blocks of each kind are used again. Each kind is in order of last use, and the victim is the oldest block of the kind
whose oldest block is worth least. While nothing is known that is the block used longest ago.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies.order import PlacedOrder, Stamps
from kvservice.policies.protocol import NO_MEMORY, Memories, Memory, Orders
from kvservice.policies.reuse import ReuseModel

_STORED_AT_ONCE = (2, 8, 32)
"""New blocks are of one kind up to so many stored at once, and of another above the last."""

_GAPS_S = (32, 128, 512)
"""Used blocks are of one kind when their last use was less than so long ago, and of another above the last."""

_USES_MAX = 3
"""More uses than this are not told apart."""

_NEW_KINDS = len(_STORED_AT_ONCE) + 1
_GAP_KINDS = len(_GAPS_S) + 1
_END = _NEW_KINDS + _USES_MAX * _GAP_KINDS

KINDS: tuple[str, ...] = (
    *(f"new, {text} at once" for text in ("up to 2", "up to 8", "up to 32", "more than 32")),
    *(
        f"{times}, {gap} apart"
        for times in ("used once", "used twice", "used thrice or more")
        for gap in ("under 32 s", "under 128 s", "under 512 s", "longer")
    ),
    "new, end of its chain",
)
"""Every kind of block in words; those with as many uses are one family."""

_FAMILIES = (*[0] * _NEW_KINDS, *(uses for uses in range(1, _USES_MAX + 1) for _ in range(_GAP_KINDS)), 0)

_FINISHED, _EXPECTED = len(KINDS), len(KINDS) + 1
"""Orders besides those of the kinds: what the application says will not, or will, be used."""

_LATE_S = 60
"""An expected use that is so late is not expected any more."""

_USED_SHIFT, _SHARE_SHIFT, _KIND_SHIFT = 32, 16, 8


class Predictive:
    """Orders blocks that no waiting request needs by when they are likely to be used; see the module."""

    name = "predictive"

    def __init__(self) -> None:
        self.model = ReuseModel(_FAMILIES)
        self._stamps = Stamps()
        self._orders = [PlacedOrder(self._stamps) for _ in range(len(KINDS) + 2)]
        self._order_of = np.zeros(1024, dtype=np.uint8)
        self._kind = np.zeros(1024, dtype=np.uint8)
        self._uses = np.zeros(1024, dtype=np.uint8)
        self._share = np.zeros(1024, dtype=np.uint16)  # how many rows are one observation together
        self._used_at = np.zeros(1024, dtype=np.int64)  # whole seconds
        self._expected_at_s: dict[int, float] = {}
        self._changed: set[int] = set()  # orders whose first row may be another one since it was looked at

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        if not len(rows):
            return
        self._reach(int(rows.max()))
        now = self.model.advance(now_s)
        is_known = memories != NO_MEMORY
        new = len(rows) - int(np.count_nonzero(is_known))
        kinds = np.full(len(rows), np.searchsorted(_STORED_AT_ONCE, new), dtype=np.uint8)
        kinds[-1] = _END
        self._uses[rows] = 0
        if new < len(rows):
            back, known = rows[is_known], memories[is_known]
            self._used_at[back] = known >> _USED_SHIFT
            self._share[back] = known >> _SHARE_SHIFT & 0xFFFF
            self._kind[back] = known >> _KIND_SHIFT & 0xFF
            self._uses[back] = known & 0xFF
            kinds[is_known] = self._used(back, now)
        self._begin(rows, kinds, now)

    def touch(self, rows: Rows, now_s: float) -> None:
        if not len(rows):
            return
        self._reach(int(rows.max()))
        now = self.model.advance(now_s)
        self._begin(rows, self._used(rows, now), now)

    def released(self, rows: Rows) -> None:
        for row in rows[~self._stamps.is_placed(rows)].tolist():
            self.exposed(row)

    def needed(self, rows: Rows, orders: Orders) -> None:
        pass

    def expect(self, rows: Rows, at_s: float) -> None:
        if not len(rows):
            return
        self._reach(int(rows.max()))
        self._expected_at_s.update(dict.fromkeys(rows.tolist(), at_s))
        self._place(rows, _FINISHED if at_s == math.inf else _EXPECTED)

    def demoted(self, row: int) -> None:
        self._stamps.remove(row)

    def forget(self, row: int) -> Memory:
        self._stamps.remove(row)
        self._expected_at_s.pop(row, None)
        if row >= len(self._kind):
            return NO_MEMORY
        memory = int(self._used_at[row]) << _USED_SHIFT | int(self._share[row]) << _SHARE_SHIFT
        return Memory(memory | int(self._kind[row]) << _KIND_SHIFT | int(self._uses[row]))

    def exposed(self, row: int) -> None:
        self._reach(row)
        order = int(self._order_of[row])
        self._orders[order].recall(row)
        self._changed.add(order)

    def victims(self, is_evictable: Callable[[int], bool], now_s: float) -> Iterator[int]:
        now = self.model.advance(now_s)
        ranks = [(math.inf, 0)] * len(self._orders)
        self._changed.update(range(len(self._orders)))
        while True:
            while self._changed:
                changed = self._changed.pop()
                ranks[changed] = self._rank(changed, self._orders[changed].first(), now)
            worst = min(range(len(ranks)), key=ranks.__getitem__)
            order = self._orders[worst]
            row = order.take()
            if row == NO_ROW:
                return
            self._changed.add(worst)
            used_at = self._used_at[row]
            while row != NO_ROW and self._used_at[row] == used_at:
                if is_evictable(row):
                    yield row
                row = order.take()
            if row != NO_ROW:
                order.recall(row)

    def _rank(self, order: int, first: int, now: int) -> tuple[float, int]:
        """(worth, second of the last use) of an order's first row: the smallest is the victim."""
        if first == NO_ROW:
            return math.inf, 0
        used_at = int(self._used_at[first])
        if order == _FINISHED:
            return -1.0, used_at
        if order == _EXPECTED and (due_s := self._expected_at_s[first] - now) > -_LATE_S:
            return 1.0 / max(1.0, due_s), used_at
        return self.model.worth(int(self._kind[first]), used_at), used_at

    def _used(self, rows: Rows, now: int) -> NDArray[np.uint8]:
        """Tell the model that the rows are used, and count it; returns the kinds that they are of now."""
        kinds, used_at = self._kind[rows], self._used_at[rows]
        begins = np.flatnonzero(np.diff(kinds, prepend=np.uint8(255)) | np.diff(used_at, prepend=-1))
        lengths = np.diff(begins, append=len(rows))
        self.model.ended(kinds[begins], used_at[begins], lengths / self._share[rows[begins]])
        uses = np.minimum(self._uses[rows] + 1, _USES_MAX).astype(np.uint8)
        self._uses[rows] = uses
        gaps = np.searchsorted(_GAPS_S, now - used_at, side="right")
        of_used: NDArray[np.uint8] = (_NEW_KINDS + (uses - 1) * _GAP_KINDS + gaps).astype(np.uint8)
        return of_used

    def _begin(self, rows: Rows, kinds: NDArray[np.uint8], now: int) -> None:
        """The rows are of these kinds from now on, each kind one observation, and last in its order."""
        counts = np.bincount(kinds, minlength=len(KINDS))
        self._kind[rows], self._used_at[rows] = kinds, now
        self._share[rows] = np.minimum(counts, 0xFFFF)[kinds]
        if self._expected_at_s:
            for row in rows.tolist():
                self._expected_at_s.pop(row, None)
        present = np.flatnonzero(counts)
        self.model.started(present)
        for kind in present.tolist():
            self._place(rows if len(present) == 1 else rows[kinds == kind], kind)

    def _place(self, rows: Rows, order: int) -> None:
        self._order_of[rows] = order
        self._orders[order].place(rows[::-1])

    def _reach(self, row: int) -> None:
        if row >= len(self._kind):
            size = max(row + 1, 2 * len(self._kind))
            for name in ("_order_of", "_kind", "_uses", "_share", "_used_at"):
                column = getattr(self, name)
                grown = np.zeros(size, dtype=column.dtype)
                grown[: len(column)] = column
                setattr(self, name, grown)
