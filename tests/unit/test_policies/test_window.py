"""A row's order is that of the earliest request that needs it, whatever was queued, moved or dropped before."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies import Window

pytestmark = pytest.mark.unit

ROWS = 12
NUMBER = st.integers(0, 1 << 16)


def rows(*numbers: int) -> Rows:
    return np.array(numbers, dtype=np.int32)


def orders(window: Window, *numbers: int) -> list[float]:
    found: list[float] = window.order_of(rows(*numbers)).tolist()
    return found


class Model:
    """A forest whose rows come, go and are numbered again, with a window and the plain rule beside it."""

    def __init__(self) -> None:
        self.window = Window()
        self.parent: dict[int, int] = {}
        self.life: dict[int, int] = dict.fromkeys(range(ROWS), 0)
        self.waiting: dict[int, tuple[list[tuple[int, int]], float]] = {}
        self.known = dict.fromkeys(range(ROWS), math.inf)

    def path(self, row: int) -> list[int]:
        found = []
        while row != NO_ROW:
            found.append(row)
            row = self.parent[row]
        return found[::-1]

    def add(self, choice: int) -> None:
        free = [row for row in range(ROWS) if row not in self.parent]
        if free:
            self.parent[free[choice % len(free)]] = [*self.parent, NO_ROW][choice % (len(self.parent) + 1)]

    def drop(self, choice: int) -> None:
        ends = [row for row in self.parent if row not in self.parent.values()]
        if ends:
            row = ends[choice % len(ends)]
            del self.parent[row]
            self.life[row] += 1
            self.window.forget(row)
            self.known[row] = math.inf

    def queue(self, request: int, choice: int, order: float) -> None:
        if self.parent:
            chain = self.path(list(self.parent)[choice % len(self.parent)])
            self.waiting[request] = ([(row, self.life[row]) for row in chain], order)
            self._changed(self.window.queue(request, rows(*chain), order))

    def unqueue(self, request: int) -> None:
        self.waiting.pop(request, None)
        self._changed(self.window.unqueue(request))

    def expected(self, row: int) -> float:
        needs = [order for chain, order in self.waiting.values() if (row, self.life[row]) in chain]
        return min(needs, default=math.inf) if row in self.parent else math.inf

    def check(self) -> None:
        for row in range(ROWS):
            assert orders(self.window, row) == [self.expected(row)], f"row {row}"
            assert self.known[row] == self.expected(row), f"row {row} changed and nobody was told"

    def _changed(self, changed: Rows) -> None:
        for row in changed.tolist():
            self.known[row] = orders(self.window, row)[0]


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "drop", "queue", "queue", "unqueue"]), NUMBER, st.integers(0, 4)),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_any_history_gives_each_row_the_order_of_its_earliest_request(steps: list[tuple[str, int, int]]) -> None:
    model = Model()
    for kind, choice, request in steps:
        if kind == "add":
            model.add(choice)
        elif kind == "drop":
            model.drop(choice)
        elif kind == "queue":
            model.queue(request, choice, float(choice % 7))
        else:
            model.unqueue(request)
        model.check()


def test_a_shared_prefix_is_needed_by_the_earliest_and_once() -> None:
    window = Window()
    assert window.queue("late", rows(0, 1, 2), 5.0).tolist() == [0, 1, 2]
    assert window.queue("early", rows(0, 1, 3), 2.0).tolist() == [0, 1, 3]
    assert orders(window, 0, 1, 2, 3) == [2.0, 2.0, 5.0, 2.0]
    assert sorted(window.unqueue("early").tolist()) == [0, 1, 3]
    assert orders(window, 0, 1, 2, 3) == [5.0, 5.0, 5.0, math.inf]


def test_a_request_that_moves_replaces_what_it_said() -> None:
    window = Window()
    window.queue("a", rows(0, 1), 3.0)
    window.queue("a", rows(0, 1, 2), 1.0)
    assert orders(window, 0, 1, 2) == [1.0, 1.0, 1.0]
    assert len(window) == 1
    window.queue("a", rows(), 1.0)
    assert orders(window, 0, 1, 2) == [math.inf] * 3
    assert len(window) == 0


def test_a_row_that_is_in_the_middle_of_another_chain_is_needed_by_that_one_too() -> None:
    """A truncated conversation's chain begins with blocks that stand deeper in the chain that it was cut from."""
    window = Window()
    window.queue("whole", rows(0, 1, 2, 3), 7.0)
    window.queue("cut", rows(2, 3, 4), 1.0)
    assert orders(window, 0, 2, 3, 4) == [7.0, 1.0, 1.0, 1.0]
    assert sorted(window.unqueue("cut").tolist()) == [2, 3, 4]
    assert orders(window, 0, 2, 3, 4) == [7.0, 7.0, 7.0, math.inf]


def test_a_request_nobody_knows_changes_nothing() -> None:
    assert Window().unqueue("never heard of").tolist() == []


def test_a_number_used_again_is_not_needed_by_who_needed_its_predecessor() -> None:
    window = Window()
    window.queue("a", rows(0, 1), 1.0)
    window.forget(1)
    window.queue("b", rows(0, 1), 2.0)  # row 1 is another block now
    assert orders(window, 0, 1) == [1.0, 2.0]
    window.unqueue("a")
    assert orders(window, 0, 1) == [2.0, 2.0]
    window.unqueue("b")
    assert orders(window, 0, 1) == [math.inf] * 2


def test_the_windows_end_decides_who_is_exempt_and_says_who_is_no_longer() -> None:
    window = Window()
    for request in range(4):
        window.queue(request, rows(10, request), float(request))
    assert [window.is_exempt(row) for row in (0, 3, 10, 99, 1_000_000)] == [True, True, True, False, False]
    assert window.exempt_until(1.0).tolist() == [2, 3]
    assert [window.is_exempt(row) for row in (0, 1, 2, 3, 10)] == [True, True, False, False, True]
    assert window.exempt(rows(0, 2, 10)).tolist() == [True, False, True]
    assert window.exempt_until(math.inf).tolist() == []
    assert window.is_exempt(3)


def test_rows_that_get_other_numbers_take_their_need_along() -> None:
    window = Window()
    window.queue("a", rows(0, 1, 2), 1.0)
    window.queue("b", rows(0, 5), 2.0)
    window.forget(5)
    assert window.move({0: 7, 1: 0}).tolist() == [0, 7]  # row 2 did not survive
    assert orders(window, 7, 0, 2, 1, 5) == [1.0, 1.0, math.inf, math.inf, math.inf]
    window.unqueue("a")
    assert orders(window, 7, 0) == [2.0, math.inf]


def test_rows_with_large_numbers_are_as_good_as_others() -> None:
    window = Window()
    window.queue("a", rows(1_000_000, 3), 1.0)
    window.forget(5_000_000)
    assert orders(window, 3, 1_000_000, 4_000_000) == [1.0, 1.0, math.inf]
