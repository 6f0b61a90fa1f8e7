"""One volume on real files: reservations, flushes, names and the bound of its log."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvservice.blocks import BlockHash, NamespaceSpec
from kvservice.checksums import checksum_of
from kvservice.errors import CapacityExhausted
from kvservice.nvme import ReadJob, ReadResult, RealFiles, RecordKind, Volume, WriteJob, record, records_array
from kvservice.nvme.descriptors import Descriptors
from kvservice.nvme.files import Buffer
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


def store(volume: Volume, hashes: Sequence[BlockHash], spec: NamespaceSpec = SPEC) -> list[int]:
    """Write, flush and record blocks; their extents."""
    extents = volume.reserve(spec, len(hashes))
    epoch = volume.epoch
    for extent, block_hash in zip(extents, hashes, strict=True):
        memory = memoryview(mmap.mmap(-1, 4096))
        memory[:] = block_hash.ljust(4096, b"x")
        volume.write(spec, [WriteJob(extent, block_hash, memory, checksum_of(memory))])
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


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_damaged_header_of_a_segment_loses_nothing(tmp_path: Path, place: str) -> None:
    volume = opened(tmp_path)
    extents = store(volume, hashes_of("a", 20))
    volume.close()
    segment = next((tmp_path / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    content[20 if place == "first" else len(content) - 4096 + 20] ^= 1
    segment.write_bytes(content)
    volume = opened(tmp_path)
    assert [read(volume, *pair) for pair in zip(extents, hashes_of("a", 20), strict=True)] == [ReadResult.OK] * 20
    volume.close()


def test_a_segment_without_an_intact_header_is_used_again_and_its_records_never_come_true(tmp_path: Path) -> None:
    volume = opened(tmp_path)
    store(volume, hashes_of("a", 20))
    volume.close()
    segment = next((tmp_path / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    for at in (20, len(content) - 4096 + 20):
        content[at] ^= 1
    segment.write_bytes(content)
    for _ in range(2):  # also after the first recovery wrote down what it found
        volume = Volume.open(str(tmp_path), capacity_bytes=64 * MIB, segment_bytes=MIB)
        assert volume.recover().hashes == []
        volume.close()
    volume = opened(tmp_path)
    store(volume, hashes_of("b", 5))
    assert len(list((tmp_path / "segments").iterdir())) == 1
    volume.close()


class ShortFiles(RealFiles):
    """Reads of at most some bytes at a time."""

    at_most = 5000

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return super().read(descriptor, [buffers[0][: self.at_most]], offset)


def test_short_reads_are_continued(tmp_path: Path) -> None:
    volume = opened(tmp_path, ShortFiles())
    extents = store(volume, hashes_of("a", 3))
    assert [read(volume, *pair) for pair in zip(extents, hashes_of("a", 3), strict=True)] == [ReadResult.OK] * 3
    volume.close()


def test_a_file_that_ends_early_loses_the_blocks_behind_its_end_only(tmp_path: Path) -> None:
    volume = opened(tmp_path)
    extents = store(volume, hashes_of("a", 20))
    volume.close()
    with next((tmp_path / "segments").iterdir()).open("r+b") as segment:
        segment.truncate(4096 + 10 * 8192 + 100)
    volume = opened(tmp_path)
    results = [read(volume, *pair) for pair in zip(extents, hashes_of("a", 20), strict=True)]
    assert results == [ReadResult.OK] * 10 + [ReadResult.ENDS_EARLY] * 10
    volume.close()


def test_a_run_of_neighbours_is_one_read_and_each_block_has_its_own_result(tmp_path: Path) -> None:
    class Counting(RealFiles):
        reads = 0

        def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
            self.reads += 1
            return super().read(descriptor, buffers, offset)

    files = Counting()
    volume = opened(tmp_path, files)
    hashes = hashes_of("a", 12)
    extents = store(volume, hashes)
    segment = next((tmp_path / "segments").iterdir())
    with segment.open("r+b") as file:
        file.seek(4096 + 5 * 8192 + 4096 + 77)  # a byte of the sixth block's payload
        file.write(b"\xff")
    files.reads = 0
    jobs = [
        ReadJob(extent, block_hash, memoryview(mmap.mmap(-1, 4096)))
        for extent, block_hash in zip(extents, hashes, strict=True)
    ]
    assert volume.read(SPEC, jobs) == [ReadResult.OK] * 5 + [ReadResult.PAYLOAD_DAMAGED] + [ReadResult.OK] * 6
    assert files.reads == 1
    volume.close()


def test_few_descriptors_are_open_however_many_segments_there_are(tmp_path: Path) -> None:
    files = RealFiles()
    descriptors = Descriptors(files, lambda number: str(tmp_path / str(number)), limit=4)
    with descriptors.borrowed(0) as held:
        for number in range(1, 50):
            with descriptors.borrowed(number) as descriptor:
                os.fstat(descriptor)
                assert len(descriptors) <= 4
        os.fstat(held)  # in use: it stayed open
    assert len(descriptors) == 4
    descriptors.close()


def test_a_block_stored_twice_and_dropped_once_does_not_come_back(tmp_path: Path) -> None:
    """The record that it left its first extent is lost, as a damaged page of the log would lose it."""
    volume = opened(tmp_path)
    block_hash = hashes_of("a", 1)
    store(volume, block_hash)
    (second,) = store(volume, block_hash)
    volume.append(records_array([record(RecordKind.DROPPED, SPEC, second)]))
    volume.close()
    volume = Volume.open(str(tmp_path), capacity_bytes=64 * MIB, segment_bytes=MIB)
    assert volume.recover().hashes == []
    volume.close()


def test_a_smaller_bound_keeps_what_was_used_last(tmp_path: Path) -> None:
    volume = opened(tmp_path)
    hashes = hashes_of("a", 1200)
    store(volume, hashes)
    volume.close()
    assert taken_bytes(tmp_path) > 9 * MIB
    for _ in range(2):
        volume = Volume.open(str(tmp_path), capacity_bytes=8 * MIB, segment_bytes=MIB)
        found = volume.recover().hashes
        assert taken_bytes(tmp_path) <= 8 * MIB
        assert 300 < len(found) < 512
        assert hashes[-1] in found
        assert hashes[0] not in found
        volume.close()


def test_the_bound_covers_data_log_and_checkpoints_while_they_grow(tmp_path: Path) -> None:
    """Looked at after every system call that takes space, folds included, under churn, touches and made-up sessions."""
    bound = 12 * MIB
    highest = 0

    class Watching(RealFiles):
        def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
            nonlocal highest
            super().write(descriptor, buffers, offset)
            highest = max(highest, taken_bytes(tmp_path))

        def allocate(self, descriptor: int, size_bytes: int) -> None:
            nonlocal highest
            super().allocate(descriptor, size_bytes)
            highest = max(highest, taken_bytes(tmp_path))

    volume = opened(tmp_path, Watching(), capacity_bytes=bound)
    live: list[int] = []
    folds = 0
    for number in range(60):
        try:
            live += store(volume, hashes_of(f"c{number}", 40), spec_of(f"n{number % 3}", block_size_bytes=4096))
        except CapacityExhausted:
            dropped, live = live[:400], live[400:]
            volume.append(records_array([record(RecordKind.DROPPED, SPEC, extent) for extent in dropped]))
            volume.release(dropped)
        noise = [record(RecordKind.TOUCHED, SPEC, extent, last_used_s=1.0) for extent in live[:600]]
        noise += [
            record(RecordKind.SESSION, SPEC, live[-1], block_hash=f"{number}/{at}".encode().ljust(32, b"."))
            for at in range(2000)
        ]
        volume.append(records_array(noise))
        if volume.needs_fold and number % 5 == 0:
            volume.journal.fold()
            folds += 1
    assert folds > 3
    assert bound * 3 // 4 < highest <= bound
    volume.close()


def test_a_failed_checkpoint_leaves_no_draft_and_loses_nothing(tmp_path: Path) -> None:
    class Full(RealFiles):
        is_full = False

        def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, "the test says so")
            super().write(descriptor, buffers, offset)

    files = Full()
    volume = opened(tmp_path, files)
    store(volume, hashes_of("a", 20))
    files.is_full = True
    with pytest.raises(OSError, match="the test says so"):
        volume.journal.fold()
    assert not list((tmp_path / "index").glob("*.tmp"))
    files.is_full = False
    store(volume, hashes_of("b", 20))
    volume.journal.fold()
    volume.close()
    volume = Volume.open(str(tmp_path), capacity_bytes=64 * MIB, segment_bytes=MIB)
    assert sorted(volume.recover().hashes) == sorted(hashes_of("a", 20) + hashes_of("b", 20))
    volume.close()


def test_nothing_is_appended_behind_a_failed_append(tmp_path: Path) -> None:
    """What the disk has of the end of that log is anybody's guess: the next records go to another."""
    files = SlowFiles()
    volume = opened(tmp_path, files)
    store(volume, hashes_of("a", 2))
    logs = len(list((tmp_path / "index").glob("log-*")))
    files.is_failing = True
    with pytest.raises(OSError, match="the test says so"):
        volume.append(records_array([record(RecordKind.DROPPED, SPEC, 1 << 24)]))
    files.is_failing = False
    volume.append(records_array([record(RecordKind.DROPPED, SPEC, 1 << 24)]))
    assert len(list((tmp_path / "index").glob("log-*"))) == logs + 1
    volume.close()


def test_names_of_namespaces_without_blocks_are_not_kept_for_ever(tmp_path: Path) -> None:
    volume = opened(tmp_path, capacity_bytes=16 * MIB)
    for number in range(1500):
        volume.release(volume.reserve(spec_of(f"n{number}", block_size_bytes=4096), 1))
        if number % 200 == 0:
            store(volume, hashes_of(f"{number}", 1), spec_of(f"n{number}", block_size_bytes=4096))
    assert (tmp_path / "namespaces").stat().st_size < 512 * 1024
    volume.close()
    volume = Volume.open(str(tmp_path), capacity_bytes=16 * MIB, segment_bytes=MIB)
    assert len(volume.recover().hashes) == 8
    volume.close()
