"""What holds for every policy: victims may leave, all rows come up once, and the same calls give the same order."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW
from kvservice.policies import POLICIES
from tests.unit.test_policies.shelf import Shelf

pytestmark = pytest.mark.unit

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "use", "hold", "release", "queue", "queue", "unqueue", "evict", "wait"]),
        st.integers(0, 1 << 16),
        st.integers(1, 5),
    ),
    max_size=60,
)
ROWS = 24


def apply(shelf: Shelf, holds: list[list[int]], kind: str, choice: int, amount: int) -> list[int]:
    """One step, where the numbers choose among what is there; the victims of an eviction."""
    known = list(shelf.parent)
    free = [row for row in range(ROWS) if row not in shelf.parent][:amount]
    chain = shelf.path(known[choice % len(known)]) if known else []
    if kind == "store" and free:
        shelf.store(*free, behind=[*known, NO_ROW][choice % (len(known) + 1)])
    elif kind == "use" and chain:
        shelf.use(*chain)
    elif kind == "hold" and chain:
        shelf.hold(chain)
        holds.append(chain)
    elif kind == "release" and holds:
        released = holds.pop(choice % len(holds))
        shelf.release([row for row in released if not any(row in other for other in holds)])
    elif kind == "queue" and chain:
        shelf.queue(amount, chain, float(choice % 7))
    elif kind == "unqueue":
        shelf.unqueue(amount)
    elif kind == "evict":
        return shelf.evict(amount)
    elif kind == "wait":
        shelf.now_s += float(choice % 500)
    return []


def history(policy: str, steps: list[tuple[str, int, int]], *, window_end: float) -> list[int]:
    """The victims of a history, at the end of which everybody lets go and everything leaves."""
    shelf, holds, left = Shelf(policy), list[list[int]](), []
    shelf.window.exempt_until(window_end)
    for kind, choice, amount in steps:
        left += apply(shelf, holds, kind, choice, amount)
    for chain in holds:
        shelf.held.clear()
        shelf.release(chain)
    for request in range(1, 6):
        shelf.unqueue(request)
    rest = list(shelf.parent)
    assert sorted(shelf.evict()) == sorted(rest), "some rows never came up again"
    return [*left, *rest]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window_end", [float("inf"), float("-inf"), 3.0])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_no_victim_is_held_exempt_or_in_front_of_another_block_and_nobody_is_lost(
    policy: str, window_end: float, steps: list[tuple[str, int, int]]
) -> None:
    # Shelf.evict asserts of each victim that it may leave.
    assert history(policy, steps, window_end=window_end) == history(policy, steps, window_end=window_end)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_deepest_block_of_a_chain_leaves_first(policy: str) -> None:
    shelf = Shelf(policy)
    shelf.store(0, 1, 2)
    shelf.now_s += 5.0
    shelf.store(3, 4)
    assert shelf.evict() == [2, 1, 0, 4, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_demoted_row_comes_back_with_its_arrival(policy: str) -> None:
    shelf = Shelf(policy)
    shelf.store(0, 1)
    shelf.policy.demoted(1)
    shelf.policy.exposed(0)
    shelf.release([1])
    assert set(shelf.evict()) == {0, 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_with_large_numbers_are_as_good_as_others(policy: str) -> None:
    shelf = Shelf(policy)
    shelf.policy.exposed(5_000_000)
    shelf.policy.forget(7_000_000)
    shelf.policy.demoted(9_000_000)
    shelf.store(1_000_000, 3)
    shelf.queue(1, [1_000_000, 3], 1.0)
    shelf.unqueue(1)
    assert shelf.evict() == [3, 1_000_000]
