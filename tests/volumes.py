"""volumes: one volume on real files, and what tests do with it."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path

from kvservice.blocks import BlockHash, NamespaceSpec
from kvservice.checksums import checksum_of
from kvservice.nvme import ReadJob, ReadResult, RealFiles, RecordKind, Volume, WriteJob, record, records_array
from tests.stores import chain, spec_of

MIB = 1 << 20
SPEC = spec_of(block_size_bytes=4096)


class SlowFiles(RealFiles):
    """Flushes wait until they are let go; or fail."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.is_failing = False
        self.flushed = 0

    def flush(self, descriptor: int) -> None:
        self.begun.set()
        self.may_end.wait(10)
        if self.is_failing:
            raise OSError(errno.EIO, "the test says so")
        self.flushed += 1
        super().flush(descriptor)


def opened(directory: Path, files: RealFiles | None = None, *, capacity_bytes: int = 64 * MIB) -> Volume:
    volume = Volume.open(str(directory), capacity_bytes=capacity_bytes, segment_bytes=MIB, files=files)
    volume.recover()
    return volume


def write(volume: Volume, extent: int, block_hash: BlockHash, spec: NamespaceSpec = SPEC) -> None:
    memory = memoryview(mmap.mmap(-1, 4096))
    memory[:] = block_hash.ljust(4096, b"x")
    volume.write(spec, [WriteJob(extent, block_hash, memory, checksum_of(memory))])


def read(volume: Volume, extent: int, block_hash: BlockHash) -> ReadResult:
    memory = memoryview(mmap.mmap(-1, 4096))
    (result,) = volume.read(SPEC, [ReadJob(extent, block_hash, memory)])
    if result is ReadResult.OK:
        assert memory == block_hash.ljust(4096, b"x"), "a block has bytes that are not its own"
    return result


def store(volume: Volume, hashes: Sequence[BlockHash], spec: NamespaceSpec = SPEC) -> list[int]:
    """Write, flush and record blocks; their extents."""
    extents = volume.reserve(spec, len(hashes))
    epoch = volume.epoch
    for extent, block_hash in zip(extents, hashes, strict=True):
        write(volume, extent, block_hash, spec)
    volume.flush(epoch)
    stored = [
        record(RecordKind.STORED, spec, extent, block_hash=block_hash, last_used_s=float(extent))
        for extent, block_hash in zip(extents, hashes, strict=True)
    ]
    volume.append(records_array(stored))
    return extents


def hashes_of(name: str, count: int) -> list[BlockHash]:
    return [BlockHash(block_hash) for block_hash in chain(name, count)]


def taken_bytes(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())
