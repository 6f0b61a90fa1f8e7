"""The predictor is LRU while it knows nothing, and keeps what comes back once it has seen what does."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice.policies import LeastRecentlyUsed, Memory, Predictive
from kvservice.policies.predictive import KINDS
from kvservice.policies.reuse import AGES_S, ReuseModel
from tests.unit.test_policies.shelf import Shelf, rows_of

pytestmark = pytest.mark.unit


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=40))
@settings(deadline=None)
def test_knowing_nothing_it_is_lru(uses: list[tuple[int, int]]) -> None:
    """Within the first seconds nothing is counted yet: the order is that of the last use, whatever the kind."""
    shelves = [Shelf(Predictive()), Shelf(LeastRecentlyUsed())]
    for shelf in shelves:
        for row in range(10):
            shelf.store(row)
        for row, waited_s in uses:
            shelf.now_s = min(9.0, shelf.now_s + waited_s)
            shelf.use(row)
    # Rows of one second are of one age: between kinds their order within it is free.
    predicted, recent = (shelf.evict() for shelf in shelves)
    last_use = {row: int(shelves[0].policy._states[row]) >> 32 for row in range(10)}  # type: ignore[attr-defined]
    assert [last_use[row] for row in predicted] == sorted(last_use.values()) == [last_use[row] for row in recent]


class Returning(Shelf):
    """A shelf from which a conversation can be taken out."""

    def evict_chain(self, *numbers: int) -> None:
        for row in reversed(numbers):
            self.remove(row)


def test_it_keeps_what_returns_and_gives_up_what_does_not() -> None:
    shelf = Returning(Predictive())
    for second in range(1, 400):
        shelf.now_s = float(second)
        first = second * 100
        shelf.store(first, first + 1, first + 2)  # a conversation, back after 40 s
        shelf.store(*range(first + 50, first + 90))  # a document that nobody asks for again
        back = first - 4000
        if back > 0:
            shelf.use(back, back + 1, back + 2)
            shelf.evict_chain(back, back + 1, back + 2)
    victims = shelf.evict(40 * 30)
    documents = [row for row in victims if row % 100 >= 50]
    assert len(documents) >= 0.9 * len(victims), "conversations of the last 40 s leave before old documents"
    assert victims[0] // 100 < 370, "and of the documents the older ones first"


def test_it_forgets_what_was_true_once() -> None:
    """Conversations stop coming back: within a few half-lives they are worth no more than documents."""
    shelf = Returning(Predictive())
    model = shelf.policy.model  # type: ignore[attr-defined]
    hazard_then = 0.0
    for second in range(1, 9_000, 3):
        shelf.now_s = float(second)
        first = second * 10
        shelf.store(first, first + 1)
        back = first - 300
        if back > 0 and second < 1500:
            shelf.use(back, back + 1)
        if first > 20_000:
            shelf.evict(2)
        if second == 1498:
            hazard_then = float(model.hazards()[0].max())
    assert hazard_then > 0.8
    assert float(model.hazards()[0][: np.searchsorted(AGES_S, 64)].max()) < 0.1


def test_a_block_that_left_and_comes_back_is_known() -> None:
    shelf = Shelf(Predictive())
    shelf.store(0, 1, 2, 3)
    shelf.now_s = 50.0
    memories = [int(shelf.policy.forget(row)) for row in (0, 1, 2, 3)]
    assert all(memories)
    shelf.now_s = 100.0
    # Stored under other row numbers: the policy knows it by what it wanted remembered.
    shelf.store(10, 11, 12, 13, memories=np.array(memories, dtype=np.int64))
    policy = shelf.policy
    assert isinstance(policy, Predictive)
    assert {KINDS[int(policy._states[row]) >> 8 & 0xFF] for row in (10, 11, 12, 13)} == {"used once, under 128 s apart"}
    assert policy.model._used.sum() == pytest.approx(2.0)  # the chain and its end, each one observation


def test_a_conversation_that_is_finished_leaves_first_and_one_that_resumes_last() -> None:
    shelf = Shelf(Predictive())
    for row in range(4):
        shelf.store(row)
        shelf.now_s += 100.0
    shelf.policy.expect(rows_of(0), shelf.now_s + 5.0)
    shelf.policy.expect(rows_of(3), math.inf)
    assert shelf.evict() == [3, 1, 2, 0]


def test_a_hint_counts_until_the_next_use_or_until_it_is_long_overdue() -> None:
    shelf = Shelf(Predictive())
    for row in range(3):
        shelf.store(row)
        shelf.now_s += 1.0
    shelf.policy.expect(rows_of(2), math.inf)
    shelf.use(2)
    shelf.policy.expect(rows_of(0), shelf.now_s + 1.0)
    shelf.now_s += 500.0
    assert shelf.evict() == [0, 1, 2]


def test_hints_of_nothing_and_uses_of_nothing_are_nothing() -> None:
    shelf = Shelf(Predictive())
    shelf.policy.expect(rows_of(), 1.0)
    shelf.use()
    shelf.policy.released(rows_of())
    assert shelf.policy.forget(3) in (Memory(0), Memory(int(shelf.policy.forget(3))))
    assert shelf.evict() == []


# ------------------------------------------------------------------- the model


def counted_by_hand(lives: list[tuple[int, int | None]], now: int) -> tuple[list[float], list[float]]:
    """(reached, used) of each range of ages, counted one observation after the other."""
    reached, used = np.zeros(len(AGES_S)), np.zeros(len(AGES_S))
    for begun, ended in lives:
        until = now - 1 if ended is None else ended
        age = until - begun
        reached[age >= AGES_S] += 1
        if ended is not None:
            used[np.searchsorted(AGES_S, age, side="right") - 1] += 1
    return reached.tolist(), used.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_model_counts_what_a_count_by_hand_does(seed: int) -> None:
    chooser = random.Random(seed)
    model = ReuseModel([0])
    model_decay_off = pytest.MonkeyPatch()
    model_decay_off.setattr("kvservice.policies.reuse._HALF_LIFE_S", math.inf)
    lives: list[tuple[int, int | None]] = []
    now = 1
    for _ in range(600):
        now += chooser.choice([0, 0, 1, 3, 11])
        model.advance(float(now))
        open_ones = [at for at, (begun, ended) in enumerate(lives) if ended is None]
        if open_ones and chooser.random() < 0.4:
            at = chooser.choice(open_ones)
            model.ended(0, lives[at][0], 1.0)
            lives[at] = (lives[at][0], now)
        else:
            model.started(0)
            lives.append((now, None))
    now += 10
    model.advance(float(now))
    model_decay_off.undo()
    reached, used = counted_by_hand(lives, now)
    assert model._reached[0].tolist() == pytest.approx(reached)
    assert model._used[0].tolist() == pytest.approx(used)


def test_a_long_silence_costs_no_time_and_leaves_no_trace() -> None:
    model = ReuseModel([0])
    model.advance(10.0)
    model.started(0)
    model.advance(10.0 + 1e7)
    assert model._waiting.sum() == 0.0
    assert np.isfinite(model.hazards()).all()


def test_worth_falls_with_age_while_nothing_is_known() -> None:
    model = ReuseModel([0, 0, 1])
    model.advance(5000.0)
    worths = [model.worth(2, 5000 - age) for age in (1, 5, 50, 500, 4_000)]
    assert worths == sorted(worths, reverse=True)
    assert len(set(worths)) == len(worths)


def test_worth_of_a_sure_use_is_the_time_until_it() -> None:
    """Every block is used 60 s after it was stored: at 50 s it is worth more than at 0 s, and after that nothing."""
    model = ReuseModel([0])
    for second in range(1, 2_000):
        model.advance(float(second))
        if second > 60:
            model.ended(0, second - 60, 1.0)
        model.started(0)
    assert model.worth(0, 1999 - 48) > 2 * model.worth(0, 1999) > 20 * model.worth(0, 1999 - 200)
    assert model.worth(0, 1999) == pytest.approx(1 / 56, rel=0.2)
