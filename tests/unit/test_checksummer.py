"""Checksums are made after commit, of the bytes that were committed, and never recorded for a slot's next owner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import xxhash

from kvservice.blocks import NO_ROW
from kvservice.checksums import checksum_of
from kvservice.errors import CapacityExhausted
from kvservice.index import State
from kvservice.store import Store
from tests.stores import PAGE_BYTES, Engine, Workplace, chain, content_of, small_config, until

pytestmark = pytest.mark.unit


@pytest.fixture
def workplace() -> Iterator[Workplace]:
    with Workplace(small_config(dram_bytes=4 * PAGE_BYTES)) as opened:
        yield opened


@asynccontextmanager
async def checksumming(store: Store) -> AsyncIterator[None]:
    """The background task runs while this is open, and has done what was queued when it closes."""
    task = asyncio.create_task(store.checksummer.run())
    try:
        yield
        await until(lambda: task.done() or (store.checksummer.queued_blocks == 0 and not _is_hashing(store)))
        assert not task.done(), f"the task died: {task}"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _is_hashing(store: Store) -> bool:
    """Whether slots have more holders than leases and reservations: a batch is under way."""
    held = sum(len(hold.slots) for hold in store.leases)
    return sum(int(namespace.pool.holders.sum()) for namespace in store.namespaces.values()) != held


@contextmanager
def threads_busy(store: Store) -> Iterator[None]:
    """The checksummer's only thread waits while this is open: what is submitted meanwhile is held and not hashed."""
    done = threading.Event()
    store.checksummer._executor.submit(done.wait)
    try:
        yield
    finally:
        done.set()


async def work_off(store: Store) -> None:
    async with checksumming(store):
        pass


def row_of(engine: Engine, block_hash: bytes) -> int:
    index = engine.namespace.index
    return next(row for row in range(len(index.state)) if index.state[row] and index.hash_of(row) == block_hash)


def recorded(engine: Engine, block_hash: bytes) -> int | None:
    """The checksum on record, None if there is none yet."""
    index, row = engine.namespace.index, row_of(engine, block_hash)
    return int(index.checksum[row]) if index.checksummed[row] else None


def expected(block_hash: bytes, writer: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(content_of(block_hash, writer))


@pytest.mark.parametrize(
    ("content", "checksum"), [(b"", 0x2D06800538D394C2), (b"a", 0xE6C632B61E964E1F), (b"abc", 0x78AF5F94892F3950)]
)
def test_the_checksum_is_xxh3_of_64_bits(content: bytes, checksum: int) -> None:
    assert checksum_of(memoryview(content)) == checksum


def test_commit_only_queues(workplace: Workplace) -> None:
    engine = workplace.engine()
    hashes = chain("a", 3)
    workplace.save(engine, hashes)
    assert workplace.store.checksummer.queued_blocks == 3
    assert [recorded(engine, block_hash) for block_hash in hashes] == [None] * 3


def test_every_committed_block_gets_the_checksum_of_its_bytes(workplace: Workplace) -> None:
    engine = workplace.engine()
    hashes = chain("a", 4)
    workplace.save(engine, hashes)
    workplace.run(work_off(workplace.store))
    assert [recorded(engine, block_hash) for block_hash in hashes] == [expected(block_hash) for block_hash in hashes]
    assert workplace.store.checksummer.queued_blocks == 0
    assert workplace.store.metrics.registry.get_sample_value("kvservice_checksums_total") == 4


def test_the_padding_of_a_slot_is_not_part_of_the_checksum(workplace: Workplace) -> None:
    engine = workplace.engine()
    (block_hash,) = hashes = chain("a", 1)
    reserved = workplace.put(engine, hashes)
    engine.write(reserved.slots, [content_of(block_hash)])
    engine.namespace.pool.memory(int(reserved.slots[0]), PAGE_BYTES)[-1:] = b"\xff"
    engine.commit(reserved)
    workplace.run(work_off(workplace.store))
    assert recorded(engine, block_hash) == expected(block_hash)


def test_a_block_that_waits_for_its_prefix_gets_its_checksum_too(workplace: Workplace) -> None:
    engine = workplace.engine()
    hashes = chain("a", 2)
    reserved = workplace.put(engine, hashes)
    engine.write(reserved.slots, [content_of(block_hash) for block_hash in hashes])
    engine.commit(reserved, [1])
    workplace.run(work_off(workplace.store))
    assert engine.namespace.index.state[row_of(engine, hashes[1])] == State.WRITTEN
    assert recorded(engine, hashes[1]) == expected(hashes[1])
    assert recorded(engine, hashes[0]) is None
    engine.commit(reserved)
    workplace.run(work_off(workplace.store))
    assert recorded(engine, hashes[0]) == expected(hashes[0])


def test_a_slot_under_a_new_writers_hands_gets_none(workplace: Workplace) -> None:
    engine = workplace.engine()
    workplace.save(engine, chain("a", 4))
    # All four queued slots change hands before the task comes to them.
    reserved = workplace.put(engine, chain("b", 4))
    workplace.run(work_off(workplace.store))
    assert [recorded(engine, block_hash) for block_hash in chain("b", 4)] == [None] * 4
    engine.write(reserved.slots, [content_of(block_hash) for block_hash in chain("b", 4)])
    engine.commit(reserved)
    workplace.run(work_off(workplace.store))
    assert [recorded(engine, block_hash) for block_hash in chain("b", 4)] == [expected(at) for at in chain("b", 4)]


def test_a_slot_that_was_evicted_and_written_again_gets_the_new_bytes_checksum(workplace: Workplace) -> None:
    engine = workplace.engine()
    for name in "abc":
        workplace.save(engine, chain(name, 4))
    assert workplace.store.checksummer.queued_blocks == 12
    workplace.run(work_off(workplace.store))
    assert [recorded(engine, block_hash) for block_hash in chain("c", 4)] == [expected(at) for at in chain("c", 4)]
    # Each block once, however often its slot was queued.
    assert workplace.store.metrics.registry.get_sample_value("kvservice_checksums_total") == 4


def test_slots_are_held_while_they_are_hashed(workplace: Workplace) -> None:
    engine = workplace.engine()
    hashes = chain("a", 4)
    workplace.save(engine, hashes)
    pool = engine.namespace.pool

    async def scenario() -> None:
        with threads_busy(workplace.store):
            task = asyncio.create_task(workplace.store.checksummer.run())
            await until(lambda: pool.holders.tolist() == [1, 1, 1, 1])
            workplace.store.check()
            with pytest.raises(CapacityExhausted):
                await engine.put(chain("b", 1))
            assert engine.lookup(hashes).dram_blocks == 4
        await until(lambda: pool.holders.tolist() == [0, 0, 0, 0])
        task.cancel()
        # They are in the order of eviction again.
        assert len((await engine.put(chain("b", 4))).slots) == 4

    workplace.run(scenario())


def test_a_block_forgotten_while_it_is_hashed_leaves_its_checksum_to_nobody(workplace: Workplace) -> None:
    engine = workplace.engine()
    workplace.save(engine, chain("a", 4))
    pool = engine.namespace.pool

    async def scenario() -> None:
        with threads_busy(workplace.store):
            task = asyncio.create_task(workplace.store.checksummer.run())
            await until(lambda: pool.holders.tolist() == [1, 1, 1, 1])
            forgotten = workplace.store.forget_namespace(engine.peer, 1)
            assert (forgotten.dropped, forgotten.in_use) == (4, 4)
            assert pool.free_slots == 0, "a slot that is being read must not be promised"
            assert pool.row_of.tolist() == [NO_ROW] * 4
        await until(lambda: pool.free_slots == 4)
        task.cancel()
        assert not engine.namespace.index.checksummed.any(), "no row has anything to do with these bytes"
        # Rows and slots are used again: nothing of the old blocks may stick to them.
        reserved = await engine.put(chain("b", 4))
        assert [recorded(engine, block_hash) for block_hash in chain("b", 4)] == [None] * 4
        engine.write(reserved.slots, [content_of(block_hash) for block_hash in chain("b", 4)])
        engine.commit(reserved)
        async with checksumming(workplace.store):
            pass

    workplace.run(scenario())
    assert [recorded(engine, block_hash) for block_hash in chain("b", 4)] == [expected(at) for at in chain("b", 4)]


def test_blocks_committed_while_the_task_works_are_not_missed(workplace: Workplace) -> None:
    engine = workplace.engine()

    async def scenario() -> None:
        async with checksumming(workplace.store):
            for depth in range(4):
                tail = chain("a", depth + 1)
                await engine.save(tail[depth:], parent=tail[depth - 1] if depth else b"")
                await asyncio.sleep(0)

    workplace.run(scenario())
    assert [recorded(engine, block_hash) for block_hash in chain("a", 4)] == [expected(at) for at in chain("a", 4)]


def test_closing_does_not_wait_for_the_queue(workplace: Workplace) -> None:
    engine = workplace.engine()
    workplace.save(engine, chain("a", 4))
    workplace.store.checksummer.close()
    assert workplace.store.checksummer.queued_blocks == 4
