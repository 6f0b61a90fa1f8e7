"""A draining store takes nothing new, lets what runs finish, and gives all memory back when it closes."""

from __future__ import annotations

import pytest

from kvservice import errors
from kvservice.instances import DrainNotice, Identity
from kvservice.store.outcomes import Committed, Ended
from tests.stores import Engine, Workplace, chain, content_of, open_descriptors

pytestmark = pytest.mark.unit


def is_idle(workplace: Workplace) -> bool:
    return workplace.store.is_idle


def test_everybody_attached_is_told_how_long_there_is(workplace: Workplace, engine: Engine) -> None:
    other, detached = workplace.engine(), workplace.engine()
    workplace.store.detach(detached.peer)
    workplace.store.drain()
    assert engine.notices == other.notices == [DrainNotice(workplace.store.config.drain_s)]
    assert detached.notices == []
    assert workplace.store.is_draining


def test_what_runs_may_finish(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 3)
    workplace.save(engine, hashes)
    granted = engine.get(hashes)
    reserved = workplace.put(engine, chain("b", 2))
    workplace.store.drain()
    assert not is_idle(workplace)
    workplace.clock.advance(20.0)
    workplace.store.renew(engine.peer, [granted.hold_id], [reserved.hold_id], 0.0)
    assert engine.lookup(hashes).dram_blocks == 3
    assert engine.read(granted.slots) == [content_of(block_hash) for block_hash in hashes]
    assert engine.commit(reserved) == [(2, Committed.PUBLISHED)]
    assert not is_idle(workplace)
    assert workplace.store.release(engine.peer, [granted.hold_id], "") == Ended(live=1, expired=0)
    assert is_idle(workplace)
    with pytest.raises(errors.Draining):
        engine.get(hashes)


def test_who_only_asks_may_still_connect(workplace: Workplace, engine: Engine) -> None:
    workplace.store.drain()
    assert workplace.store.connect(Identity("uid:1")).token


def test_holders_that_never_come_back_do_not_keep_the_store_from_stopping(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    workplace.save(engine, chain("a", 2))
    engine.get(chain("a", 2))
    workplace.put(other, chain("b", 2))
    workplace.store.drain()
    workplace.store.detach(other.peer)
    assert not is_idle(workplace)
    workplace.clock.advance(31.0)
    workplace.upkeep()
    assert is_idle(workplace)


def test_closing_gives_every_descriptor_back() -> None:
    before = open_descriptors()
    with Workplace() as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 16))
        engine.get(chain("a", 16))
        segments = [segment for _, segment in engine.namespace.pool.live_segments()]
        assert open_descriptors() >= before + 2 * len(segments)
    assert all(segment.memory.closed for segment in segments)
    del engine, segments, workplace
    assert open_descriptors() == before
