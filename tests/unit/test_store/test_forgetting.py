"""Forgetting a session drops what only it needs, forgetting a namespace everything; leased slots wait for readers."""

from __future__ import annotations

import pytest

from kvservice.blocks import DropReason
from kvservice.store.outcomes import Committed, Dropped, Forgotten
from tests.stores import Engine, Workplace, chain, content_of, small_config
from tests.unit.test_store.explaining import finding

pytestmark = pytest.mark.unit


def forget(engine: Engine, session_id: str) -> Forgotten:
    return engine.store.forget_session(engine.peer, 1, session_id)


def held(engine: Engine, name: str, blocks: int) -> int:
    return engine.lookup(chain(name, blocks)).dram_blocks


def test_a_session_alone_on_its_chain_takes_it_along(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4), session_id="talk")
    workplace.save(engine, chain("b", 2))
    assert forget(engine, "talk") == Forgotten(dropped=4, in_use=0)
    assert (held(engine, "a", 4), held(engine, "b", 2)) == (0, 2)
    dropped = finding(workplace, chain("a", 1)[0])
    assert isinstance(dropped, Dropped)
    assert dropped.reason is DropReason.FORGOTTEN
    assert len(engine.namespace.sessions) == 0


def test_forgetting_twice_or_somebody_unknown_is_nothing(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4), session_id="talk")
    with workplace.unchanged():
        assert forget(engine, "nobody") == Forgotten(0, 0)
    forget(engine, "talk")
    with workplace.unchanged():
        assert forget(engine, "talk") == Forgotten(0, 0)


def test_a_prefix_that_another_session_needs_stays(workplace: Workplace, engine: Engine) -> None:
    trunk, mine, theirs = chain("trunk", 3), chain("mine", 2), chain("theirs", 2)
    workplace.save(engine, trunk)
    workplace.save(engine, mine, parent=trunk[-1], session_id="mine")
    workplace.save(engine, theirs, parent=trunk[-1], session_id="theirs")
    assert forget(engine, "mine") == Forgotten(2, 0)
    assert engine.lookup([*trunk, *mine]).dram_blocks == 3
    assert engine.lookup([*trunk, *theirs]).dram_blocks == 5
    assert forget(engine, "theirs") == Forgotten(5, 0)


def test_a_session_that_ends_inside_another_ones_chain_keeps_that_part(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 5)
    workplace.save(engine, hashes[:2], session_id="short")
    workplace.save(engine, hashes[2:], parent=hashes[1], session_id="long")
    assert forget(engine, "long") == Forgotten(3, 0)
    assert held(engine, "a", 5) == 2
    assert forget(engine, "short") == Forgotten(2, 0)


def test_reading_belongs_to_a_session_as_writing_does(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 4)
    workplace.save(engine, hashes, session_id="writer")
    granted = engine.get(hashes[:3], session_id="reader")
    engine.store.release(engine.peer, [granted.hold_id], "")
    assert forget(engine, "writer") == Forgotten(1, 0)
    assert held(engine, "a", 4) == 3
    assert forget(engine, "reader") == Forgotten(3, 0)


def test_every_branch_of_a_session_goes(workplace: Workplace, engine: Engine) -> None:
    trunk = chain("trunk", 2)
    workplace.save(engine, trunk, session_id="talk")
    for reply in "abc":
        workplace.save(engine, chain(reply, 2), parent=trunk[-1], session_id="talk")
    assert forget(engine, "talk") == Forgotten(8, 0)
    assert len(engine.namespace.index) == 0


def test_a_conversation_that_grew_turn_by_turn_goes_as_one(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 9)
    for end in (3, 6, 9):
        workplace.save(engine, hashes[:end], session_id="talk")
    assert forget(engine, "talk") == Forgotten(9, 0)


def test_what_is_leased_is_unreachable_at_once_and_freed_at_release(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 4)
    workplace.save(engine, hashes, session_id="talk")
    granted = engine.get(hashes[:3])
    assert forget(engine, "talk") == Forgotten(dropped=4, in_use=3)
    assert held(engine, "a", 4) == 0
    assert engine.namespace.pool.free_slots == 1
    assert engine.read(granted.slots) == [content_of(block_hash) for block_hash in hashes[:3]]
    workplace.store.check()
    engine.store.release(engine.peer, [granted.hold_id], "")
    assert engine.namespace.pool.free_slots == 4


def test_blocks_that_somebody_writes_behind_stay(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 4)
    workplace.save(engine, hashes[:2], session_id="talk")
    reserved = workplace.put(engine, hashes)
    assert forget(engine, "talk") == Forgotten(0, 0)
    assert engine.commit(reserved) == [(2, Committed.PUBLISHED)]
    assert held(engine, "a", 4) == 4


def test_a_session_whose_end_was_evicted_ends_earlier(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 10), session_id="talk")
    workplace.save(engine, chain("b", 10))
    assert held(engine, "a", 10) == 6
    assert forget(engine, "talk") == Forgotten(6, 0)


def test_a_name_lost_from_full_books_loses_no_block() -> None:
    with Workplace(small_config(sessions_max=2)) as workplace:
        engine = workplace.engine()
        for name in "abc":
            workplace.save(engine, chain(name, 2), session_id=name)
        assert forget(engine, "a") == Forgotten(0, 0)
        assert held(engine, "a", 2) == 2
        assert forget(engine, "b") == Forgotten(2, 0)


def test_a_whole_namespace_is_forgotten_with_what_is_leased_or_being_written(
    workplace: Workplace, engine: Engine
) -> None:
    other = workplace.engine()
    workplace.save(engine, chain("a", 4), session_id="talk")
    granted = engine.get(chain("a", 2))
    reserved = workplace.put(other, chain("w", 3))
    assert workplace.store.forget_namespace(engine.peer, 1) == Forgotten(dropped=7, in_use=5)
    assert len(engine.namespace.index) == len(engine.namespace.sessions) == 0
    workplace.store.check()
    assert other.commit(reserved) == [(3, DropReason.PREFIX_LOST)]
    engine.store.release(engine.peer, [granted.hold_id], "")
    assert engine.namespace.pool.free_slots == engine.namespace.pool.total_slots
    with workplace.unchanged():
        assert workplace.store.forget_namespace(engine.peer, 1) == Forgotten(0, 0)


def test_forgetting_is_possible_while_draining(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4), session_id="talk")
    workplace.save(engine, chain("b", 4))
    workplace.store.drain()
    assert forget(engine, "talk") == Forgotten(4, 0)
    assert workplace.store.forget_namespace(engine.peer, 1) == Forgotten(4, 0)
