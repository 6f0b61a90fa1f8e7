"""Callers that wait for memory side by side, or go away while they wait, exceed no bound and leak nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvservice import errors
from tests.stores import PAGE_BYTES, Workplace, chain, open_descriptors, small_config, spec_of, until

pytestmark = pytest.mark.unit


@contextmanager
def threads_busy(workplace: Workplace) -> Iterator[None]:
    """The store's memory threads wait while this is open: whoever needs a segment made or closed waits too."""
    done = threading.Event()
    executor = workplace.store._space._executor
    for _ in range(executor._max_workers):
        executor.submit(done.wait)
    try:
        yield
    finally:
        done.set()


async def interrupted(workplace: Workplace, work: Coroutine[Any, Any, Any]) -> None:
    """Start it, cancel it while it waits for memory, and let the threads finish what they have begun."""
    with threads_busy(workplace):
        task = asyncio.create_task(work)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done(), "it should wait for memory"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: workplace.store._space.in_flight_bytes == 0)


def test_two_puts_that_grow_at_once_stay_inside_the_quota() -> None:
    with Workplace(small_config(dram_quota_bytes=8 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 4))

        async def both() -> None:
            await asyncio.gather(engine.put(chain("b", 2)), engine.put(chain("c", 2)))

        workplace.run(both())
        assert workplace.store.arena.used_bytes == 8 * PAGE_BYTES


def test_attachments_at_once_stay_inside_the_bound_on_namespaces() -> None:
    with Workplace(small_config(namespaces_max=2)) as workplace:
        for name in ("old", "older"):
            workplace.engine(spec_of(name)).hang_up()

        async def both() -> None:
            await asyncio.gather(workplace.attached(spec_of("new")), workplace.attached(spec_of("newer")))

        workplace.run(both())
        assert {namespace.spec.label for namespace in workplace.store.namespaces.values()} == {"new", "newer"}


def test_attachments_at_once_to_one_new_namespace_share_it() -> None:
    with Workplace(small_config(namespaces_max=1)) as workplace:
        workplace.engine(spec_of("old")).hang_up()

        async def both() -> None:
            one, two = await asyncio.gather(workplace.attached(spec_of("new")), workplace.attached(spec_of("new")))
            await one.save(chain("a", 2))
            assert two.lookup(chain("a", 2)).dram_blocks == 2

        workplace.run(both())


def test_two_writers_of_one_chain_that_wait_for_memory_do_not_both_get_it() -> None:
    with Workplace(small_config()) as workplace:
        engine, other = workplace.engine(), workplace.engine()
        workplace.save(engine, chain("a", 4))

        async def both() -> list[int]:
            first, second = await asyncio.gather(engine.put(chain("b", 3)), other.put(chain("b", 3)))
            return sorted([len(first.slots), len(second.slots)])

        assert workplace.run(both()) == [0, 3]


def test_a_put_given_up_while_memory_is_made_keeps_the_memory_and_nothing_else() -> None:
    with Workplace() as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 4))
        workplace.run(interrupted(workplace, engine.put(chain("b", 2), parent=chain("a", 4)[3])))
        workplace.store.check()
        assert list(workplace.store.leases) == []
        assert engine.namespace.pool.free_slots == 4, "the segment is there for the next"
        assert len(engine.added_ids) == 1
        assert not engine.namespace.pool.holders.any()


def test_an_attachment_given_up_while_memory_is_made_is_no_attachment() -> None:
    with Workplace() as workplace:
        peer = workplace.engine().peer
        workplace.store.detach(peer)
        workplace.run(interrupted(workplace, workplace.store.attach(peer, "x", [spec_of("new", tenant="uid:1")])))
        workplace.store.check()
        assert not peer.is_attached
        with pytest.raises(errors.NamespaceUnknown):
            workplace.store.lookup(peer, 1, chain("a", 1)[0])


def test_memory_that_changes_hands_is_not_lost_when_the_taker_goes_away() -> None:
    with Workplace() as workplace:
        engine = workplace.engine(spec_of("donor"))
        workplace.save(engine, chain("a", 16))
        workplace.run(interrupted(workplace, workplace.attached(spec_of("taker"))))
        workplace.store.check()
        assert workplace.store.arena.used_bytes == engine.namespace.pool.size_bytes == 12 * PAGE_BYTES
        assert workplace.engine(spec_of("taker")).namespace.pool.free_slots == 4


def test_a_dropped_namespace_gives_all_its_memory_back_though_nobody_waits_for_it() -> None:
    before = open_descriptors()
    with Workplace(small_config(namespaces_max=1)) as workplace:
        engine = workplace.engine(spec_of("old"))
        workplace.save(engine, chain("a", 16))
        engine.hang_up()
        workplace.run(interrupted(workplace, workplace.attached(spec_of("new"))))
        workplace.store.check()
        assert workplace.store.arena.used_bytes == 0
        del engine
    del workplace
    assert open_descriptors() == before


def test_a_namespace_dropped_while_its_first_memory_is_made_is_refused_and_takes_nothing() -> None:
    with Workplace(small_config(namespaces_max=2)) as workplace:
        busy = workplace.engine(spec_of("busy"))
        workplace.save(busy, chain("a", 4))

        async def both() -> None:
            first, second = await asyncio.gather(
                workplace.attached(spec_of("new")), workplace.attached(spec_of("newer")), return_exceptions=True
            )
            assert isinstance(first, errors.CapacityExhausted)
            assert "dropped meanwhile: attach again" in str(first)
            assert not isinstance(second, BaseException)

        workplace.run(both())
        assert {namespace.spec.label for namespace in workplace.store.namespaces.values()} == {"busy", "newer"}
        assert busy.lookup(chain("a", 4)).dram_blocks == 4


def test_a_process_that_dies_while_its_put_waits_gets_nothing() -> None:
    with Workplace() as workplace:
        engine, other = workplace.engine(), workplace.engine()
        workplace.save(engine, chain("a", 4))

        async def dies() -> None:
            waiting = asyncio.create_task(engine.put(chain("b", 2), parent=chain("a", 4)[3]))
            await asyncio.sleep(0)
            engine.hang_up()
            with pytest.raises(errors.NamespaceUnknown):
                await waiting

        workplace.run(dies())
        assert list(workplace.store.leases) == []
        assert len(workplace.put(other, chain("b", 2)).slots) == 2


def test_a_prefix_forgotten_while_its_continuation_waits_is_a_missing_parent() -> None:
    with Workplace() as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 4))

        async def forgets() -> list[Any]:
            waiting = asyncio.create_task(engine.put(chain("b", 5), parent=chain("a", 4)[3]))
            await asyncio.sleep(0)
            workplace.store.forget_namespace(engine.peer, 1)
            return (await waiting).known

        ((blocks, written),) = workplace.run(forgets())
        assert (blocks, written.name) == (5, "PARENT_MISSING")
        assert not engine.namespace.pool.holders.any()
