"""A volume's log and checkpoints: their bound, and writes of them that fail."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvservice.errors import CapacityExhausted
from kvservice.nvme import RealFiles, RecordKind, Volume, record, records_array
from kvservice.nvme.files import Buffer
from tests.stores import spec_of
from tests.volumes import MIB, SPEC, SlowFiles, hashes_of, opened, store, taken_bytes

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def test_the_log_keeps_to_its_share_also_where_nobody_folds(tmp_path: Path) -> None:
    volume = opened(tmp_path, capacity_bytes=16 * MIB)
    extent = volume.reserve(SPEC, 1)[0]
    touches = records_array([record(RecordKind.TOUCHED, SPEC, extent, last_used_s=1.0)] * 2000)
    for _ in range(60):
        volume.append(touches)
        assert volume.journal.size_bytes <= 4 * MIB
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


def test_the_length_of_the_log_is_known_without_looking_at_the_disk(tmp_path: Path) -> None:
    def on_disk() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "index").glob("log-*"))

    files = SlowFiles()
    volume = opened(tmp_path, files)
    for name in "abc":
        store(volume, hashes_of(name, 40))
        assert volume.journal.log_bytes == on_disk() > 0
    files.is_failing = True
    with pytest.raises(OSError, match="the test says so"):
        volume.append(records_array([record(RecordKind.DROPPED, SPEC, 1 << 24)]))
    files.is_failing = False
    assert volume.journal.log_bytes >= on_disk(), "what failed may have grown the file"
    store(volume, hashes_of("d", 40))
    volume.close()
    volume = opened(tmp_path)
    assert volume.journal.log_bytes == on_disk()
    volume.journal.fold()
    assert volume.journal.log_bytes == on_disk() == 0
    store(volume, hashes_of("e", 40))
    index = tmp_path / "index"
    index.rename(tmp_path / "elsewhere")
    assert volume.journal.log_bytes > 0
    assert not volume.needs_fold
    (tmp_path / "elsewhere").rename(index)
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
