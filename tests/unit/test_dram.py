"""Real memory: sealed before anyone sees it, zeroed when new, punched out when closed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from kvservice.dram import PAGE_BYTES, Arena, Segment, slot_stride_bytes
from kvservice.errors import CapacityExhausted
from tests.stores import open_descriptors

pytestmark = pytest.mark.unit


def make(arena: Arena, slots: int = 4, stride_bytes: int = PAGE_BYTES) -> Segment:
    segment_id = arena.promise(slots * stride_bytes)
    return arena.make_segment(segment_id, stride_bytes=stride_bytes, slots=slots)


@pytest.fixture
def arena() -> Arena:
    return Arena(capacity_bytes=64 * PAGE_BYTES, huge_pages=False, numa_node=-1)


@pytest.fixture
def segment(arena: Arena) -> Iterator[Segment]:
    made = make(arena)
    yield made
    if not made.memory.closed:
        made.close()


class Receiver:
    """Descriptors as another process gets them: over a socket."""

    def __init__(self, segment: Segment) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(ours, [b"x"], [segment.memory_fd, segment.generations_fd])
            _, (self.memory_fd, self.generations_fd), _, _ = socket.recv_fds(theirs, 1, 2)

    def close(self) -> None:
        os.close(self.memory_fd)
        os.close(self.generations_fd)


@pytest.fixture
def receiver(segment: Segment) -> Iterator[Receiver]:
    received = Receiver(segment)
    yield received
    received.close()


# ------------------------------------------------------------------------ seals


@pytest.mark.parametrize("table", ["memory_fd", "generations_fd"])
@pytest.mark.parametrize("size_bytes", [0, 1, PAGE_BYTES, 100 * PAGE_BYTES])
def test_a_receiver_cannot_resize_what_it_got(receiver: Receiver, table: str, size_bytes: int) -> None:
    descriptor = getattr(receiver, table)
    before_bytes = os.fstat(descriptor).st_size
    with pytest.raises(PermissionError) as refusal:
        os.ftruncate(descriptor, size_bytes)
    assert refusal.value.errno == errno.EPERM
    assert os.fstat(descriptor).st_size == before_bytes


@pytest.mark.parametrize("table", ["memory_fd", "generations_fd"])
def test_a_receiver_cannot_change_the_seals(receiver: Receiver, table: str) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(getattr(receiver, table), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_receiver_cannot_map_the_generations_writable(receiver: Receiver, segment: Segment) -> None:
    size_bytes = segment.slots * 8
    with pytest.raises(PermissionError):
        mmap.mmap(receiver.generations_fd, size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with mmap.mmap(receiver.generations_fd, size_bytes, prot=mmap.PROT_READ) as mapped:
        segment.generations[2] = 77
        assert np.frombuffer(mapped[:], dtype=np.uint64).tolist() == [0, 0, 77, 0]


def test_a_receiver_cannot_write_or_punch_the_generations(receiver: Receiver, segment: Segment) -> None:
    segment.generations[0] = 5
    with pytest.raises(PermissionError):
        os.pwrite(receiver.generations_fd, b"\xff" * 8, 0)
    with pytest.raises(PermissionError):
        os.posix_fallocate(receiver.generations_fd, segment.slots * 8, 8)
    # The descriptor opened again by its name in /proc is the same sealed file.
    again = os.open(f"/proc/self/fd/{receiver.generations_fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(again, b"\xff" * 8, 0)
    finally:
        os.close(again)
    assert segment.generations[0] == 5


def test_a_receiver_shares_the_bytes_both_ways(receiver: Receiver, segment: Segment) -> None:
    with mmap.mmap(receiver.memory_fd, segment.size_bytes) as mapped:
        mapped[:4] = b"from"
        assert segment.memory[:4] == b"from"
        segment.memory[PAGE_BYTES : PAGE_BYTES + 2] = b"to"
        assert mapped[PAGE_BYTES : PAGE_BYTES + 2] == b"to"


def test_descriptors_do_not_pass_to_programs_that_are_started(segment: Segment) -> None:
    assert not os.get_inheritable(segment.memory_fd)
    assert not os.get_inheritable(segment.generations_fd)


# ----------------------------------------------------------- making and closing


def test_a_fresh_segment_is_zeroed_and_all_there(segment: Segment) -> None:
    assert segment.size_bytes == 4 * PAGE_BYTES
    # Allocated before anybody touches it, not only promised: a touch can no longer fail with SIGBUS.
    assert os.fstat(segment.memory_fd).st_blocks * 512 >= segment.size_bytes
    assert segment.memory[:] == bytes(segment.size_bytes)
    assert segment.generations.tolist() == [0, 0, 0, 0]


def test_memory_after_another_segment_is_zeroed_too(arena: Arena) -> None:
    first = make(arena, slots=8)
    first.memory[:] = b"\xaa" * first.size_bytes
    first.close()
    arena.give_back(first.size_bytes)
    second = make(arena, slots=8)
    try:
        assert second.segment_id != first.segment_id
        assert second.memory[:] == bytes(second.size_bytes)
    finally:
        second.close()


def test_closing_punches_the_memory_out_under_whoever_still_maps_it(receiver: Receiver, segment: Segment) -> None:
    with mmap.mmap(receiver.memory_fd, segment.size_bytes) as mapped:
        mapped[:] = b"\xbb" * segment.size_bytes
        assert os.fstat(receiver.memory_fd).st_blocks > 0
        segment.close()
        assert os.fstat(receiver.memory_fd).st_blocks == 0
        assert mapped[:] == bytes(len(mapped))
    assert segment.memory.closed
    # Whoever was copying from it sees by the generations that these zeros are not its block.
    with mmap.mmap(receiver.generations_fd, segment.slots * 8, prot=mmap.PROT_READ) as table:
        assert np.frombuffer(table[:], dtype=np.uint64).tolist() == [1, 1, 1, 1]


def test_closing_gives_the_descriptors_back(arena: Arena) -> None:
    before = open_descriptors()
    for _ in range(5):
        make(arena).close()
    assert open_descriptors() == before


def test_what_the_system_refuses_leaves_nothing_behind(arena: Arena) -> None:
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_BYTES, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            make(arena)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_descriptors() == before


def test_huge_pages_and_numa_are_advice_that_may_be_ignored() -> None:
    arena = Arena(capacity_bytes=1 << 22, huge_pages=True, numa_node=0)
    segment = make(arena, slots=1, stride_bytes=1 << 22)
    segment.memory[:3] = b"abc"
    assert segment.memory[:4] == b"abc\0"
    segment.close()


# ----------------------------------------------------------------------- arena


def test_the_budget_is_never_exceeded(arena: Arena) -> None:
    first = arena.promise(60 * PAGE_BYTES)
    assert arena.unused_bytes == 4 * PAGE_BYTES
    with pytest.raises(CapacityExhausted, match="20480 bytes wanted, 16384 of the arena are unused"):
        arena.promise(5 * PAGE_BYTES)
    assert arena.used_bytes == 60 * PAGE_BYTES
    assert arena.promise(4 * PAGE_BYTES) == first + 1
    assert arena.unused_bytes == 0
    arena.give_back(60 * PAGE_BYTES)
    assert arena.usage().used_bytes == 4 * PAGE_BYTES
    assert arena.usage().capacity_bytes == 64 * PAGE_BYTES
    with pytest.raises(AssertionError):
        arena.give_back(5 * PAGE_BYTES)


@pytest.mark.parametrize(
    ("block_bytes", "stride_bytes"), [(1, 4096), (4095, 4096), (4096, 4096), (4097, 8192), (1 << 22, 1 << 22)]
)
def test_slots_start_on_pages(block_bytes: int, stride_bytes: int) -> None:
    assert slot_stride_bytes(block_bytes) == stride_bytes
