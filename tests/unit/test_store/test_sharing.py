"""Namespaces share one arena fairly, in memory that is wiped between them, and there are only so many of them."""

from __future__ import annotations

import mmap
import os

import pytest

from kvservice import errors
from kvservice.blocks import DropReason
from kvservice.config import NamespaceRule
from kvservice.store.outcomes import Dropped
from tests.stores import BLOCK_BYTES, PAGE_BYTES, Engine, Workplace, chain, content_of, small_config, spec_of
from tests.unit.test_store.explaining import finding

pytestmark = pytest.mark.unit


@pytest.fixture
def first(workplace: Workplace) -> Engine:
    return workplace.engine(spec_of("first", tenant="uid:1"))


def second_of(workplace: Workplace) -> Engine:
    return workplace.engine(spec_of("second", tenant="uid:1"))


def pages(engine: Engine) -> int:
    return engine.namespace.pool.size_bytes // PAGE_BYTES


def test_a_second_namespace_gets_its_share_from_the_first(workplace: Workplace, first: Engine) -> None:
    for name in "abcd":
        workplace.save(first, chain(name, 4))
        workplace.clock.advance(1.0)
    second = second_of(workplace)
    assert (pages(first), pages(second)) == (12, 4)
    workplace.save(second, chain("x", 8))
    assert (pages(first), pages(second)) == (8, 8)
    # At its share it makes room among its own.
    workplace.save(second, chain("y", 4))
    assert (pages(first), pages(second)) == (8, 8)
    assert second.lookup(chain("x", 8)).dram_blocks == 4
    # The coldest segments went.
    assert [first.lookup(chain(name, 4)).dram_blocks for name in "abcd"] == [0, 0, 4, 4]
    dropped = finding(workplace, chain("a", 4)[0])
    assert isinstance(dropped, Dropped)
    assert dropped.reason is DropReason.RECLAIMED
    assert first.namespace.counters.dropped == {DropReason.RECLAIMED: 8}


def test_the_engine_that_loses_a_segment_is_told_and_the_other_hears_of_its_own(
    workplace: Workplace, first: Engine
) -> None:
    workplace.save(first, chain("a", 16))
    before = {segment.segment_id for _, segment in first.namespace.pool.live_segments()}
    second = second_of(workplace)
    after = {segment.segment_id for _, segment in first.namespace.pool.live_segments()}
    assert set(first.retired_ids) == before - after
    assert len(first.retired_ids) == 1
    assert second.retired_ids == []
    workplace.save(second, chain("x", 8))
    assert len(first.retired_ids) == 2
    theirs = {segment.segment_id for _, segment in second.namespace.pool.live_segments()}
    assert set(second.added_ids) < theirs
    assert not theirs & before, "a segment never changes its namespace"


def test_memory_changes_hands_punched_out_and_zeroed(workplace: Workplace, first: Engine) -> None:
    workplace.save(first, chain("a", 16))
    kept = {segment.segment_id: os.dup(segment.memory_fd) for _, segment in first.namespace.pool.live_segments()}
    try:
        second = second_of(workplace)
        (gone,) = first.retired_ids
        # A process that still maps it reads zeros, not what was there and not what the other stores.
        with mmap.mmap(kept[gone], 4 * PAGE_BYTES) as mapped:
            assert mapped[:] == bytes(4 * PAGE_BYTES)
            reserved = workplace.put(second, chain("x", 4))
            assert second.read(reserved.slots) == [bytes(BLOCK_BYTES)] * 4
            second.write(reserved.slots, [content_of(block_hash) for block_hash in chain("x", 4)])
            assert mapped[:] == bytes(4 * PAGE_BYTES)
            mapped[:4] = b"late"
            assert second.commit(reserved)
            assert second.load(chain("x", 4)) == [content_of(block_hash) for block_hash in chain("x", 4)]
    finally:
        for descriptor in kept.values():
            os.close(descriptor)


def test_what_is_leased_is_not_taken_away(workplace: Workplace, first: Engine) -> None:
    for name in "abcd":
        workplace.save(first, chain(name, 4))
    granted = [first.get(chain(name, 4)) for name in "abd"]
    second = second_of(workplace)
    assert [first.lookup(chain(name, 4)).dram_blocks for name in "abcd"] == [4, 4, 0, 4]
    with workplace.unchanged(), pytest.raises(errors.CapacityExhausted):
        workplace.put(second, chain("x", 5))
    contents = [content_of(block_hash) for name in "abd" for block_hash in chain(name, 4)]
    assert [content for lease in granted for content in first.read(lease.slots)] == contents


def test_a_namespace_below_its_share_loses_nothing(workplace: Workplace, first: Engine) -> None:
    workplace.save(first, chain("a", 8))
    second = second_of(workplace)
    workplace.save(second, chain("x", 8))
    workplace.save(second, chain("y", 8))
    assert first.lookup(chain("a", 8)).dram_blocks == 8
    assert second.lookup(chain("y", 8)).dram_blocks == 8


def test_a_namespace_within_its_share_loses_nothing_to_one_below() -> None:
    """Where the one above its share has nothing to give, nobody else has to."""
    with Workplace(small_config(dram_segment_bytes=PAGE_BYTES)) as workplace:
        first, second, third = (workplace.engine(spec_of(name)) for name in ("first", "second", "third"))
        workplace.save(first, chain("a", 9))
        first.get(chain("a", 9))
        workplace.save(second, chain("x", 5))
        workplace.save(third, chain("y", 2))
        assert [pages(engine) for engine in (first, second, third)] == [9, 5, 2]
        workplace.save(third, chain("z", 1))
        assert second.lookup(chain("x", 5)).dram_blocks == 5
        assert third.lookup(chain("y", 2)).dram_blocks == 1


def test_two_namespaces_do_not_take_the_same_segment_from_each_other_for_ever() -> None:
    # Three segments for two: somebody has more than half, and that is no reason to take turns.
    with Workplace(small_config(dram_bytes=12 * PAGE_BYTES)) as workplace:
        first, second = workplace.engine(spec_of("first")), workplace.engine(spec_of("second"))
        workplace.save(first, chain("a", 8))
        for turn in range(5):
            workplace.save(second, chain(f"x {turn}", 4))
            workplace.save(first, chain(f"y {turn}", 1))
        assert first.retired_ids == second.retired_ids == []
        assert sorted([pages(first), pages(second)]) == [4, 8]


def test_chains_that_cross_a_lost_segment_lose_what_is_behind_it(workplace: Workplace, first: Engine) -> None:
    hashes = chain("a", 16)
    workplace.save(first, hashes)
    workplace.clock.advance(1.0)
    first.load(hashes[:4])
    second_of(workplace)
    # One segment of the three colder ones went, and with it whatever followed.
    left = first.lookup(hashes).dram_blocks
    assert left in (4, 8, 12)
    assert len(first.namespace.index) == left
    assert first.namespace.pool.free_slots == 12 - left


def test_namespaces_of_other_block_sizes_share_the_same_arena(workplace: Workplace, first: Engine) -> None:
    workplace.save(first, chain("a", 16))
    large = workplace.engine(spec_of("large", tenant="uid:1", block_size_bytes=3 * PAGE_BYTES))
    assert large.namespace.pool.total_slots >= 1
    assert large.namespace.stride_bytes == 3 * PAGE_BYTES
    reserved = workplace.put(large, chain("x", 1))
    assert len(reserved.slots) == 1
    workplace.store.check()


def test_a_block_larger_than_a_segment_has_segments_of_one() -> None:
    with Workplace(small_config(dram_bytes=32 * PAGE_BYTES)) as workplace:
        engine = workplace.engine(spec_of(tenant="uid:1", block_size_bytes=6 * PAGE_BYTES))
        workplace.put(engine, chain("a", 5))
        assert [segment.slots for _, segment in engine.namespace.pool.live_segments()] == [1] * 5
        with pytest.raises(errors.CapacityExhausted):
            workplace.put(engine, chain("b", 1))


# ------------------------------------------------------------- their number


def test_a_namespace_outlives_its_engines(workplace: Workplace, first: Engine) -> None:
    workplace.save(first, chain("a", 4))
    first.hang_up()
    again = workplace.engine(spec_of("first", tenant="uid:1"))
    assert again.load(chain("a", 4)) == [content_of(block_hash) for block_hash in chain("a", 4)]


def test_the_namespace_unused_for_longest_makes_place_for_a_new_one() -> None:
    with Workplace(small_config(namespaces_max=2)) as workplace:
        old, older = workplace.engine(spec_of("old")), workplace.engine(spec_of("older"))
        workplace.save(older, chain("a", 4))
        workplace.clock.advance(5.0)
        workplace.save(old, chain("b", 4))
        old.hang_up()
        older.hang_up()
        workplace.engine(spec_of("new"))
        assert {namespace.spec.label for namespace in workplace.store.namespaces.values()} == {"old", "new"}
        assert workplace.store.arena.used_bytes == 8 * PAGE_BYTES
        assert workplace.engine(spec_of("old")).lookup(chain("b", 4)).dram_blocks == 4


@pytest.mark.parametrize("why", ["attached", "connected", "in quarantine"])
def test_a_namespace_in_use_makes_no_place(why: str) -> None:
    with Workplace(small_config(namespaces_max=2)) as workplace:
        engine = workplace.engine(spec_of("busy"))
        workplace.save(engine, chain("a", 2))
        granted = engine.get(chain("a", 2))
        other = workplace.engine(spec_of("other"))
        if why != "attached":
            workplace.store.detach(engine.peer)
        if why == "in quarantine":
            # It is attached elsewhere now, and may still be copying from what it leased.
            workplace.run(workplace.store.attach(engine.peer, "again", [spec_of("other")]))
        peer = workplace.store.connect(other.peer.identity)
        with workplace.unchanged(), pytest.raises(errors.CapacityExhausted, match=r"2 namespaces are in use"):
            workplace.run(workplace.store.attach(peer, "new", [spec_of("new")]))
        if why == "in quarantine":
            workplace.store.release(engine.peer, [granted.hold_id], "")
            assert workplace.run(workplace.store.attach(peer, "new", [spec_of("new")]))


def test_two_namespaces_of_one_attachment_have_an_id_each(workplace: Workplace) -> None:
    one, two = spec_of("one", tenant="uid:1"), spec_of("two", tenant="uid:1")
    engine = workplace.engine(one, two)
    workplace.save(engine, chain("a", 2))
    engine.namespace_id = 2
    assert engine.lookup(chain("a", 2)).dram_blocks == 0
    workplace.save(engine, chain("b", 2))
    engine.namespace_id = 1
    assert engine.lookup(chain("b", 2)).dram_blocks == 0
    assert engine.lookup(chain("a", 2)).dram_blocks == 2


def test_attaching_tells_which_segments_to_map(workplace: Workplace, first: Engine) -> None:
    workplace.save(first, chain("a", 6))
    peer = workplace.store.connect(first.peer.identity)
    specs = [spec_of("second", tenant="uid:1"), spec_of("first", tenant="uid:1")]
    told = workplace.run(workplace.store.attach(peer, "late", specs))
    pools = [namespace.pool for namespace in peer.namespaces]
    assert told == [segment.segment_id for pool in pools for _, segment in pool.live_segments()]
    assert len(told) == 3


def test_rules_by_label_give_a_namespace_its_own_quota() -> None:
    rules = {"big*": NamespaceRule(dram_quota_bytes=12 * PAGE_BYTES, policy="lru")}
    with Workplace(small_config(dram_quota_bytes=4 * PAGE_BYTES, namespaces=rules)) as workplace:
        big = workplace.engine(spec_of("a", label="big model"))
        small = workplace.engine(spec_of("b", label="small model"))
        workplace.save(big, chain("a", 12))
        workplace.save(small, chain("b", 4))
        assert (big.lookup(chain("a", 12)).dram_blocks, small.lookup(chain("b", 4)).dram_blocks) == (12, 4)
        with pytest.raises(errors.CapacityExhausted):
            workplace.put(small, chain("c", 5))


# --------------------------------------------------------------------- tenants


def test_tenants_never_see_each_other(workplace: Workplace) -> None:
    mine = workplace.engine(spec_of("model", tenant="uid:1"), uid=1)
    theirs = workplace.engine(spec_of("model", tenant="uid:2"), uid=2)
    workplace.save(mine, chain("a", 4))
    assert theirs.lookup(chain("a", 4)).dram_blocks == 0
    assert theirs.get(chain("a", 4)).hold_id == 0
    assert theirs.namespace is not mine.namespace
    own = {segment.segment_id for _, segment in mine.namespace.pool.live_segments()}
    assert not own & {segment.segment_id for _, segment in theirs.namespace.pool.live_segments()}
    # The same hashes are stored apart, and forgotten apart.
    reserved = workplace.put(theirs, chain("a", 4))
    theirs.write(reserved.slots, [content_of(block_hash, 2) for block_hash in chain("a", 4)])
    theirs.commit(reserved)
    assert workplace.store.forget_namespace(theirs.peer, 1).dropped == 4
    assert mine.load(chain("a", 4)) == [content_of(block_hash) for block_hash in chain("a", 4)]
    lease = mine.get(chain("a", 4))
    with workplace.unchanged(), pytest.raises(errors.LeaseUnknown):
        workplace.store.release(theirs.peer, [lease.hold_id], "")
    assert mine.notices == theirs.notices == []


def test_identities_of_one_tenant_share_what_they_store() -> None:
    config = small_config(tenants={"uid:1": "team", "uid:2": "team"})
    with Workplace(config) as workplace:
        one = workplace.engine(spec_of(tenant="team"), uid=1)
        two = workplace.engine(spec_of(tenant="team"), uid=2)
        assert one.peer.tenant == two.peer.tenant == "team"
        workplace.save(one, chain("a", 3))
        assert two.lookup(chain("a", 3)).dram_blocks == 3
