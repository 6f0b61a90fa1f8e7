"""order: rows in the order in which they were placed, without a linked list.

A log of placements instead: a placement of a chain is two vector writes whatever its length, where a list in Python
costs about a microsecond a block. An entry of the log is current only while it carries its row's latest stamp; stale
ones are passed over, and the log is rewritten when they may be the majority. Columns are written through indices of the
machine's width: through narrower ones numpy takes four times as long.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, Rows

_SLACK_ROWS = 4096


class Stamps:
    """Each row's latest placement, in whichever of several orders that was.

    0: in none; positive: in a log; negative: recalled to the front.
    """

    def __init__(self) -> None:
        self.of = np.zeros(1024, dtype=np.int64)
        self._clock = 0

    def next(self) -> int:
        """A number that no placement had yet."""
        self._clock += 1
        return self._clock

    def stamp(self, rows: NDArray[np.intp]) -> int:
        """Take rows out of whichever order they are in, for one that logs them with this stamp."""
        stamp = self.next()
        try:
            self.of[rows] = stamp
        except IndexError:
            self.reach(int(rows.max()))
            self.of[rows] = stamp
        return stamp

    def is_placed(self, rows: Rows) -> np.ndarray:
        """Which of the rows are in some order, as a mask."""
        if len(rows):
            self.reach(int(rows.max()))
        mask: np.ndarray = self.of[rows] != 0
        return mask

    def remove(self, row: int) -> None:
        """Take the row out of whichever order it is in."""
        if row < len(self.of):
            self.of[row] = 0

    def reach(self, row: int) -> None:
        """Make sure that the row has a stamp."""
        if row >= len(self.of):
            grown = np.zeros(max(row + 1, 2 * len(self.of)), dtype=np.int64)
            grown[: len(self.of)] = self.of
            self.of = grown


class PlacedOrder:
    """Rows, the one placed longest ago first; of one placement in the order given.

    Rows whose turn has passed can be put back in front of all others (`recall`), the last one first. A row is in one of
    the orders that share their stamps: where it was placed or recalled last.
    """

    def __init__(self, stamps: Stamps) -> None:
        self._stamps = stamps
        # The log: entries begin..end of both columns, oldest first.
        self._rows: Rows = np.empty(_SLACK_ROWS, dtype=np.int32)
        self._stamped: NDArray[np.int64] = np.empty(_SLACK_ROWS, dtype=np.int64)
        self._begin = self._end = 0
        self._recalled: dict[int, int] = {}

    @property
    def logged(self) -> int:
        """Entries of the log, stale ones included."""
        return self._end - self._begin

    def place(self, rows: Rows) -> None:
        """Put distinct rows behind all others, the first of them first."""
        if len(rows):
            self.append(rows, self._stamps.stamp(rows.astype(np.intp)))

    def append(self, rows: Rows, stamp: int) -> None:
        """The same for rows that bear the stamp already; no two orders log the same row with it."""
        if self._end + len(rows) > len(self._rows):
            self._rewrite(len(rows))
        begin = self._end
        self._end = end = begin + len(rows)
        self._rows[begin:end] = rows
        self._stamped[begin:end] = stamp

    def recall(self, row: int) -> None:
        """Put the row in front of all others, unless its turn is still to come."""
        self._stamps.reach(row)
        if not self._stamps.of[row]:
            stamp = self._stamps.next()
            self._stamps.of[row] = -stamp
            self._recalled[row] = stamp

    def first(self) -> int:
        """The row that `take` would take; NO_ROW when there is none."""
        row = self.take()
        if row != NO_ROW:
            self.recall(row)
        return row

    def take(self) -> int:
        """Take out the first row; NO_ROW when there is none."""
        of = self._stamps.of
        while self._recalled:
            row, stamp = self._recalled.popitem()
            if of.item(row) == -stamp:
                of[row] = 0
                return row
        while self._begin < self._end:
            row, stamp = self._rows.item(self._begin), self._stamped.item(self._begin)
            self._begin += 1
            if of.item(row) == stamp:
                of[row] = 0
                return row
        return NO_ROW

    def _rewrite(self, more: int) -> None:
        """Without stale entries, with room for that many more, and for as many as are left."""
        rows, stamps = self._rows[self._begin : self._end], self._stamped[self._begin : self._end]
        current = self._stamps.of[rows.astype(np.intp)] == stamps
        rows, stamps = rows[current], stamps[current]
        left = len(rows)
        room = left + max(left, more) + _SLACK_ROWS
        self._rows, self._stamped = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int64)
        self._rows[:left], self._stamped[:left] = rows, stamps
        self._begin, self._end = 0, left
