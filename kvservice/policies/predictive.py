"""predictive: evicts what is least likely to be used soon for the time that it would be kept, as learned from what was.

Blocks are sorted into kinds by what is known of them when they are used: how often they were used before and how
long ago the last time; of new ones, how many came at once and whether they end their chain. `reuse` learns how soon
blocks of each kind are used again. Each kind is in order of last use, and the victim is the oldest block of the kind
whose oldest block is worth least. While nothing is known that is the block used longest ago.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

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
"""Every kind of block in words."""

_USES_OF = (*[0] * _NEW_KINDS, *(uses for uses in range(1, _USES_MAX + 1) for _ in range(_GAP_KINDS)), 0)
"""How often blocks of each kind were used, up to the number that is told apart; kinds with as many are one family."""

_FINISHED, _EXPECTED = len(KINDS), len(KINDS) + 1
"""Orders besides those of the kinds: what the application says will not, or will, be used."""

_LATE_S = 60
"""An expected use that is so late is not expected any more."""

_SHARE_MAX = 0xFFFF


_Number = TypeVar("_Number", bound=np.integer)


class _State(NamedTuple):
    """What is known of a row; 64 bits in the column, and in what is remembered of a block that left."""

    used_at: int
    """The second of its last use, or of its storing."""
    share: int
    """How many rows were one observation together."""
    kind: int
    uses: int

    def packed(self) -> int:
        """As one number, never NO_MEMORY: a share is at least one."""
        return self.used_at << 32 | min(self.share, _SHARE_MAX) << 16 | self.kind << 8 | self.uses

    @classmethod
    def of(cls, packed: int) -> _State:
        """The state that was packed so."""
        return cls(packed >> 32, packed >> 16 & _SHARE_MAX, packed >> 8 & 0xFF, packed & 0xFF)


class Predictive:
    """Orders blocks that no waiting request needs by when they are likely to be used; see the module."""

    name = "predictive"

    def __init__(self) -> None:
        self.model = ReuseModel(_USES_OF)
        self._stamps = Stamps()
        self._orders = [PlacedOrder(self._stamps) for _ in range(len(KINDS) + 2)]
        self._states = np.zeros(1024, dtype=np.int64)
        self._expected_at_s: dict[int, float] = {}
        self._changed: set[int] = set()  # orders whose first row may be another one since it was looked at

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        if len(rows):
            self._reach(int(rows.max()))
            new = int(np.count_nonzero(memories == NO_MEMORY))
            self._use(rows, rows.astype(np.intp), memories, now_s, new=new)

    def touch(self, rows: Rows, now_s: float) -> None:
        if len(rows):
            indices = rows.astype(np.intp)
            try:
                states = self._states[indices]
            except IndexError:
                self._reach(int(rows.max()))
                states = self._states[indices]
            self._use(rows, indices, states, now_s, new=0)

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
        self._orders[_FINISHED if at_s == math.inf else _EXPECTED].place(rows[::-1])

    def demoted(self, row: int) -> None:
        self._stamps.remove(row)

    def forget(self, row: int) -> Memory:
        self._stamps.remove(row)
        self._expected_at_s.pop(row, None)
        return Memory(self._states.item(row)) if row < len(self._states) else NO_MEMORY

    def exposed(self, row: int) -> None:
        self._reach(row)
        order = self._order_of(row)
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
            used_at = self._states.item(row) >> 32
            while row != NO_ROW and self._states.item(row) >> 32 == used_at:
                if is_evictable(row):
                    yield row
                row = order.take()
            if row != NO_ROW:
                order.recall(row)

    def _order_of(self, row: int) -> int:
        expected_at_s = self._expected_at_s.get(row)
        if expected_at_s is None:
            return _State.of(self._states.item(row)).kind
        return _FINISHED if expected_at_s == math.inf else _EXPECTED

    def _rank(self, order: int, first: int, now: int) -> tuple[float, int]:
        """(worth, second of the last use) of an order's first row: the smallest is the victim."""
        if first == NO_ROW:
            return math.inf, 0
        state = _State.of(self._states.item(first))
        if order == _FINISHED:
            return -1.0, state.used_at
        if order == _EXPECTED and (due_s := self._expected_at_s[first] - now) > -_LATE_S:
            return 1.0 / max(1.0, due_s), state.used_at
        return self.model.worth(state.kind, state.used_at), state.used_at

    def _use(self, rows: Rows, indices: NDArray[np.intp], states: Memories, now_s: float, *, new: int) -> None:
        """The rows, of which that much was known, are used, or new where nothing was.

        A chain is few runs of rows that share their past: what is not a vector operation is done once for each run.
        """
        now = self.model.advance(now_s)
        parts: dict[int, list[tuple[int, int]]] = {}  # by kind, (begin, end)
        begin = 0
        for end in _ends_of_runs(states, new=new):
            packed = states.item(begin)
            if packed == NO_MEMORY:
                kind = _END if end == len(rows) else bisect_left(_STORED_AT_ONCE, new)
            else:
                state = _State.of(packed)
                self.model.ended(state.kind, state.used_at, (end - begin) / max(1, state.share))
                kind = _kind_of(uses=state.uses + 1, gap_s=now - state.used_at)
            of_kind = parts.setdefault(kind, [])
            if of_kind and of_kind[-1][1] == begin:
                of_kind[-1] = (of_kind[-1][0], end)
            else:
                of_kind.append((begin, end))
            begin = end
        if self._expected_at_s:
            for row in rows.tolist():
                self._expected_at_s.pop(row, None)
        stamp = self._stamps.stamp(indices)
        for kind, of_kind in parts.items():
            self.model.started(kind)
            used = _joined(rows, of_kind)
            self._states[_joined(indices, of_kind)] = _State(now, len(used), kind, _USES_OF[kind]).packed()
            self._orders[kind].append(used[::-1], stamp)

    def _reach(self, row: int) -> None:
        if row >= len(self._states):
            more = max(row + 1, 2 * len(self._states)) - len(self._states)
            self._states = np.concatenate([self._states, np.zeros(more, dtype=np.int64)])


def _kind_of(*, uses: int, gap_s: int) -> int:
    return _NEW_KINDS + (min(uses, _USES_MAX) - 1) * _GAP_KINDS + bisect_right(_GAPS_S, gap_s)


def _joined(rows: NDArray[_Number], parts: Sequence[tuple[int, int]]) -> NDArray[_Number]:
    if len(parts) == 1:
        begin, end = parts[0]
        return rows[begin:end]
    return np.concatenate([rows[begin:end] for begin, end in parts])


def _ends_of_runs(states: Memories, *, new: int) -> list[int]:
    """Where runs of rows that share their past end; a new chain's end is a run of its own."""
    rows = len(states)
    packed = states.tobytes()
    if packed == packed[: states.itemsize] * rows:
        ends = [rows]
    else:
        ends = [*(np.flatnonzero(states[1:] != states[:-1]) + 1).tolist(), rows]
    if new and states.item(-1) == NO_MEMORY and rows - 1 not in (0, *ends[-2:-1]):
        ends.insert(-1, rows - 1)
    return ends
