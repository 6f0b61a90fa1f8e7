"""order: rows in the order in which they were placed, without a linked list.

A log of placements instead: a placement of a chain is two vector writes whatever its length, where a list in Python
costs about a microsecond a block. An entry of the log is current only while it carries its row's latest stamp; stale
ones are passed over, and the log is rewritten when they are the majority.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from kvservice.blocks import NO_ROW, Rows

_PIECE_ROWS = 65_536


class PlacedOrder:
    """Rows, the one placed longest ago first; of one placement in the order given.

    Rows whose turn has passed can be put back in front of all others (`recall`), the last one first.
    """

    def __init__(self) -> None:
        self._stamps = np.zeros(1024, dtype=np.int64)  # a row's latest placement; 0: not in the log
        self._log: deque[tuple[np.ndarray, np.ndarray]] = deque()  # (rows, stamps), oldest first
        self._logged = 0
        self._current = 0
        self._clock = 0
        self._recalled: dict[int, None] = {}

    @property
    def logged(self) -> int:
        """Entries of the log, stale ones included."""
        return self._logged

    def place(self, rows: Rows) -> None:
        """Put distinct rows behind all others, the first of them first."""
        if len(rows) == 0:
            return
        self._clock += 1
        self._reach(int(rows.max()))
        self._current += int(np.count_nonzero(self._stamps[rows] == 0))
        self._stamps[rows] = self._clock
        # A stride of zero: one number stands for the whole entry's stamps.
        self._log.append((rows.copy(), np.broadcast_to(np.int64(self._clock), rows.shape)))
        self._logged += len(rows)
        if self._logged > 2 * self._current + 4096:
            self._rewrite()

    def is_placed(self, rows: Rows) -> np.ndarray:
        """Which of the rows are in the log, as a mask."""
        if len(rows):
            self._reach(int(rows.max()))
        mask: np.ndarray = self._stamps[rows] > 0
        return mask

    def remove(self, row: int) -> None:
        """Take the row out wherever it is."""
        self._recalled.pop(row, None)
        if row < len(self._stamps) and self._stamps[row]:
            self._stamps[row] = 0
            self._current -= 1

    def recall(self, row: int) -> None:
        """Put the row in front of all others, unless its turn is still to come."""
        if row >= len(self._stamps) or not self._stamps[row]:
            self._recalled[row] = None

    def take(self) -> int:
        """Take out the first row; NO_ROW when there is none."""
        while self._recalled:
            row, _ = self._recalled.popitem()
            if row >= len(self._stamps) or not self._stamps[row]:
                return row
        while self._log:
            rows, stamps = self._log[0]
            if len(rows) > 1:
                self._log[0] = (rows[1:], stamps[1:])
            else:
                self._log.popleft()
            self._logged -= 1
            row = int(rows[0])
            if self._stamps[row] == stamps[0]:
                self._stamps[row] = 0
                self._current -= 1
                return row
        return NO_ROW

    def _rewrite(self) -> None:
        rows = np.concatenate([entry[0] for entry in self._log])
        stamps = np.concatenate([entry[1] for entry in self._log])
        current = self._stamps[rows] == stamps
        rows, stamps = rows[current], stamps[current]
        self._log.clear()
        # In pieces, so that taking from the front never holds on to the whole.
        for start in range(0, len(rows), _PIECE_ROWS):
            end = start + _PIECE_ROWS
            self._log.append((rows[start:end].copy(), stamps[start:end].copy()))
        self._logged = len(rows)

    def _reach(self, row: int) -> None:
        if row >= len(self._stamps):
            grown = np.zeros(max(row + 1, 2 * len(self._stamps)), dtype=np.int64)
            grown[: len(self._stamps)] = self._stamps
            self._stamps = grown
