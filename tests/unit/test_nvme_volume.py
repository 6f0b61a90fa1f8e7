"""One volume on real files: reservations, flushes, names and the bound of its log."""

from __future__ import annotations

import errno
import mmap
import threading
from pathlib import Path

import pytest

from kvservice.blocks import BlockHash
from kvservice.checksums import checksum_of
from kvservice.nvme import ReadJob, ReadResult, RealFiles, RecordKind, Volume, WriteJob, record, records_array
from tests.stores import chain, spec_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

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


def write(volume: Volume, extent: int, block_hash: BlockHash) -> None:
    memory = memoryview(mmap.mmap(-1, 4096))
    memory[:] = block_hash.ljust(4096, b"x")
    volume.write(SPEC, [WriteJob(extent, block_hash, memory, checksum_of(memory))])


def read(volume: Volume, extent: int, block_hash: BlockHash) -> ReadResult:
    memory = memoryview(mmap.mmap(-1, 4096))
    (result,) = volume.read(SPEC, [ReadJob(extent, block_hash, memory)])
    if result is ReadResult.OK:
        assert memory == block_hash.ljust(4096, b"x"), "a block has bytes that are not its own"
    return result


@pytest.mark.parametrize("asked", [1, 127, 128, 200, 1000])
def test_a_reservation_has_as_many_distinct_extents_as_asked_also_over_segments(tmp_path: Path, asked: int) -> None:
    volume = opened(tmp_path)
    for _ in range(2):  # the second time over its own empty segments
        extents = volume.reserve(SPEC, asked)
        assert len(set(extents)) == len(extents) == asked
        volume.release(extents)
    volume.close()


def test_an_empty_segment_of_another_namespace_is_used_again(tmp_path: Path) -> None:
    volume = opened(tmp_path, capacity_bytes=8 * MIB)
    first = volume.reserve(SPEC, 400)
    volume.release(first)
    other = volume.reserve(spec_of("other", block_size_bytes=4096), 400)
    assert len(set(other)) == 400
    volume.close()


def test_a_flush_waits_for_one_under_way(tmp_path: Path) -> None:
    files = SlowFiles()
    volume = opened(tmp_path, files)
    write(volume, volume.reserve(SPEC, 1)[0], BlockHash(chain("a", 1)[0]))
    files.begun.clear()
    files.may_end.clear()
    first = threading.Thread(target=volume.flush, args=(volume.epoch,))
    first.start()
    assert files.begun.wait(10)
    second = threading.Thread(target=volume.flush, args=(volume.epoch,))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it returned while the block was still being flushed"
    files.may_end.set()
    first.join()
    second.join()
    volume.close()


def test_a_failed_flush_gives_up_what_was_written_before_and_is_never_made_good(tmp_path: Path) -> None:
    files = SlowFiles()
    volume = opened(tmp_path, files)
    extent, block_hash = volume.reserve(SPEC, 1)[0], BlockHash(chain("a", 1)[0])
    before = volume.epoch
    write(volume, extent, block_hash)
    files.is_failing = True
    with pytest.raises(OSError, match="the test says so"):
        volume.flush(before)
    files.is_failing = False
    with pytest.raises(OSError, match="a flush failed"):
        volume.flush(before)
    with pytest.raises(OSError, match="a flush failed"):
        write(volume, extent, block_hash)
    volume.probe()
    with pytest.raises(OSError, match="given up"):
        volume.flush(before)
    after = volume.epoch
    write(volume, extent, block_hash)
    volume.flush(after)
    volume.close()


@pytest.mark.parametrize("name", ["namespaces", "namespaces.copy"])
def test_one_damaged_copy_of_the_names_loses_nothing(tmp_path: Path, name: str) -> None:
    volume = opened(tmp_path)
    extents = volume.reserve(SPEC, 20)
    hashes = [BlockHash(block_hash) for block_hash in chain("a", 20)]
    for extent, block_hash in zip(extents, hashes, strict=True):
        write(volume, extent, block_hash)
    volume.flush(volume.epoch)
    pairs = zip(extents, hashes, strict=True)
    volume.append(records_array([record(RecordKind.STORED, SPEC, *pair[:1], block_hash=pair[1]) for pair in pairs]))
    volume.close()
    content = bytearray((tmp_path / name).read_bytes())
    content[40] ^= 1
    (tmp_path / name).write_bytes(content)
    volume = Volume.open(str(tmp_path), capacity_bytes=64 * MIB, segment_bytes=MIB)
    assert len(volume.recover().hashes) == 20
    assert read(volume, extents[7], hashes[7]) is ReadResult.OK
    volume.close()


def test_the_log_keeps_to_its_share_also_where_nobody_folds(tmp_path: Path) -> None:
    volume = opened(tmp_path, capacity_bytes=16 * MIB)
    extent = volume.reserve(SPEC, 1)[0]
    touches = records_array([record(RecordKind.TOUCHED, SPEC, extent, last_used_s=1.0)] * 2000)
    for _ in range(60):
        volume.append(touches)
        assert volume.journal.size_bytes <= 4 * MIB
    volume.close()
