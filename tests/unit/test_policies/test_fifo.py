"""FIFO evicts in the order of storing, whatever was used since."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies import FirstInFirstOut, nothing_remembered

pytestmark = pytest.mark.unit


def rows(*numbers: int) -> Rows:
    return np.array(numbers, dtype=np.int32)


def stored(*chains: Rows) -> FirstInFirstOut:
    policy = FirstInFirstOut()
    for chain in chains:
        policy.stored(chain, np.concatenate([rows(NO_ROW), chain[:-1]]), 0.0, nothing_remembered(chain))
    return policy


def take(
    policy: FirstInFirstOut, count: int = 100, is_evictable: Callable[[int], bool] = lambda row: True
) -> list[int]:
    found = []
    for row in islice(policy.victims(is_evictable, 0.0), count):
        policy.forget(row)
        found.append(row)
    return found


def test_what_was_stored_first_leaves_first_however_often_it_is_used() -> None:
    policy = stored(rows(0, 1), rows(2, 3))
    policy.touch(rows(0, 1), 1.0)
    policy.released(rows(0, 1))
    assert take(policy) == [1, 0, 3, 2]


def test_a_row_passed_over_while_held_keeps_its_turn() -> None:
    policy = stored(rows(0), rows(1), rows(2))
    assert take(policy, 1, is_evictable=lambda row: row != 0) == [1]
    policy.released(rows(0))
    assert take(policy) == [0, 2]


def test_a_row_passed_over_comes_when_it_is_exposed() -> None:
    policy = stored(rows(0), rows(1))
    assert take(policy, is_evictable=lambda row: row != 0) == [1]
    policy.exposed(0)
    assert take(policy) == [0]


def test_what_came_back_from_another_tier_is_new_in_this_one() -> None:
    policy = stored(rows(0), rows(1))
    policy.demoted(0)
    policy.released(rows(0))
    assert take(policy) == [1, 0]


def test_a_number_used_again_is_not_taken_for_its_predecessor() -> None:
    policy = stored(rows(0), rows(1))
    assert take(policy, is_evictable=lambda row: False) == []
    policy.forget(0)
    policy.stored(rows(2), rows(NO_ROW), 0.0, nothing_remembered(rows(2)))
    policy.stored(rows(0), rows(NO_ROW), 0.0, nothing_remembered(rows(0)))
    policy.released(rows(0))
    assert take(policy) == [2, 0]
