"""One volume on real files: reservations, reads, flushes."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvservice.blocks import BlockHash
from kvservice.nvme import ReadJob, ReadResult, RealFiles
from kvservice.nvme.descriptors import Descriptors
from tests.stores import chain, spec_of
from tests.volumes import MIB, SPEC, SlowFiles, hashes_of, opened, read, store, write

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


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
