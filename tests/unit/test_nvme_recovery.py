"""What one volume finds again when it is opened: damage loses what is damaged, and nothing false comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvservice.blocks import BlockHash
from kvservice.nvme import ReadResult, RecordKind, Volume, record, records_array
from tests.stores import chain, spec_of
from tests.volumes import MIB, SPEC, hashes_of, opened, read, store, taken_bytes, write

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


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
