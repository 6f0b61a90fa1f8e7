"""A session is known by the ends of its chains, which move when blocks leave, and the books are bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW, Rows
from kvservice.sessions import TIPS_PER_SESSION_MAX, Sessions

pytestmark = pytest.mark.unit


def rows(*numbers: int) -> Rows:
    return np.array(numbers, dtype=np.int32)


@pytest.fixture
def sessions() -> Sessions:
    return Sessions(sessions_max=100)


def test_a_conversation_that_grows_has_one_tip(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1), 1)
    sessions.extend("a", rows(0, 1, 2, 3), 3)
    assert not sessions.is_tip(1)
    assert sessions.is_tip(3)
    assert sessions.forget("a") == [3]
    assert not sessions.is_tip(3)
    sessions.check()


def test_a_tail_that_names_the_block_before_it_moves_the_tip(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1), 1)
    sessions.extend("a", rows(2, 3, 1), 3)
    assert sessions.forget("a") == [3]


def test_a_regenerated_reply_adds_a_tip(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1, 2), 2)
    sessions.extend("a", rows(0, 1, 5), 5)
    assert sessions.is_tip(2)
    assert sessions.is_tip(5)
    assert sorted(sessions.forget("a")) == [2, 5]


def test_two_sessions_may_end_at_one_block(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1), 1)
    sessions.extend("b", rows(0, 1), 1)
    assert sessions.forget("a") == [1]
    assert sessions.is_tip(1)
    assert sessions.forget("b") == [1]
    assert not sessions.is_tip(1)
    sessions.check()


def test_one_session_passing_through_another_ones_tip_leaves_it(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1), 1)
    sessions.extend("b", rows(0, 1, 2, 3), 3)
    assert sessions.is_tip(1)
    assert sessions.forget("b") == [3]
    assert sessions.forget("a") == [1]


def test_a_tip_moves_to_the_block_before_the_one_that_left(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1, 2), 2)
    sessions.extend("b", rows(0, 1, 2), 2)
    sessions.row_left(2, 1)
    assert not sessions.is_tip(2)
    assert sessions.is_tip(1)
    sessions.row_left(1, 0)
    sessions.check()
    assert sessions.forget("a") == [0]
    assert sessions.forget("b") == [0]


def test_tips_that_meet_become_one(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1), 1)
    sessions.extend("a", rows(0, 2), 2)
    sessions.row_left(1, 0)
    sessions.row_left(2, 0)
    sessions.check()
    assert sessions.forget("a") == [0]


def test_a_session_whose_last_block_left_is_gone(sessions: Sessions) -> None:
    sessions.extend("a", rows(0), 0)
    sessions.row_left(0, NO_ROW)
    assert len(sessions) == 0
    assert sessions.forget("a") == []
    sessions.check()


def test_a_session_keeps_its_other_tip_when_a_root_leaves(sessions: Sessions) -> None:
    sessions.extend("a", rows(0), 0)
    sessions.extend("a", rows(5, 6), 6)
    sessions.row_left(0, NO_ROW)
    assert len(sessions) == 1
    assert sessions.forget("a") == [6]


def test_a_row_that_nobody_ends_at_may_leave(sessions: Sessions) -> None:
    sessions.extend("a", rows(0, 1), 1)
    sessions.row_left(7, 6)
    assert sessions.forget("a") == [1]


def test_an_unknown_session_has_no_tips(sessions: Sessions) -> None:
    assert sessions.forget("nobody") == []
    sessions.extend("a", rows(0), 0)
    assert sessions.forget("a") == [0]
    assert sessions.forget("a") == []


def test_the_session_used_longest_ago_is_dropped_from_full_books() -> None:
    sessions = Sessions(sessions_max=3)
    for number, name in enumerate("abc"):
        sessions.extend(name, rows(number), number)
    sessions.extend("a", rows(0), 0)
    sessions.extend("d", rows(9), 9)
    assert len(sessions) == 3
    assert sessions.forget("b") == []
    assert not sessions.is_tip(1)
    assert sessions.forget("a") == [0]
    assert sessions.forget("c") == [2]
    assert sessions.forget("d") == [9]
    sessions.check()


def test_a_session_has_so_many_tips_and_loses_the_oldest(sessions: Sessions) -> None:
    for tip in range(TIPS_PER_SESSION_MAX + 3):
        sessions.extend("a", rows(tip), tip)
    assert sorted(sessions.forget("a")) == list(range(3, TIPS_PER_SESSION_MAX + 3))
    sessions.check()


PARENTS = {row: (row - 1) // 2 if row else NO_ROW for row in range(31)}
"""A binary tree of rows."""


def path(row: int) -> list[int]:
    found = []
    while row != NO_ROW:
        found.append(row)
        row = PARENTS[row]
    return found[::-1]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("extend"), st.sampled_from("abcdef"), st.integers(0, 30)),
            st.tuples(st.just("leave"), st.just(""), st.integers(0, 30)),
            st.tuples(st.just("forget"), st.sampled_from("abcdef"), st.just(0)),
        ),
        max_size=60,
    )
)
def test_any_history_agrees_with_sets_of_tips(operations: list[tuple[str, str, int]]) -> None:
    sessions = Sessions(sessions_max=4)
    model: dict[str, set[int]] = {}  # in the order of last use
    absent: set[int] = set()
    for kind, name, row in operations:
        if kind == "extend" and not absent & set(path(row)):
            sessions.extend(name, rows(*path(row)), row)
            tips = model.pop(name, set())
            model[name] = (tips - set(path(row))) | {row}
            if len(model) > 4:
                del model[next(iter(model))]
        elif kind == "leave" and row not in absent:
            if all(child in absent for child, parent in PARENTS.items() if parent == row):
                absent.add(row)
                sessions.row_left(row, PARENTS[row])
                for tips in model.values():
                    if row in tips:
                        tips.discard(row)
                        tips.update({PARENTS[row]} - {NO_ROW})
                model = {session: tips for session, tips in model.items() if tips}
        elif kind == "forget":
            assert set(sessions.forget(name)) == model.pop(name, set())
        sessions.check()
        assert len(sessions) == len(model)
        for tip in range(31):
            assert sessions.is_tip(tip) == any(tip in tips for tips in model.values())
