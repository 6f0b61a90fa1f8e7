"""A namespace's slots: each is free or in use, never both, and changes its generation before it changes hands."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW, Slots
from kvservice.dram import PAGE_BYTES, Arena, Segment, SlotPool
from kvservice.errors import CapacityExhausted

pytestmark = pytest.mark.unit


def make(arena: Arena, slots: int = 4) -> Segment:
    segment_id = arena.promise(slots * PAGE_BYTES)
    return arena.make_segment(segment_id, stride_bytes=PAGE_BYTES, slots=slots)


@pytest.fixture
def arena() -> Arena:
    return Arena(capacity_bytes=64 * PAGE_BYTES, huge_pages=False, numa_node=-1)


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    made = SlotPool(PAGE_BYTES, slots_per_segment=4)
    yield made
    for _, segment in made.live_segments():
        segment.close()


def test_neighbouring_slots_go_out_together(arena: Arena, pool: SlotPool) -> None:
    pool.add(make(arena))
    pool.add(make(arena))
    assert pool.allocate(3).tolist() == [0, 1, 2]
    assert pool.allocate(3).tolist() == [3, 4, 5]
    assert pool.free_slots == 2
    assert pool.total_slots == 8
    assert pool.size_bytes == 8 * PAGE_BYTES
    pool.check()


def test_more_slots_than_free_are_refused_and_none_is_taken(arena: Arena, pool: SlotPool) -> None:
    pool.add(make(arena))
    pool.allocate(2)
    with pytest.raises(CapacityExhausted, match="3 slots wanted, 2 free"):
        pool.allocate(3)
    assert pool.free_slots == 2
    assert len(pool.allocate(0)) == 0
    assert len(pool.allocate(2)) == 2
    pool.check()


def test_a_slot_gets_a_new_generation_each_time_it_is_promised(arena: Arena, pool: SlotPool) -> None:
    segment = make(arena)
    pool.add(segment)
    slots = pool.allocate(4)
    assert segment.generations.tolist() == [1, 1, 1, 1]
    pool.unhold(slots[:2])
    assert segment.generations.tolist() == [1, 1, 1, 1]
    pool.allocate(1)
    assert segment.generations.tolist() == [2, 1, 1, 1]


def test_a_slot_is_free_only_without_owner_and_holders(arena: Arena, pool: SlotPool) -> None:
    pool.add(make(arena, slots=1))
    slots = pool.allocate(1)
    pool.row_of[slots] = 7
    pool.hold(slots)
    pool.unhold(slots)
    pool.unhold(slots)
    assert pool.free_slots == 0, "it has an owner"
    pool.hold(slots)
    pool.disown(int(slots[0]))
    assert pool.free_slots == 0, "it has a holder"
    pool.check()
    pool.unhold(slots)
    assert pool.free_slots == 1
    pool.check()
    pool.row_of[pool.allocate(1)] = 3
    pool.unhold(slots)
    pool.disown(int(slots[0]))
    assert pool.free_slots == 1
    pool.check()


def test_slots_are_located_over_several_segments_in_order(arena: Arena, pool: SlotPool) -> None:
    first, second, third = make(arena), make(arena, slots=2), make(arena)
    for segment in (first, second, third):
        pool.add(segment)
    pool.allocate(10)
    slots = np.array([2, 3, 9, 8, 4, 5, 0], dtype=np.int32)
    first.generations[3] = 40
    third.generations[1] = 90
    found = pool.locate(slots)
    assert [segment for segment, _, _ in found] == [first, third, second, first]
    assert [places.tolist() for _, places, _ in found] == [[2, 3], [1, 0], [0, 1], [0]]
    assert [generations.tolist() for _, _, generations in found] == [[1, 40], [90, 1], [1, 1], [1]]


def test_a_slots_memory_is_its_own_page(arena: Arena, pool: SlotPool) -> None:
    first, second = make(arena), make(arena)
    pool.add(first)
    pool.add(second)
    pool.memory(1, 10)[:] = b"0123456789"
    pool.memory(6, 3)[:] = b"abc"
    assert first.memory[PAGE_BYTES : PAGE_BYTES + 11] == b"0123456789\0"
    assert second.memory[2 * PAGE_BYTES : 2 * PAGE_BYTES + 4] == b"abc\0"
    assert bytes(pool.memory(6, 3)) == b"abc"


def test_a_segment_leaves_only_when_its_slots_are_free(arena: Arena, pool: SlotPool) -> None:
    first, second = make(arena), make(arena)
    pool.add(first)
    pool.add(second)
    slots = pool.allocate(5)
    with pytest.raises(AssertionError, match="in use"):
        pool.drop(0)
    pool.unhold(slots[:4])
    assert pool.drop(0) is first
    first.close()
    assert pool.live_segments() == [(1, second)]
    assert pool.free_slots == 3
    assert pool.allocate(3).tolist() == [5, 6, 7]
    with pytest.raises(AssertionError, match="no segment at position 0"):
        pool.drop(0)
    pool.check()


def test_a_new_segment_takes_the_place_of_one_that_left(arena: Arena, pool: SlotPool) -> None:
    for _ in range(3):
        pool.add(make(arena))
    pool.drop(1).close()
    short = make(arena, slots=2)
    pool.add(short)
    assert pool.live_segments()[1] == (1, short)
    assert pool.total_slots == 10
    pool.check()
    slots = pool.allocate(10)
    assert sorted(slots.tolist()) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert short.generations.tolist() == [1, 1]


def test_check_notices_a_slot_that_was_lost_or_doubled(arena: Arena, pool: SlotPool) -> None:
    pool.add(make(arena))
    slots = pool.allocate(2)
    pool.check()
    pool.holders[slots[0]] = 0
    with pytest.raises(AssertionError, match="leaked"):
        pool.check()
    pool.holders[slots[0]] = 1
    pool.holders[3] = 1
    with pytest.raises(AssertionError, match="free and in use"):
        pool.check()


class SlotModel:
    """The books as plain sets, beside a pool under test."""

    def __init__(self) -> None:
        self.arena = Arena(capacity_bytes=1 << 20, huge_pages=False, numa_node=-1)
        self.pool = SlotPool(PAGE_BYTES, slots_per_segment=3)
        self.holders: dict[int, int] = {}
        self.owners: dict[int, int] = {}
        self.generations: dict[tuple[int, int], int] = {}

    def in_use(self) -> list[int]:
        return sorted({*self.holders, *self.owners})

    def apply(self, kind: str, choice: int, amount: int) -> None:
        pool = self.pool
        if kind == "add":
            if len(pool.live_segments()) < 4:
                pool.add(make(self.arena, slots=1 + choice % 3))
        elif kind == "drop":
            idle = [position for position, segment in pool.live_segments() if self._is_idle(position, segment)]
            if idle:
                pool.drop(idle[choice % len(idle)]).close()
        elif kind == "allocate":
            self._allocate(amount)
        elif used := self.in_use():
            slot = used[choice % len(used)]
            self._change(kind, slot)

    def _is_idle(self, position: int, segment: Segment) -> bool:
        return not any(slot // 3 == position for slot in self.in_use())

    def _allocate(self, amount: int) -> None:
        if amount > self.pool.free_slots:
            with pytest.raises(CapacityExhausted):
                self.pool.allocate(amount)
            return
        slots = self.pool.allocate(amount)
        assert len(set(slots.tolist())) == amount
        assert not set(slots.tolist()) & set(self.in_use()), "a slot in use was promised"
        for slot, generation in zip(slots.tolist(), self._generations(slots), strict=True):
            place = (self._segment_of(slot).segment_id, slot % 3)
            assert generation == self.generations.get(place, 0) + 1
            self.generations[place] = generation
            self.holders[slot] = 1

    def _segment_of(self, slot: int) -> Segment:
        return dict(self.pool.live_segments())[slot // 3]

    def _generations(self, slots: Slots) -> list[int]:
        return [int(self._segment_of(slot).generations[slot % 3]) for slot in slots.tolist()]

    def _change(self, kind: str, slot: int) -> None:
        one = np.array([slot], dtype=np.int32)
        if kind == "hold":
            self.pool.hold(one)
            self.holders[slot] = self.holders.get(slot, 0) + 1
        elif kind == "unhold" and slot in self.holders:
            self.pool.unhold(one)
            self.holders[slot] -= 1
            if not self.holders[slot]:
                del self.holders[slot]
        elif kind == "own" and slot not in self.owners:
            self.pool.row_of[slot] = self.owners[slot] = slot + 100
        elif kind == "disown" and slot in self.owners:
            self.pool.disown(slot)
            del self.owners[slot]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "drop", "allocate", "allocate", "hold", "unhold", "unhold", "own", "disown"]),
            st.integers(0, 1 << 16),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_no_slot_is_lost_or_doubled(operations: list[tuple[str, int, int]]) -> None:
    model = SlotModel()
    try:
        for kind, choice, amount in operations:
            model.apply(kind, choice, amount)
            model.pool.check()
            assert model.pool.free_slots == model.pool.total_slots - len(model.in_use())
            for slot in model.in_use():
                assert model.pool.holders[slot] == model.holders.get(slot, 0)
                assert model.pool.row_of[slot] == model.owners.get(slot, NO_ROW)
    finally:
        for _, segment in model.pool.live_segments():
            segment.close()
