"""What waiting requests need leaves last, the end of the queue first; the paper's figure 9 as it is drawn."""

from __future__ import annotations

import math

import pytest

from kvservice.policies import POLICIES
from tests.unit.test_policies.shelf import Shelf, rows_of

pytestmark = pytest.mark.unit

AWARE = ["lookahead", "predictive"]


def shelf_with(policy: str, *chains: tuple[int, ...]) -> Shelf:
    """A shelf of chains, stored a second apart, whose window exempts nobody: only the order counts."""
    shelf = Shelf(policy)
    shelf.window.exempt_until(-math.inf)
    for chain in chains:
        shelf.store(*chain)
        shelf.now_s += 1.0
    return shelf


@pytest.mark.parametrize("policy", AWARE)
def test_first_what_nobody_waits_for_then_the_end_of_the_queue(policy: str) -> None:
    shelf = shelf_with(policy, (0, 1), (2, 3), (4, 5), (6, 7))
    shelf.queue(1, [0, 1], 1.0)
    shelf.queue(2, [4, 5], 2.0)
    assert shelf.evict() == [3, 2, 7, 6, 5, 4, 1, 0]


@pytest.mark.parametrize("policy", AWARE)
def test_a_shared_prefix_counts_for_its_earliest_request(policy: str) -> None:
    shelf = shelf_with(policy, (0, 1, 2))
    shelf.store(3, behind=1)
    shelf.store(4)
    shelf.queue(1, [0, 1, 2], 1.0)
    shelf.queue(2, [0, 1, 3], 3.0)
    shelf.queue(3, [4], 2.0)
    assert shelf.evict() == [3, 4, 2, 1, 0]


@pytest.mark.parametrize("policy", AWARE)
def test_a_cancelled_request_gives_its_rows_their_place_back(policy: str) -> None:
    shelf = shelf_with(policy, (0,), (1,), (2,))
    shelf.queue(1, [0], 1.0)
    assert shelf.evict(1) == [1]
    shelf.unqueue(1)
    assert shelf.evict() == [0, 2]


@pytest.mark.parametrize("policy", AWARE)
def test_a_request_that_moves_up_the_queue_leaves_later(policy: str) -> None:
    shelf = shelf_with(policy, (0,), (1,), (2,))
    for request, order in ((0, 5.0), (1, 6.0), (2, 7.0)):
        shelf.queue(request, [request], order)
    shelf.queue(2, [2], 1.0)
    assert shelf.evict() == [1, 0, 2]


@pytest.mark.parametrize("policy", AWARE)
def test_needed_rows_that_were_held_come_up_when_they_are_released(policy: str) -> None:
    shelf = shelf_with(policy, (0,), (1,))
    shelf.queue(0, [0], 1.0)
    shelf.queue(1, [1], 2.0)
    shelf.hold([1])
    assert shelf.evict() == [0]
    shelf.release([1])
    assert shelf.evict() == [1]


@pytest.mark.parametrize("policy", AWARE)
def test_a_number_used_again_is_not_needed_by_who_needed_its_predecessor(policy: str) -> None:
    shelf = shelf_with(policy, (0,), (1,))
    shelf.queue(0, [0], 1.0)
    shelf.remove(0)
    shelf.store(0)
    assert shelf.evict() == [1, 0]


def test_the_books_of_a_queue_that_never_rests_stay_in_proportion() -> None:
    shelf = shelf_with("lookahead", *[(row,) for row in range(50)])
    for step in range(20_000):
        shelf.queue(step % 50, [step % 50], float(step))
    assert sum(len(rows) for _, _, rows in shelf.policy._heap) <= 2 * 50 + 4096 + 50  # type: ignore[attr-defined, misc]
    assert shelf.evict() == list(range(49, -1, -1))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_papers_figure_9(policy: str) -> None:
    """Executing job 1; queue 2..9; prefetch window 2, eviction window 6; DRAM {4, 2}, disk {9, 8, 7, 3}.

    Fetch 3 (the only one of the jobs 2 and 3 that is not in DRAM), demote 4 for it, drop 9 for what was demoted.
    """
    dram, disk = Shelf(policy), Shelf(policy)
    for job in (4, 2):
        dram.store(job)
    for job in (9, 8, 7, 3):
        disk.store(job)
    for job in range(2, 10):
        for tier in (dram, disk):
            tier.queue(job, [job], float(job))
    dram.window.exempt_until(-math.inf)  # leaving DRAM for the disk is not leaving the store
    disk.window.exempt_until(7.0)
    fetched = [job for job in (2, 3) if job not in dram.parent]
    assert fetched == [3]
    if policy in AWARE:
        assert dram.evict(1) == [4]
        assert disk.evict(1) == [9]
    # The window's jobs do not leave the store, whatever the policy and however much is wanted.
    disk.evict()
    assert set(disk.parent) == {7, 3}
    assert disk.window.exempt(rows_of(3, 7, 8, 9)).tolist() == [True, True, False, False]
