"""One flipped byte anywhere on disk: blocks are missing, never wrong, and nothing raises.

The bytes of a small directory are flipped in turn, between the disk and the reader.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvservice.blocks import BlockHash
from kvservice.checksums import checksum_of
from kvservice.nvme import (
    ReadJob,
    ReadResult,
    RealFiles,
    RecordKind,
    Recovered,
    Volume,
    WriteJob,
    record,
    records_array,
)
from kvservice.nvme.format import RECORD
from kvservice.nvme.journal_files import JournalFiles
from kvservice.nvme.names import read_names
from kvservice.nvme.recollection import find_segments, recollect
from tests.stores import chain, spec_of

pytestmark = [pytest.mark.unit, pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20
SPEC = spec_of(block_size_bytes=4000)  # with padding behind it
HASHES = [BlockHash(block_hash) for block_hash in chain("a", 6)]
PAGE_BYTES = 4096
STRIDE_BYTES = 2 * PAGE_BYTES


class FlippingFiles(RealFiles):
    """One byte of one file is read as another."""

    def __init__(self) -> None:
        self.path = ""
        self.position = 0
        self._paths: dict[int, str] = {}

    def open(self, path: str, *, direct: bool, create: bool) -> int:
        descriptor = super().open(path, direct=direct, create=create)
        self._paths[descriptor] = path
        return descriptor

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().read(descriptor, buffers, offset)
        at = self.position - offset
        if self._paths[descriptor] == self.path and 0 <= at < count:
            for buffer in buffers:
                if at < len(buffer):
                    buffer[at] ^= 0x10
                    break
                at -= len(buffer)
        return count


def content_of(block_hash: bytes) -> bytes:
    return (block_hash * 256)[: SPEC.block_size_bytes]


def opened(directory: Path, files: RealFiles) -> Volume:
    return Volume.open(str(directory), capacity_bytes=32 * MIB, segment_bytes=64 * 1024, files=files)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks of a chain and a session in a checkpoint, touches and a drop in a log."""
    made = tmp_path_factory.mktemp("damage")
    volume = opened(made, RealFiles())
    volume.recover()
    extents = volume.reserve(SPEC, len(HASHES))
    records = []
    for depth, (extent, block_hash) in enumerate(zip(extents, HASHES, strict=True)):
        memory = memoryview(mmap.mmap(-1, PAGE_BYTES))
        memory[: SPEC.block_size_bytes] = content_of(block_hash)
        checksum = checksum_of(memory[: SPEC.block_size_bytes])
        volume.write(SPEC, [WriteJob(extent, block_hash, memory, checksum)])
        parent = HASHES[depth - 1] if depth else b""
        records.append(
            record(RecordKind.STORED, SPEC, extent, block_hash=block_hash, parent=parent, depth=depth, last_used_s=1.0)
        )
    volume.flush(volume.epoch)
    volume.append(records_array(records))
    volume.append(records_array([record(RecordKind.SESSION, SPEC, extents[3], block_hash=b"s" * 32)]))
    volume.journal.fold()
    volume.append(records_array([record(RecordKind.TOUCHED, SPEC, extents[2], uses=2, last_used_s=2.0)]))
    volume.append(records_array([record(RecordKind.DROPPED, SPEC, extents[5])]))
    volume.close()
    return made


def remembered(directory: Path, files: RealFiles) -> Recovered:
    """What a start would find."""
    names = read_names(str(directory))
    records, damaged = JournalFiles(str(directory / "index"), files).read()
    return recollect(names, find_segments(str(directory), files), records, damaged).recovered


def facts(recovered: Recovered) -> dict[bytes, tuple[object, ...]]:
    """Each block with all that is said of it, but its recency."""
    columns = (recovered.parent_hashes, recovered.depth.tolist(), recovered.extent.tolist())
    return dict(zip(recovered.hashes, zip(*columns, strict=True), strict=True))


def nothing_else(found: dict[bytes, tuple[object, ...]], expected: dict[bytes, tuple[object, ...]]) -> bool:
    """Whether all that is said was true once: the last block left, and is back where the record of that is lost."""
    return found.items() - {(HASHES[5], found.get(HASHES[5]))} <= expected.items()


def positions(content: bytes) -> list[int]:
    """Every byte that says something, and some of the zeros behind the last."""
    end = len(content.rstrip(b"\0"))
    return [*range(end), *range(end, len(content), 97)]


def test_any_byte_of_any_extent(directory: Path) -> None:
    files = FlippingFiles()
    volume = opened(directory, files)
    found = dict(zip((recovered := volume.recover()).hashes, recovered.extent.tolist(), strict=True))
    assert list(found) == HASHES[:5]
    (segment,) = (directory / "segments").iterdir()
    memory = memoryview(mmap.mmap(-1, PAGE_BYTES))
    files.path = str(segment)
    misses = 0
    for number, block_hash in enumerate(HASHES[:2]):
        for position in range(STRIDE_BYTES):
            files.position = PAGE_BYTES + number * STRIDE_BYTES + position
            (result,) = volume.read(SPEC, [ReadJob(found[block_hash], block_hash, memory)])
            is_padding = position >= PAGE_BYTES + SPEC.block_size_bytes
            assert (result is ReadResult.OK) == is_padding, f"byte {position} of extent {number}"
            misses += result is not ReadResult.OK
    assert misses == 2 * (PAGE_BYTES + SPEC.block_size_bytes)
    volume.close()


def test_any_byte_of_any_index_page(directory: Path) -> None:
    files = FlippingFiles()
    expected = facts(remembered(directory, files))
    assert len(expected) == 5
    flipped = lost = 0
    for path in sorted((directory / "index").iterdir()):
        files.path = str(path)
        for files.position in positions(path.read_bytes()):
            recovered = remembered(directory, files)
            found = facts(recovered)
            assert nothing_else(found, expected), f"byte {files.position} of {path.name}"
            assert recovered.damaged_pages == 1, f"byte {files.position} of {path.name} was not noticed"
            flipped += 1
            lost += len(found) < len(expected)
    assert flipped >= 7 * RECORD.itemsize
    assert lost >= 6 * RECORD.itemsize, "a damaged checkpoint has lost its blocks"


def test_any_byte_of_a_segments_headers_or_of_the_names(directory: Path) -> None:
    files = FlippingFiles()
    expected = facts(remembered(directory, files))
    (segment,) = (directory / "segments").iterdir()
    files.path = str(segment)
    content = segment.read_bytes()
    for start in (0, len(content) - PAGE_BYTES):
        for position in positions(content[start : start + PAGE_BYTES]):
            files.position = start + position
            assert facts(remembered(directory, files)) == expected
    files.path = ""
    for name in ("namespaces", "namespaces.copy"):
        path = directory / name
        content = path.read_bytes()
        for position in positions(content):
            flipped = bytearray(content)
            flipped[position] ^= 0x10
            path.write_bytes(flipped)
            assert facts(remembered(directory, files)) == expected, f"byte {position} of {name}"
        path.write_bytes(content)


def test_random_bytes_in_place_of_any_file(directory: Path, tmp_path: Path) -> None:
    """Whatever stands there, a start finds less, never something else, and never fails."""
    expected = facts(remembered(directory, RealFiles()))
    for path in sorted(file for file in directory.rglob("*") if file.is_file()):
        content = path.read_bytes()
        path.write_bytes(os.urandom(len(content) * 3 // 4))
        assert nothing_else(facts(remembered(directory, RealFiles())), expected), path
        path.write_bytes(content)
