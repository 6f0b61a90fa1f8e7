"""dram: slots in the arena of shared memory that engines map.

The arena is a budget of bytes. Its memory is *segments*: one memfd each, of one namespace for
life, sealed against resizing before anyone else sees it (a client that shrank one would kill the
daemon with SIGBUS). A namespace's segments form its *pool* of equal slots.

Each segment has a table of generations, one per slot, which clients can map but not write: a
slot's generation changes before the slot is promised to a new writer, so a reader that compares
it after copying knows whether the bytes were its block's.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvservice.blocks import NO_ROW, Slots, Tier
from kvservice.errors import CapacityExhausted
from kvservice.tiers import TierUsage

PAGE_BYTES = 4096
"""Slots start on page boundaries, so that the NVMe tier can read and write them with O_DIRECT."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap module has no name for it
_F_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1; nor has fcntl
_MPOL_PREFERRED = 1
_MBIND_SYSCALL = {"x86_64": 237, "aarch64": 235}
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def slot_stride_bytes(block_size_bytes: int) -> int:
    """The distance between slots: the block's size rounded up to whole pages."""
    return -(-block_size_bytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(slots=True, eq=False)
class Segment:
    """One memfd of equal slots, of one namespace for life."""

    segment_id: int
    stride_bytes: int
    slots: int
    memory_fd: int
    memory: mmap.mmap
    generations_fd: int
    generations: np.ndarray
    """One uint64 per slot, in memory that clients map read-only."""
    on_close: list[Callable[[], None]] = field(default_factory=list)
    """Called before the memory goes, by whoever made more of it (pinned it, say)."""
    is_closed: bool = False

    @property
    def size_bytes(self) -> int:
        return self.slots * self.stride_bytes

    @property
    def address(self) -> int:
        """Where this process maps it."""
        return address_of(self.memory)

    def close(self) -> None:
        """Give the memory back at once, also where a client still maps it."""
        self.is_closed = True
        for undo in self.on_close:
            undo()
        # A reader in the middle of a copy would find zeros from now on: this tells it that they are not its block.
        self.generations += np.uint64(1)
        _libc.fallocate(self.memory_fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, 0, self.size_bytes)
        self.memory.close()
        os.close(self.memory_fd)
        os.close(self.generations_fd)


class Arena:
    """The daemon's DRAM tier: a bound on bytes, and the segments made from it."""

    tier = Tier.DRAM

    def __init__(self, *, capacity_bytes: int, huge_pages: bool, numa_node: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._huge_pages = huge_pages
        self._numa_node = numa_node
        self._next_segment_id = 1

    @property
    def unused_bytes(self) -> int:
        """What further segments may still take."""
        return self.capacity_bytes - self.used_bytes

    def usage(self) -> TierUsage:
        """Occupancy in whole segments."""
        return TierUsage(self.capacity_bytes, self.used_bytes, "online")

    def close(self) -> None:
        """Nothing of its own to give back: pools close their segments."""

    def promise(self, size_bytes: int) -> int:
        """Take bytes off the budget ahead of `make_segment`; returns the new segment's id.

        Raises:
            CapacityExhausted: the budget does not have them.
        """
        if size_bytes > self.unused_bytes:
            raise CapacityExhausted(f"{size_bytes} bytes wanted, {self.unused_bytes} of the arena are unused")
        self.used_bytes += size_bytes
        segment_id = self._next_segment_id
        self._next_segment_id += 1
        return segment_id

    def give_back(self, size_bytes: int) -> None:
        """Return bytes to the budget."""
        self.used_bytes -= size_bytes
        assert self.used_bytes >= 0, "more bytes given back than promised"

    def make_segment(self, segment_id: int, *, stride_bytes: int, slots: int) -> Segment:
        """Make and pre-fault a promised segment. Blocks (about 0.2 s a GiB): call from a thread.

        Raises:
            OSError: the system does not give the memory.
        """
        size_bytes = slots * stride_bytes
        memory_fd = _memfd(f"kvservice-segment-{segment_id}", size_bytes)
        try:
            memory = mmap.mmap(memory_fd, size_bytes)
            self._advise(memory)
            # Allocates every page now, or fails with ENOSPC, where a later touch would be SIGBUS.
            os.posix_fallocate(memory_fd, 0, size_bytes)
            _populate(memory)
            _seal(memory_fd, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            generations_fd = _memfd(f"kvservice-generations-{segment_id}", slots * 8)
        except BaseException:
            os.close(memory_fd)
            raise
        generations = np.frombuffer(mmap.mmap(generations_fd, slots * 8), dtype=np.uint64)
        _seal(generations_fd, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)
        return Segment(segment_id, stride_bytes, slots, memory_fd, memory, generations_fd, generations)

    def _advise(self, memory: mmap.mmap) -> None:
        """Advice is best effort: a system without huge pages or NUMA policy works without."""
        size_bytes = len(memory)
        address = address_of(memory)
        if self._huge_pages:
            _libc.madvise(address, size_bytes, mmap.MADV_HUGEPAGE)
        if self._numa_node >= 0 and platform.machine() in _MBIND_SYSCALL:
            nodes = ctypes.c_ulong(1 << self._numa_node)
            _libc.syscall(
                ctypes.c_long(_MBIND_SYSCALL[platform.machine()]),
                ctypes.c_void_p(address),
                ctypes.c_size_t(size_bytes),
                ctypes.c_int(_MPOL_PREFERRED),
                ctypes.byref(nodes),
                ctypes.c_ulong(64),
                ctypes.c_uint(0),
            )


def address_of(memory: mmap.mmap) -> int:
    """Where a mapping starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _populate(memory: mmap.mmap) -> None:
    """Map every page into this process. Without it (Linux before 5.14) first touches are slower."""
    _libc.madvise(address_of(memory), len(memory), _MADV_POPULATE_WRITE)


def _memfd(name: str, size_bytes: int) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sealed_memfd(name: str, size_bytes: int) -> int:
    """Zeroed memory that nobody can resize. Raises OSError."""
    descriptor = _memfd(name, size_bytes)
    _seal(descriptor, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


def _seal(descriptor: int, seals: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)


@dataclass(slots=True)
class SlotPool:
    """The slots of one namespace, over all its segments.

    A slot number is its segment's position in the pool times `slots_per_segment`, plus its place
    in the segment. A slot is *free* (on the free list), *owned* by an index row, *held* by leases
    or reservations, or owned and held. Without owner and holders it returns to the free list.
    """

    stride_bytes: int
    slots_per_segment: int
    segments: list[Segment | None] = field(default_factory=list)
    row_of: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    holders: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    _free: list[int] = field(default_factory=list)

    @property
    def free_slots(self) -> int:
        """Slots that can be promised at once."""
        return len(self._free)

    @property
    def total_slots(self) -> int:
        """Slots of all segments."""
        return sum(segment.slots for segment in self.segments if segment)

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size_bytes for segment in self.segments if segment)

    def live_segments(self) -> list[tuple[int, Segment]]:
        """(position, segment) of every segment."""
        return [(position, segment) for position, segment in enumerate(self.segments) if segment]

    def add(self, segment: Segment) -> None:
        """Take a segment's slots in."""
        if None in self.segments:
            position = self.segments.index(None)
            self.segments[position] = segment
        else:
            position = len(self.segments)
            self.segments.append(segment)
            blank = np.zeros(self.slots_per_segment, dtype=np.int32)
            self.row_of = np.concatenate((self.row_of, blank + NO_ROW))
            self.holders = np.concatenate((self.holders, blank))
        first = position * self.slots_per_segment
        # Descending, because slots are taken from the end: neighbours in memory go out together.
        self._free[:0] = range(first + segment.slots - 1, first - 1, -1)

    def drop(self, position: int) -> Segment:
        """Take a segment out whose slots are all free. The caller closes it."""
        segment = self.segments[position]
        assert segment is not None, f"no segment at position {position}"
        first = position * self.slots_per_segment
        end = first + self.slots_per_segment
        kept = [slot for slot in self._free if not first <= slot < end]
        assert len(self._free) - len(kept) == segment.slots, "a segment leaves while slots of it are in use"
        self._free = kept
        self.segments[position] = None
        return segment

    def allocate(self, count: int) -> Slots:
        """Take `count` free slots, held once by the caller, with new generations.

        Raises:
            CapacityExhausted: fewer are free.
        """
        if count > len(self._free):
            raise CapacityExhausted(f"{count} slots wanted, {len(self._free)} free")
        if count == 0:
            return np.zeros(0, dtype=np.int32)
        # Upwards, so that what lies next to each other is copied as one.
        slots = np.sort(np.array(self._free[-count:], dtype=np.int32))
        del self._free[-count:]
        self.holders[slots] = 1
        for segment, places, generations in self.locate(slots):
            segment.generations[places] = generations + np.uint64(1)
        return slots

    def hold(self, slots: Slots) -> None:
        """One more holder for each of these distinct slots."""
        self.holders[slots.astype(np.intp)] += 1  # through narrower indices numpy takes four times as long

    def unhold(self, slots: Slots) -> None:
        """One holder fewer; slots without owner and holders become free."""
        indices = slots.astype(np.intp)
        self.holders[indices] -= 1
        done = slots[(self.holders[indices] == 0) & (self.row_of[indices] == NO_ROW)]
        self._free.extend(done[::-1].tolist())

    def disown(self, slot: int) -> None:
        """The row that owned the slot is gone; free unless held."""
        self.row_of[slot] = NO_ROW
        if self.holders[slot] == 0:
            self._free.append(slot)

    def locate(self, slots: Slots) -> list[tuple[Segment, np.ndarray, np.ndarray]]:
        """Runs of slots in one segment: (segment, places in it, their generations), in order."""
        positions = slots // self.slots_per_segment
        if len(slots) and (positions == positions[0]).all():  # nearly always, and much faster
            return [self._run(slots)]
        cuts = np.flatnonzero(np.diff(positions)) + 1
        return [self._run(run) for run in np.split(slots, cuts) if len(run)]

    def _run(self, slots: Slots) -> tuple[Segment, np.ndarray, np.ndarray]:
        segment = self.segments[int(slots[0]) // self.slots_per_segment]
        assert segment is not None, f"slot {slots[0]} has no segment"
        places = slots % self.slots_per_segment
        return segment, places, segment.generations[places]

    def memory(self, slot: int, size_bytes: int) -> memoryview:
        """The bytes of one slot."""
        segment = self.segments[slot // self.slots_per_segment]
        assert segment is not None, f"slot {slot} has no segment"
        start = slot % self.slots_per_segment * self.stride_bytes
        return memoryview(segment.memory)[start : start + size_bytes]

    def check(self) -> None:
        """Assert that every slot is exactly one of free and in use. For tests."""
        exists = np.zeros(len(self.row_of), dtype=bool)
        for position, segment in self.live_segments():
            first = position * self.slots_per_segment
            exists[first : first + segment.slots] = True
        free = np.zeros(len(self.row_of), dtype=bool)
        free[self._free] = True
        assert len(set(self._free)) == len(self._free), "a slot is on the free list twice"
        in_use = (self.row_of != NO_ROW) | (self.holders != 0)
        assert (self.holders >= 0).all(), "a slot has fewer than no holders"
        assert not (free & in_use).any(), "a slot is free and in use"
        assert ((free | in_use) == exists).all(), "a slot is neither free nor in use: leaked"
