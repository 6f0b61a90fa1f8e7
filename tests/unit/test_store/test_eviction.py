"""Room is made in the order of last use, from the ends of chains, inside quota and watermarks, or not at all."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvservice import errors
from kvservice.blocks import BlockHash, DropReason
from kvservice.store.outcomes import Dropped
from tests.stores import PAGE_BYTES, Engine, Workplace, chain, content_of, small_config
from tests.unit.test_store.explaining import finding

pytestmark = pytest.mark.unit

GIB = 1 << 30


def held(engine: Engine, name: str, blocks: int) -> int:
    return engine.lookup(chain(name, blocks)).dram_blocks


def test_the_blocks_used_longest_ago_leave_the_deepest_first(workplace: Workplace, engine: Engine) -> None:
    for name in "abcd":
        workplace.save(engine, chain(name, 4))
    engine.load(chain("a", 4))
    workplace.save(engine, chain("e", 3))
    assert [held(engine, name, 4) for name in "abcd"] == [4, 1, 4, 4]
    workplace.save(engine, chain("f", 4))
    assert [held(engine, name, 4) for name in "abcd"] == [4, 0, 1, 4]
    dropped = finding(workplace, chain("b", 4)[3])
    assert isinstance(dropped, Dropped)
    assert dropped.reason is DropReason.CAPACITY


def test_a_lookup_is_no_use(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 8))
    workplace.save(engine, chain("b", 8))
    engine.lookup(chain("a", 8))
    workplace.save(engine, chain("c", 8))
    assert [held(engine, name, 8) for name in "abc"] == [0, 8, 8]


def test_a_shared_prefix_stays_while_one_of_its_ends_is_in_use(workplace: Workplace, engine: Engine) -> None:
    trunk = chain("trunk", 4)
    workplace.save(engine, trunk)
    for name in "abc":
        workplace.save(engine, chain(name, 4), parent=trunk[-1])
    engine.load([*trunk, *chain("c", 4)])
    workplace.save(engine, chain("x", 8))
    assert [engine.lookup([*trunk, *chain(name, 4)]).dram_blocks for name in "abc"] == [4, 4, 8]


def test_leased_blocks_stay_whatever_comes(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 3))
    workplace.clock.advance(1.0)
    granted = engine.get(chain("a", 3))
    for name in "bcdefgh":
        workplace.save(engine, chain(name, 5))
    assert held(engine, "a", 3) == 3
    assert engine.read(granted.slots) == [content_of(block_hash) for block_hash in chain("a", 3)]
    assert len(engine.namespace.index) == 16
    # Released, it is what was used last; eviction passed over it and must not forget it.
    workplace.store.release(engine.peer, [granted.hold_id], "")
    workplace.save(engine, chain("i", 12))
    assert held(engine, "a", 3) == 3
    workplace.save(engine, chain("j", 16))
    assert held(engine, "a", 3) == 0
    assert held(engine, "j", 16) == 16


def test_what_the_daemon_itself_holds_for_a_while_is_not_used_by_that(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("old", 6))
    workplace.save(engine, chain("new", 6))
    namespace = engine.namespace
    slots = namespace.index.slot[namespace.index.rows_of([BlockHash(each) for each in chain("old", 6)])]
    namespace.pool.hold(slots)  # as the checksummer and write-behind do
    workplace.save(engine, chain("x", 6))
    assert [held(engine, name, 6) for name in ("old", "new", "x")] == [6, 4, 6], "eviction passed over what is held"
    namespace.end_work(slots)
    workplace.save(engine, chain("y", 4))
    assert [held(engine, name, 6) for name in ("old", "new", "x", "y")] == [2, 4, 6, 4], "it is the oldest still"


def test_a_full_arena_with_everything_leased_refuses_and_evicts_nothing(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 16))
    engine.get(chain("a", 16))
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted, match="1 blocks wanted, 0 could leave"):
        workplace.put(engine, chain("b", 1))
    assert held(engine, "a", 16) == 16


def test_more_blocks_than_could_leave_are_refused_and_nothing_is_evicted(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 8))
    workplace.save(engine, chain("b", 8))
    engine.get(chain("b", 8))
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted, match="9 blocks wanted, 8 could leave"):
        workplace.put(engine, chain("c", 9))
    assert len(workplace.put(engine, chain("c", 8)).slots) == 8


def test_what_stands_in_front_of_blocks_in_use_does_not_count_as_room(workplace: Workplace, engine: Engine) -> None:
    """Nothing may be evicted for a put that is refused in the end."""
    hashes = chain("a", 8)
    workplace.save(engine, hashes[:6])
    workplace.put(engine, hashes[6:], parent=hashes[5])
    workplace.save(engine, chain("b", 8))
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted, match="9 blocks wanted, 8 could leave"):
        workplace.put(engine, chain("c", 9))
    assert len(workplace.put(engine, chain("c", 8)).slots) == 8


def test_committed_blocks_that_wait_for_their_prefix_do_not_count_as_room(workplace: Workplace, engine: Engine) -> None:
    reserved = workplace.put(engine, chain("a", 8))
    engine.commit(reserved, [1, 2, 3, 4, 5, 6, 7])
    workplace.save(engine, chain("b", 8))
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted, match="9 blocks wanted, 8 could leave"):
        workplace.put(engine, chain("c", 9))
    assert len(workplace.put(engine, chain("c", 8)).slots) == 8


def test_a_put_larger_than_the_arena_is_refused(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 16))
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted):
        workplace.put(engine, chain("b", 17))


def test_a_chain_does_not_evict_its_own_front_to_grow(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 20)
    workplace.save(engine, hashes[:14])
    workplace.save(engine, chain("other", 2))
    workplace.save(engine, hashes[14:16], parent=hashes[13])
    assert engine.lookup(hashes).dram_blocks == 16
    assert held(engine, "other", 2) == 0
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted):
        workplace.put(engine, hashes)
    with pytest.raises(errors.CapacityExhausted):
        workplace.put(engine, hashes[16:], parent=hashes[15])
    assert engine.lookup(hashes).dram_blocks == 16


def test_blocks_that_are_being_written_are_not_evicted(workplace: Workplace, engine: Engine) -> None:
    reserved = workplace.put(engine, chain("a", 8))
    workplace.save(engine, chain("b", 8))
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted):
        workplace.put(engine, chain("c", 9))
    workplace.save(engine, chain("c", 8))
    engine.commit(reserved)
    assert held(engine, "a", 8) == 8


def test_a_prefix_stays_while_something_behind_it_is_being_written(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 10)
    workplace.save(engine, hashes[:8])
    reserved = workplace.put(engine, hashes)
    workplace.save(engine, chain("b", 6))
    workplace.save(engine, chain("c", 6))
    assert held(engine, "b", 6) == 0
    assert engine.lookup(hashes).dram_blocks == 8
    # Once nobody writes behind it any more it may leave like others.
    workplace.store.abort(engine.peer, reserved.hold_id)
    workplace.save(engine, chain("d", 10))
    assert engine.lookup(hashes).dram_blocks == 0
    assert held(engine, "c", 6) == 6


# -------------------------------------------------------------------- growth


def test_memory_is_taken_as_it_is_needed_and_announced(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    assert workplace.store.arena.used_bytes == 4 * PAGE_BYTES
    workplace.save(engine, chain("a", 4))
    assert engine.added_ids == []
    workplace.save(engine, chain("b", 5))
    assert workplace.store.arena.used_bytes == 12 * PAGE_BYTES
    assert len(engine.added_ids) == 2
    assert other.added_ids == engine.added_ids
    assert engine.retired_ids == []
    live = [segment.segment_id for _, segment in engine.namespace.pool.live_segments()]
    assert live[1:] == engine.added_ids


def test_nothing_is_evicted_while_memory_is_left(workplace: Workplace, engine: Engine) -> None:
    for name in "abcd":
        workplace.save(engine, chain(name, 4))
    assert [held(engine, name, 4) for name in "abcd"] == [4, 4, 4, 4]
    assert engine.namespace.counters.dropped == {}


def test_a_last_segment_is_as_small_as_what_is_left() -> None:
    with Workplace(small_config(dram_bytes=6 * PAGE_BYTES + 100)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 6))
        assert [segment.slots for _, segment in engine.namespace.pool.live_segments()] == [4, 2]
        workplace.save(engine, chain("b", 6))
        assert held(engine, "a", 6) == 0


def test_memory_is_made_ahead_of_need() -> None:
    with Workplace(small_config(dram_grow_ahead_bytes=6 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        workplace.upkeep()
        assert engine.namespace.pool.free_slots == 8
        workplace.upkeep()
        assert engine.namespace.pool.free_slots == 8, "enough is enough"
        workplace.save(engine, chain("a", 4))
        workplace.upkeep()
        assert engine.namespace.pool.free_slots == 8
        workplace.save(engine, chain("b", 3))
        workplace.store.drain()
        workplace.upkeep()
        assert engine.namespace.pool.free_slots == 5, "no new memory for a daemon that stops"


def test_memory_is_not_made_ahead_for_a_namespace_that_nobody_uses() -> None:
    with Workplace(small_config(dram_grow_ahead_bytes=6 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        engine.hang_up()
        with workplace.unchanged():
            workplace.upkeep()


@contextmanager
def memory_refused() -> Iterator[None]:
    """The system gives no file of more than a page, memory files included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_when_the_system_refuses_memory_a_save_makes_do_with_eviction(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4))
    with memory_refused():
        workplace.save(engine, chain("b", 1))
    assert held(engine, "b", 1) == 1
    assert held(engine, "a", 4) == 3, "the deepest block left for it"
    assert workplace.store.arena.used_bytes == engine.namespace.pool.size_bytes, "nothing of the refused segment stays"


def test_memory_that_was_refused_is_asked_for_again_later() -> None:
    with Workplace(small_config(dram_grow_ahead_bytes=GIB)) as workplace:
        engine = workplace.engine()
        with workplace.unchanged(), memory_refused():
            workplace.upkeep()
        before = engine.namespace.pool.free_slots
        workplace.upkeep()
        assert engine.namespace.pool.free_slots == before, "not at once"
        workplace.clock.advance(11.0)
        workplace.upkeep()
        assert engine.namespace.pool.free_slots == 2 * before


# --------------------------------------------------------- watermarks and quota


def test_above_the_high_watermark_blocks_leave_down_to_the_low_one() -> None:
    marks = small_config(dram_bytes=20 * PAGE_BYTES, high_watermark=0.8, low_watermark=0.5)
    with Workplace(marks) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 8))
        workplace.save(engine, chain("b", 8))
        workplace.upkeep()
        assert len(engine.namespace.index) == 16, "it can still grow"
        workplace.save(engine, chain("c", 4))
        workplace.upkeep()
        assert [held(engine, name, 8) for name in "ab"] == [0, 6]
        assert held(engine, "c", 4) == 4
        assert engine.namespace.pool.free_slots == 10
        assert engine.namespace.counters.dropped == {DropReason.CAPACITY: 10}
        workplace.save(engine, chain("d", 6))
        with workplace.unchanged():
            workplace.upkeep()  # 16 of 20 is not above the high watermark
        workplace.save(engine, chain("e", 1))
        workplace.upkeep()
        assert engine.namespace.pool.free_slots == 10


def test_watermarks_leave_what_is_leased() -> None:
    with Workplace(small_config(high_watermark=0.5, low_watermark=0.25)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 16))
        engine.get(chain("a", 10))
        workplace.upkeep()
        assert held(engine, "a", 16) == 10


def test_a_namespace_at_its_quota_evicts_its_own_blocks() -> None:
    with Workplace(small_config(dram_quota_bytes=8 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 6))
        workplace.save(engine, chain("b", 6))
        assert workplace.store.arena.used_bytes == 8 * PAGE_BYTES
        assert (held(engine, "a", 6), held(engine, "b", 6)) == (2, 6)
        assert engine.namespace.counters.dropped == {DropReason.QUOTA: 4}
        dropped = finding(workplace, chain("a", 6)[5])
        assert isinstance(dropped, Dropped)
        assert dropped.reason is DropReason.QUOTA


def test_a_quota_full_of_blocks_in_use_is_its_own_error() -> None:
    with Workplace(small_config(dram_quota_bytes=8 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 8))
        engine.get(chain("a", 8))
        with workplace.unchanged(), pytest.raises(errors.QuotaExceeded, match="quota of 32768 bytes is in use"):
            workplace.put(engine, chain("b", 1))


def test_a_quota_that_is_not_reached_costs_no_hits() -> None:
    with Workplace(small_config(dram_quota_bytes=12 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 8))
        with workplace.unchanged():
            workplace.upkeep()


def test_a_quota_of_odd_size_is_used_as_far_as_whole_blocks_go() -> None:
    with Workplace(small_config(dram_quota_bytes=6 * PAGE_BYTES - 1)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 5))
        assert held(engine, "a", 5) == 5
        assert workplace.store.arena.used_bytes == 5 * PAGE_BYTES
        with pytest.raises(errors.CapacityExhausted):
            workplace.put(engine, chain("b", 6))
