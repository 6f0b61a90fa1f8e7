"""What waiting requests need does not leave the store while they are inside the eviction window."""

from __future__ import annotations

import math

import pytest

from kvservice import errors
from kvservice.blocks import Rows
from tests.stores import Engine, Workplace, chain

pytestmark = pytest.mark.unit


def rows_of(engine: Engine, name: str, blocks: int) -> Rows:
    return engine.namespace.index.rows_of(chain(name, blocks))  # type: ignore[arg-type]  # hashes are bytes


def held(engine: Engine, name: str, blocks: int) -> int:
    return engine.lookup(chain(name, blocks)).dram_blocks


def test_what_a_waiting_request_needs_stays_until_it_is_withdrawn(workplace: Workplace, engine: Engine) -> None:
    for name in "abcd":
        workplace.save(engine, chain(name, 4))
    engine.namespace.queue("request", rows_of(engine, "a", 4), 1.0)
    workplace.save(engine, chain("e", 12))
    assert [held(engine, name, 4) for name in "abcd"] == [4, 0, 0, 0]
    engine.namespace.unqueue("request")
    workplace.save(engine, chain("f", 4))
    assert held(engine, "a", 4) == 0, "eviction passed it over while it was needed, and forgot it"
    workplace.store.check()


def test_a_put_that_only_needed_blocks_could_make_room_for_is_refused(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 16))
    engine.namespace.queue("request", rows_of(engine, "a", 16), 1.0)
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted, match="1 blocks wanted, 0 could leave"):
        workplace.put(engine, chain("b", 1))


def test_beyond_the_windows_end_needed_blocks_may_leave(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 8))
    workplace.save(engine, chain("b", 8))
    engine.namespace.queue("first", rows_of(engine, "b", 8), 1.0)
    engine.namespace.queue("second", rows_of(engine, "a", 8), 2.0)
    engine.namespace.exempt_until(1.0)
    workplace.save(engine, chain("c", 8))
    assert [held(engine, name, 8) for name in "abc"] == [0, 8, 8]


def test_blocks_left_outside_by_a_window_that_shrinks_come_up_again(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 8))
    workplace.save(engine, chain("b", 8))
    engine.namespace.queue("request", rows_of(engine, "a", 8), 2.0)
    workplace.save(engine, chain("c", 8))  # passes over a
    engine.namespace.exempt_until(1.0)
    workplace.save(engine, chain("d", 8))
    assert [held(engine, name, 8) for name in "abcd"] == [0, 0, 8, 8]
    engine.namespace.exempt_until(math.inf)
    workplace.store.check()


def test_forgetting_a_conversation_overrides_who_waits_for_it(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4), session_id="talk")
    engine.namespace.queue("request", rows_of(engine, "a", 4), 1.0)
    workplace.store.forget_session(engine.peer, 1, "talk")
    assert held(engine, "a", 4) == 0
    workplace.save(engine, chain("b", 16))
    assert held(engine, "b", 16) == 16, "rows with the same numbers as needed ones are exempt"
