"""Copies move every byte once, whatever the shares; callers' buffers are taken as they are or refused by name."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice_client.errors import InvalidRequest
from kvservice_client.memory import Buffers, Copy, Memory, Segment, ThreadedCopier, _shares, merge
from tests.stores import open_descriptors

pytestmark = pytest.mark.unit

MIB = 1 << 20

# ------------------------------------------------------------------ the copies

PIECES = st.lists(
    st.tuples(st.integers(1, 3 * MIB), st.sampled_from(["both", "destination", "source", "neither"])), max_size=12
)


def pieces_of(drawn: list[tuple[int, str]]) -> list[Copy]:
    """Pieces that follow one another on both sides, on one, or on none."""
    destination, source, found = 1 << 40, 1 << 41, []
    for size_bytes, adjacent in drawn:
        destination += 0 if adjacent in ("both", "destination") else 4096
        source += 0 if adjacent in ("both", "source") else 4096
        found.append(Copy(destination, source, size_bytes))
        destination, source = destination + size_bytes, source + size_bytes
    return found


def joined(pieces: list[Copy]) -> list[tuple[int, int, int]]:
    """What the pieces move, as maximal runs: lists with equal runs move the same bytes in the same order."""
    runs: list[tuple[int, int, int]] = []
    for piece in pieces:
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (piece.destination, piece.source):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + piece.size_bytes)
        else:
            runs.append((piece.destination, piece.source, piece.size_bytes))
    return runs


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PIECES)
def test_merging_moves_the_same_bytes_in_as_few_pieces_as_possible(drawn: list[tuple[int, str]]) -> None:
    pieces = pieces_of(drawn)
    merged = merge(pieces)
    assert [(piece.destination, piece.source, piece.size_bytes) for piece in merged] == joined(pieces)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PIECES, st.integers(1, 8))
def test_shares_move_every_byte_once_and_are_fair(drawn: list[tuple[int, str]], threads: int) -> None:
    pieces = pieces_of(drawn)
    shares = _shares(pieces, threads)
    assert 1 <= len(shares) <= threads
    assert joined([piece for share in shares for piece in share]) == joined(pieces)
    sizes = [sum(piece.size_bytes for piece in share) for share in shares]
    fair = max(-(-sum(sizes) // threads), MIB)
    assert all(size == fair for size in sizes[:-1])
    assert sizes[-1] <= fair


def test_pieces_that_touch_on_one_side_only_stay_apart() -> None:
    assert merge([Copy(0, 100, 10), Copy(10, 200, 10)]) == [Copy(0, 100, 10), Copy(10, 200, 10)]
    assert merge([Copy(0, 100, 10), Copy(50, 110, 10)]) == [Copy(0, 100, 10), Copy(50, 110, 10)]
    assert merge([Copy(10, 110, 10), Copy(0, 100, 10)]) == [Copy(10, 110, 10), Copy(0, 100, 10)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_copy_moves_real_bytes_and_touches_nothing_else(threads: int) -> None:
    source = np.random.default_rng(1).integers(0, 256, 8 * MIB, dtype=np.uint8)
    destination = np.zeros(8 * MIB, dtype=np.uint8)
    sizes = [1, 4095, 4096, 2 * MIB + 3, MIB, 17, 3 * MIB]
    pieces, expected = [], destination.copy()
    at = 0
    for number, size_bytes in enumerate(sizes):
        to, start = at + 64 * number, 8 * MIB - at - size_bytes  # backwards in the source
        pieces.append(Copy(destination.ctypes.data + to, source.ctypes.data + start, size_bytes))
        expected[to : to + size_bytes] = source[start : start + size_bytes]
        at += size_bytes
    copier = ThreadedCopier(threads=threads)
    try:
        copier.copy(pieces)
        assert np.array_equal(destination, expected)
        copier.copy([])
        assert np.array_equal(destination, expected)
    finally:
        copier.close()


# ---------------------------------------------------------- callers' buffers


def opened(buffers: Any, *, blocks: int = 4, size_bytes: int = 64, writable: bool = True) -> list[int]:
    with Buffers(buffers, blocks=blocks, block_size_bytes=size_bytes, writable=writable) as found:
        return found.addresses


def refusal(buffers: Any, *, blocks: int = 4, size_bytes: int = 64, writable: bool = True) -> str:
    with pytest.raises(InvalidRequest) as error:
        opened(buffers, blocks=blocks, size_bytes=size_bytes, writable=writable)
    return str(error.value)


@pytest.fixture
def anonymous() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 256) as mapped:
        yield mapped


ONE_BUFFER: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(256),
    "memoryview": lambda: memoryview(bytearray(256)),
    "numpy bytes": lambda: np.zeros(256, dtype=np.uint8),
    "numpy floats in three dimensions": lambda: np.zeros((4, 2, 8), dtype=np.float32),
    "array": lambda: array.array("d", bytes(256)),
    "torch bytes": lambda: torch.zeros(256, dtype=torch.uint8),
    "torch bfloat16": lambda: torch.zeros((4, 2, 16), dtype=torch.bfloat16),
    "ctypes": ctypes.c_ubyte * 256,
}


def write_through(addresses: list[int], size_bytes: int) -> None:
    for number, address in enumerate(addresses):
        ctypes.memset(address, number + 1, size_bytes)


def bytes_of(buffer: Any) -> bytes:
    if isinstance(buffer, torch.Tensor):
        return buffer.view(torch.uint8).flatten().numpy().tobytes()
    return bytes(memoryview(buffer).cast("B"))


@pytest.mark.parametrize("kind", ONE_BUFFER)
def test_one_buffer_is_cut_into_blocks_in_place(kind: str) -> None:
    buffer = ONE_BUFFER[kind]()
    with Buffers(buffer, blocks=4, block_size_bytes=64, writable=True) as found:
        assert [address - found.addresses[0] for address in found.addresses] == [0, 64, 128, 192]
        write_through(found.addresses, 64)
    assert bytes_of(buffer) == b"\1" * 64 + b"\2" * 64 + b"\3" * 64 + b"\4" * 64


def test_a_mapping_is_a_buffer(anonymous: mmap.mmap) -> None:
    with Buffers(anonymous, blocks=4, block_size_bytes=64, writable=True) as found:
        write_through(found.addresses, 64)
    assert anonymous[63:65] == b"\1\2"


def test_one_buffer_for_each_block_of_any_kinds() -> None:
    buffers = [
        bytearray(64),
        np.zeros(16, dtype=np.float32),
        torch.zeros(32, dtype=torch.float16),
        memoryview(bytearray(64)),
    ]
    with Buffers(buffers, blocks=4, block_size_bytes=64, writable=True) as found:
        write_through(found.addresses, 64)
    assert [bytes_of(buffer) for buffer in buffers] == [bytes([number]) * 64 for number in (1, 2, 3, 4)]
    assert len(opened(tuple(buffers))) == 4


def test_plain_memory_is_taken_by_its_address() -> None:
    assert opened(Memory(1 << 30, 256)) == [(1 << 30) + offset for offset in (0, 64, 128, 192)]
    assert opened([Memory(address, 64) for address in (10, 20, 30, 40)]) == [10, 20, 30, 40]


def frozen_array() -> np.ndarray:
    frozen = np.zeros(256, dtype=np.uint8)
    frozen.flags.writeable = False
    return frozen


READ_ONLY: dict[str, Callable[[], Any]] = {
    "bytes": lambda: bytes(256),
    "read-only memoryview": lambda: memoryview(bytes(256)),
    "memoryview made read-only": lambda: memoryview(bytearray(256)).toreadonly(),
    "numpy made read-only": frozen_array,
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_read_only_memory_is_a_source_and_no_destination(kind: str) -> None:
    buffer = READ_ONLY[kind]()
    assert len(opened(buffer, writable=False)) == 4
    assert "not a usable buffer" in refusal(buffer, writable=True)
    assert len(opened([buffer[:64]] * 4, writable=False)) == 4
    assert "not a usable buffer" in refusal([buffer[:64]] * 4, writable=True)


@pytest.mark.parametrize("kind", ONE_BUFFER)
@pytest.mark.parametrize(("blocks", "size_bytes"), [(3, 64), (5, 64), (4, 63), (4, 65), (1, 64)])
def test_a_buffer_of_another_size_is_refused_with_both_sizes(kind: str, blocks: int, size_bytes: int) -> None:
    message = refusal(ONE_BUFFER[kind](), blocks=blocks, size_bytes=size_bytes)
    assert message == f"a buffer of 256 bytes where {blocks * size_bytes} are needed"


def test_buffers_must_be_as_many_as_blocks_and_each_of_its_size() -> None:
    assert refusal([bytearray(64)] * 3) == "3 buffers for 4 blocks"
    assert refusal([bytearray(64)] * 5) == "5 buffers for 4 blocks"
    assert refusal([]) == "0 buffers for 4 blocks"
    assert refusal([*[bytearray(64)] * 3, bytearray(65)]) == "a buffer of 65 bytes where 64 are needed"
    assert refusal(Memory(4096, 255)) == "a buffer of 255 bytes where 256 are needed"


@pytest.mark.parametrize("thing", ["text", 7, None, object()])
def test_what_is_no_buffer_is_refused(thing: object) -> None:
    assert "not a usable buffer" in refusal(thing)


def test_memory_with_gaps_is_refused() -> None:
    assert "not a usable buffer" in refusal(memoryview(bytearray(512))[::2])
    assert "not a usable buffer" in refusal(np.zeros(512, dtype=np.uint8)[::2])
    assert "not a usable buffer" in refusal(np.zeros((16, 16), dtype=np.uint8).T, writable=False)
    assert refusal(torch.zeros((256, 2), dtype=torch.uint8)[:, 0]) == "the tensor is not contiguous"
    assert refusal(torch.zeros((16, 16), dtype=torch.uint8).t()) == "the tensor is not contiguous"


def test_a_tensor_elsewhere_is_refused() -> None:
    assert "a tensor on meta" in refusal(torch.zeros(256, dtype=torch.uint8, device="meta"))


def test_a_view_into_a_larger_tensor_starts_where_it_starts() -> None:
    whole = torch.zeros((4, 256), dtype=torch.uint8)
    with Buffers(whole[2], blocks=4, block_size_bytes=64, writable=True) as found:
        assert found.addresses[0] == whole.data_ptr() + 512
        write_through(found.addresses, 64)
    assert whole[1].count_nonzero() == whole[3].count_nonzero() == 0
    assert whole[2].count_nonzero() == 256


def test_buffers_are_let_go_of_when_the_context_ends() -> None:
    buffer = bytearray(256)
    with Buffers(buffer, blocks=4, block_size_bytes=64, writable=True), pytest.raises(BufferError):
        buffer.append(1)
    buffer.append(1)
    assert len(buffer) == 257


def test_buffers_are_let_go_of_when_one_of_them_is_refused() -> None:
    good = bytearray(64)
    refusal([good, good, good, bytearray(1)])
    good.append(1)
    assert len(good) == 65


def test_a_thousand_uses_leak_no_reference() -> None:
    buffer = bytearray(256)
    opened(buffer)
    gc.collect()
    before = _references(buffer)
    for _ in range(1_000):
        opened(buffer)
        refusal(buffer, blocks=3)
    gc.collect()
    assert _references(buffer) == before


def _references(thing: object) -> int:
    return ctypes.c_ssize_t.from_address(id(thing)).value


# -------------------------------------------------------------------- segments


def descriptors(size_bytes: int, slots: int) -> tuple[int, int]:
    memory_fd, generations_fd = os.memfd_create("segment"), os.memfd_create("generations")
    os.truncate(memory_fd, size_bytes)
    os.truncate(generations_fd, slots * 8)
    return memory_fd, generations_fd


def test_a_segment_maps_slots_and_generations_and_owns_its_descriptors() -> None:
    before = open_descriptors()
    fds = descriptors(4 * 4096, 4)
    os.pwrite(fds[0], b"third", 2 * 4096)
    os.pwrite(fds[1], (41).to_bytes(8, "little"), 2 * 8)
    kept = os.dup(fds[1])
    try:
        segment = Segment(9, fds=fds, size_bytes=4 * 4096, stride_bytes=4096, slots=4)
        assert ctypes.string_at(segment.slot_address(2), 5) == b"third"
        assert (segment.generation(1), segment.generation(2)) == (0, 41)
        os.pwrite(kept, (42).to_bytes(8, "little"), 2 * 8)
        assert segment.generation(2) == 42, "it must see the table as it is now"
        segment.unmap()
        segment.unmap()
    finally:
        os.close(kept)
    assert open_descriptors() == before


def test_a_segment_that_cannot_be_mapped_leaves_nothing_behind() -> None:
    before = open_descriptors()
    memory_fd, generations_fd = descriptors(4096, 1)
    read_only = os.open(f"/proc/self/fd/{memory_fd}", os.O_RDONLY)
    os.close(memory_fd)
    with pytest.raises(OSError, match="cannot map 4096 bytes"):
        Segment(1, fds=(read_only, generations_fd), size_bytes=4096, stride_bytes=4096, slots=1)
    assert open_descriptors() == before


def test_a_segment_is_not_mapped_in_children() -> None:
    segment = Segment(1, fds=descriptors(4096, 1), size_bytes=4096, stride_bytes=4096, slots=1)
    try:
        flags = _mapping_flags(segment.address)
    finally:
        segment.unmap()
    assert "dc" in flags, "MADV_DONTFORK shows as 'dc' (do not copy on fork)"


def _mapping_flags(address: int) -> list[str]:
    """VmFlags of the mapping that contains the address."""
    is_ours = False
    with open("/proc/self/smaps", encoding="ascii") as maps:
        for line in maps:
            head = line.split(maxsplit=1)[0]
            if "-" in head:
                start, end = (int(part, 16) for part in head.split("-"))
                is_ours = start <= address < end
            elif is_ours and head == "VmFlags:":
                return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")
