"""Put reserves, Commit publishes, Abort gives back; two writers of one chain share it without writing a block twice."""

from __future__ import annotations

import pytest

from kvservice import errors
from kvservice.blocks import DropReason
from kvservice.store.outcomes import Committed, Dropped, Looked, Miss, Written
from tests.stores import Engine, Workplace, chain, content_of
from tests.unit.test_store.explaining import finding

pytestmark = pytest.mark.unit


def test_what_is_committed_is_readable_by_everybody_of_the_namespace(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    hashes = chain("a", 5)
    assert engine.lookup(hashes) == Looked(0, 0, 5, Miss.NOT_HELD)
    workplace.save(engine, hashes)
    assert other.lookup(hashes) == Looked(5, 5, 5, Miss.NOT_HELD)
    assert other.load(hashes) == [content_of(block_hash) for block_hash in hashes]
    assert other.lookup([*hashes, *chain("x", 2)]) == Looked(5, 5, 7, Miss.NOT_HELD)
    assert other.lookup(hashes[:2]) == Looked(2, 2, 2, Miss.NOT_HELD)


def test_nothing_is_readable_before_its_commit(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 3)
    reserved = workplace.put(engine, hashes)
    assert reserved.known == []
    assert len(reserved.slots) == 3
    assert engine.lookup(hashes) == Looked(0, 0, 3, Miss.BEING_WRITTEN)
    granted = engine.get(hashes)
    assert (granted.hold_id, len(granted.slots), granted.missed, granted.miss) == (0, 0, 3, Miss.BEING_WRITTEN)
    assert engine.commit(reserved) == [(3, Committed.PUBLISHED)]
    assert engine.lookup(hashes).dram_blocks == 3


def test_a_get_hands_out_the_longest_held_prefix(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 6)
    workplace.save(engine, hashes[:4])
    granted = engine.get(hashes)
    assert engine.read(granted.slots) == [content_of(block_hash) for block_hash in hashes[:4]]
    assert (granted.missed, granted.miss, granted.duration_s) == (2, Miss.NOT_HELD, 30.0)
    assert granted.hold_id > 0


def test_a_get_of_nothing_held_has_no_lease(workplace: Workplace, engine: Engine) -> None:
    granted = engine.get(chain("a", 2))
    assert (granted.hold_id, granted.missed, granted.miss) == (0, 2, Miss.NOT_HELD)
    assert list(workplace.store.leases) == []


@pytest.mark.parametrize(
    ("max_blocks", "leased", "miss"), [(2, 2, Miss.OVER_LIMIT), (4, 4, Miss.NOT_HELD), (9, 4, Miss.NOT_HELD)]
)
def test_a_get_may_be_limited(workplace: Workplace, engine: Engine, max_blocks: int, leased: int, miss: Miss) -> None:
    hashes = chain("a", 6)
    workplace.save(engine, hashes[:4])
    granted = engine.get(hashes, max_blocks=max_blocks)
    assert (len(granted.slots), granted.missed, granted.miss) == (leased, 6 - leased, miss)


def test_a_put_reserves_only_what_is_not_held(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 5)
    workplace.save(engine, hashes[:3])
    reserved = workplace.put(engine, hashes)
    assert reserved.known == [(3, Written.HELD)]
    assert len(reserved.slots) == 2
    engine.write(reserved.slots, [content_of(block_hash) for block_hash in hashes[3:]])
    assert engine.commit(reserved) == [(2, Committed.PUBLISHED)]
    assert engine.load(hashes) == [content_of(block_hash) for block_hash in hashes]
    everything = workplace.put(engine, hashes)
    assert (everything.hold_id, everything.known, len(everything.slots)) == (0, [(5, Written.HELD)], 0)


def test_a_tail_may_be_put_behind_its_parent(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 5)
    workplace.save(engine, hashes[:2])
    workplace.save(engine, hashes[2:], parent=hashes[1])
    assert engine.load(hashes) == [content_of(block_hash) for block_hash in hashes]


def test_a_tail_behind_a_block_that_is_not_held_is_refused(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 5)
    with workplace.unchanged():
        reserved = workplace.put(engine, hashes[2:], parent=hashes[1])
    assert (reserved.hold_id, reserved.known) == (0, [(3, Written.PARENT_MISSING)])


def test_commit_returns_the_reservation_bit_by_bit(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 5)
    reserved = workplace.put(engine, hashes)
    assert engine.commit(reserved, [0, 1]) == [(2, Committed.PUBLISHED)]
    assert engine.lookup(hashes) == Looked(2, 2, 5, Miss.BEING_WRITTEN)
    # Later ones first: they wait for the one in between.
    assert engine.commit(reserved, [4, 3]) == [(2, Committed.AWAITING_PARENT)]
    assert engine.lookup(hashes).dram_blocks == 2
    assert engine.commit(reserved) == [(1, Committed.PUBLISHED)]
    assert engine.lookup(hashes).dram_blocks == 5
    with pytest.raises(errors.LeaseUnknown):
        engine.commit(reserved)


def test_what_was_committed_stays_when_the_rest_is_aborted(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 4)
    reserved = workplace.put(engine, hashes)
    engine.commit(reserved, [0, 1])
    assert workplace.store.abort(engine.peer, reserved.hold_id) is False
    assert engine.lookup(hashes) == Looked(2, 2, 4, Miss.NOT_HELD)
    assert engine.namespace.pool.free_slots == 2
    workplace.store.check()


def test_aborting_leaves_no_trace_but_in_the_history(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 3)
    reserved = workplace.put(engine, hashes)
    workplace.store.abort(engine.peer, reserved.hold_id)
    assert engine.lookup(hashes) == Looked(0, 0, 3, Miss.NOT_HELD)
    assert engine.namespace.pool.free_slots == 4
    assert list(workplace.store.leases) == []
    dropped = finding(workplace, hashes[0])
    assert isinstance(dropped, Dropped)
    assert dropped.reason is DropReason.ABORTED
    with pytest.raises(errors.LeaseUnknown):
        workplace.store.abort(engine.peer, reserved.hold_id)
    with pytest.raises(errors.LeaseUnknown):
        engine.commit(reserved)


def test_a_block_committed_behind_an_aborted_one_is_lost(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 3)
    reserved = workplace.put(engine, hashes)
    assert engine.commit(reserved, [2]) == [(1, Committed.AWAITING_PARENT)]
    workplace.store.abort(engine.peer, reserved.hold_id)
    assert engine.namespace.pool.free_slots == 4
    assert len(engine.namespace.index) == 0
    workplace.store.check()


# ----------------------------------------------------------------- two writers


def test_a_second_writer_is_told_and_writes_nothing(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    hashes = chain("a", 3)
    first = workplace.put(engine, hashes)
    with workplace.unchanged():
        second = workplace.put(other, hashes)
    assert (second.hold_id, second.known, len(second.slots)) == (0, [(3, Written.BEING_WRITTEN)], 0)
    engine.commit(first)
    assert workplace.put(other, hashes).known == [(3, Written.HELD)]


def test_a_second_writer_may_go_on_behind_the_first(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    hashes = chain("a", 4)
    first = workplace.put(engine, hashes[:2])
    second = workplace.put(other, hashes)
    assert second.known == [(2, Written.BEING_WRITTEN)]
    engine.write(first.slots, [content_of(block_hash) for block_hash in hashes[:2]])
    other.write(second.slots, [content_of(block_hash) for block_hash in hashes[2:]])
    assert other.commit(second) == [(2, Committed.AWAITING_PARENT)]
    assert other.lookup(hashes) == Looked(0, 0, 4, Miss.BEING_WRITTEN)
    # A third one sees all of it as being written, the committed part too: it cannot be read yet.
    assert workplace.put(engine, hashes).known == [(4, Written.BEING_WRITTEN)]
    assert engine.commit(first) == [(2, Committed.PUBLISHED)]
    assert engine.load(hashes) == [content_of(block_hash) for block_hash in hashes]


def test_known_blocks_are_told_apart_and_what_is_missing_reserved(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    hashes = chain("a", 6)
    workplace.save(engine, hashes[:2])
    workplace.put(engine, hashes[:4])
    reserved = workplace.put(other, hashes)
    assert reserved.known == [(2, Written.HELD), (2, Written.BEING_WRITTEN)]
    assert len(reserved.slots) == 2


@pytest.mark.parametrize("end", ["abort", "expire", "hang up", "detach"])
def test_a_writer_behind_one_who_gave_up_loses_its_blocks(workplace: Workplace, engine: Engine, end: str) -> None:
    other = workplace.engine()
    hashes = chain("a", 5)
    first = workplace.put(engine, hashes[:2], duration_s=10.0)
    second = workplace.put(other, hashes, duration_s=100.0)
    assert other.commit(second, [0]) == [(1, Committed.AWAITING_PARENT)]
    if end == "abort":
        workplace.store.abort(engine.peer, first.hold_id)
    elif end == "expire":
        workplace.clock.advance(11.0)
        workplace.upkeep()
    elif end == "hang up":
        engine.hang_up()
    else:
        workplace.store.detach(engine.peer)
    workplace.store.check()
    dropped = finding(workplace, hashes[3])
    assert isinstance(dropped, Dropped)
    assert dropped.reason is DropReason.PREFIX_LOST
    # The blocks left the index at once, so that others may store them; the slots are still the writer's.
    other_slots = set(second.slots[1:].tolist())
    again = workplace.put(other, hashes)
    assert len(again.slots) == 5
    assert not other_slots & set(again.slots.tolist())
    assert other.commit(second) == [(2, DropReason.PREFIX_LOST)]
    other.write(again.slots, [content_of(block_hash, 2) for block_hash in hashes])
    assert other.commit(again) == [(5, Committed.PUBLISHED)]
    assert other.load(hashes) == [content_of(block_hash, 2) for block_hash in hashes]


def test_outcomes_of_a_commit_are_for_the_positions_named(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    hashes = chain("a", 4)
    first = workplace.put(engine, hashes[:1])
    second = workplace.put(other, hashes)
    workplace.store.abort(engine.peer, first.hold_id)
    assert other.commit(second, [1]) == [(1, DropReason.PREFIX_LOST)]
    assert other.commit(second, [2]) == [(1, DropReason.PREFIX_LOST)]
    assert other.commit(second) == [(1, DropReason.PREFIX_LOST)]
    assert list(workplace.store.leases) == []


def test_slots_that_are_written_again_change_their_generation(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4))
    granted = engine.get(chain("a", 4))
    ((segment, places, before),) = engine.namespace.pool.locate(granted.slots)
    workplace.store.release(engine.peer, [granted.hold_id], "")
    assert segment.generations[places].tolist() == before.tolist()
    workplace.store.forget_namespace(engine.peer, 1)
    assert segment.generations[places].tolist() == before.tolist(), "nobody has the slots yet"
    workplace.put(engine, chain("b", 4))
    assert (segment.generations[places] == before + 1).all()


def test_blocks_are_counted_where_they_are_counted(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 3))
    engine.get(chain("a", 5))
    engine.lookup(chain("a", 5))
    counters = engine.namespace.counters
    assert (counters.requested, counters.dram_hits, counters.misses, counters.committed) == (5, 3, 2, 3)
    registry = workplace.store.metrics.registry
    assert registry.get_sample_value("kvservice_block_commits_total") == 3
    assert registry.get_sample_value("kvservice_committed_bytes_total") == 3 * 64
