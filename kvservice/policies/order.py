"""order: rows in the order in which they were placed, without a linked list.

A log of placements instead: a placement of a chain is two vector writes whatever its length, where a list in Python
costs about a microsecond a block. An entry of the log is current only while it carries its row's latest stamp; stale
ones are passed over, and the log is rewritten when they may be the majority.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from kvservice.blocks import NO_ROW, Rows

_PIECE_ROWS = 65_536
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
        self._log: deque[tuple[np.ndarray, np.ndarray]] = deque()  # (rows, stamps), oldest first
        self._logged = 0
        self._logged_max = _SLACK_ROWS
        self._recalled: dict[int, int] = {}

    @property
    def logged(self) -> int:
        """Entries of the log, stale ones included."""
        return self._logged

    def place(self, rows: Rows) -> None:
        """Put distinct rows behind all others, the first of them first."""
        if len(rows) == 0:
            return
        self._stamps.reach(int(rows.max()))
        stamp = self._stamps.next()
        self._stamps.of[rows] = stamp
        # A stride of zero: one number stands for the whole entry's stamps.
        self._log.append((rows.copy(), np.broadcast_to(np.int64(stamp), rows.shape)))
        self._logged += len(rows)
        if self._logged > self._logged_max:
            self._rewrite()

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
            if of[row] == -stamp:
                of[row] = 0
                return row
        while self._log:
            rows, stamps = self._log[0]
            if len(rows) > 1:
                self._log[0] = (rows[1:], stamps[1:])
            else:
                self._log.popleft()
            self._logged -= 1
            row = int(rows[0])
            if of[row] == stamps[0]:
                of[row] = 0
                return row
        return NO_ROW

    def _rewrite(self) -> None:
        rows = np.concatenate([entry[0] for entry in self._log])
        stamps = np.concatenate([entry[1] for entry in self._log])
        current = self._stamps.of[rows] == stamps
        rows, stamps = rows[current], stamps[current]
        self._log.clear()
        # In pieces, so that taking from the front never holds on to the whole.
        for start in range(0, len(rows), _PIECE_ROWS):
            end = start + _PIECE_ROWS
            self._log.append((rows[start:end].copy(), stamps[start:end].copy()))
        self._logged = len(rows)
        self._logged_max = 2 * len(rows) + _SLACK_ROWS
