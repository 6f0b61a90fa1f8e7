"""Departures are remembered newest per hash, up to a bound, and the horizon says how far back that goes."""

from __future__ import annotations

import pytest

from kvservice.blocks import BlockHash, DropReason
from kvservice.history import Departure, History

pytestmark = pytest.mark.unit


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(8, "big"))


def departure(at_s: float, reason: DropReason = DropReason.CAPACITY) -> Departure:
    return Departure(reason, at_s, idle_s=1.5)


def test_a_departure_is_found_by_its_hash() -> None:
    history = History(blocks_max=10)
    history.remember(name(1), departure(5.0, DropReason.FORGOTTEN))
    assert history.find(name(1)) == Departure(DropReason.FORGOTTEN, 5.0, 1.5)
    assert history.find(name(2)) is None


def test_memories_are_those_of_the_departures_that_are_known() -> None:
    history = History(blocks_max=10)
    history.remember(name(2), Departure(DropReason.CAPACITY, 5.0, 1.5, memory=77))
    assert history.memories([name(1), name(2), name(3)]).tolist() == [0, 77, 0]
    assert history.memories([name(1), name(3)]).tolist() == [0, 0]


def test_the_newest_departure_of_a_hash_counts() -> None:
    history = History(blocks_max=10)
    history.remember(name(1), departure(5.0))
    history.remember(name(1), departure(9.0, DropReason.ABORTED))
    found = history.find(name(1))
    assert found is not None
    assert (found.reason, found.at_s) == (DropReason.ABORTED, 9.0)


def test_the_oldest_departure_goes_at_the_bound() -> None:
    history = History(blocks_max=3)
    for number in range(5):
        history.remember(name(number), departure(float(number)))
    assert [history.find(name(number)) is not None for number in range(5)] == [False, False, True, True, True]


def test_a_hash_that_left_again_counts_as_new() -> None:
    history = History(blocks_max=2)
    history.remember(name(1), departure(1.0))
    history.remember(name(2), departure(2.0))
    history.remember(name(1), departure(3.0))
    history.remember(name(3), departure(4.0))
    assert history.find(name(1)) is not None
    assert history.find(name(2)) is None


def test_a_bound_of_zero_remembers_none() -> None:
    history = History(blocks_max=0)
    history.remember(name(1), departure(1.0))
    assert history.find(name(1)) is None
    assert history.horizon_s(9.0) == 0.0


def test_the_horizon_is_the_age_of_the_oldest_departure() -> None:
    history = History(blocks_max=2)
    assert history.horizon_s(100.0) == 0.0
    history.remember(name(1), departure(10.0))
    history.remember(name(2), departure(20.0))
    assert history.horizon_s(100.0) == 90.0
    history.remember(name(3), departure(30.0))
    assert history.horizon_s(100.0) == 80.0
    # The hash that was oldest leaves again: the next one is the oldest now.
    history.remember(name(2), departure(40.0))
    assert history.horizon_s(100.0) == 70.0
