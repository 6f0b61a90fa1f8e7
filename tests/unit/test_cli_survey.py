"""`kvservice check` and `kvservice inspect` on directories that a volume left behind."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest

from kvservice.blocks import BlockHash
from kvservice.checksums import checksum_of
from kvservice.cli import main
from kvservice.nvme import RecordKind, Volume, WriteJob, record, records_array
from tests.stores import chain, spec_of

pytestmark = pytest.mark.unit

MIB = 1 << 20
SPEC = spec_of(block_size_bytes=4096, label="llama \x1b[31m")
BLOCKS = 20
STRIDE_BYTES = 8192


def opened(directory: Path) -> Volume:
    volume = Volume.open(str(directory), capacity_bytes=64 * MIB, segment_bytes=MIB)
    volume.recover()
    return volume


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    volume = opened(tmp_path / "tier")
    extents = volume.reserve(SPEC, BLOCKS)
    stored = []
    for extent, block_hash in zip(extents, hashes(), strict=True):
        memory = memoryview(mmap.mmap(-1, 4096))
        memory[:] = block_hash * 256
        volume.write(SPEC, [WriteJob(extent, block_hash, memory, checksum_of(memory))])
        stored.append(record(RecordKind.STORED, SPEC, extent, block_hash=block_hash, last_used_s=1000.0 + extent % 100))
    volume.flush(volume.epoch)
    volume.append(records_array(stored))
    volume.append(records_array([record(RecordKind.SESSION, SPEC, extents[4], block_hash=b"s" * 32)]))
    volume.close()
    return tmp_path / "tier"


def hashes() -> list[BlockHash]:
    return [BlockHash(block_hash) for block_hash in chain("a", BLOCKS)]


def flip(directory: Path, offset: int) -> None:
    segment = directory / "segments" / "00000001.kv"
    with segment.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_intact_directory_is_clean_and_is_not_changed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(directory)
    assert main(["check", str(directory)]) == 0
    assert f"{directory}: 20 blocks, 160 KiB verified in" in capsys.readouterr().out
    assert main(["inspect", str(directory)]) == 0
    assert snapshot(directory) == before


def test_each_bad_extent_is_named_with_its_place_and_what_is_wrong(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(directory, 4096 + 3 * STRIDE_BYTES + 20)  # a header
    flip(directory, 4096 + 7 * STRIDE_BYTES + 4096 + 99)  # a payload
    with (directory / "segments" / "00000001.kv").open("r+b") as file:
        file.truncate(4096 + 18 * STRIDE_BYTES)
    assert main(["check", str(directory)]) == 1
    text = capsys.readouterr().out
    for number, why in (
        (3, "its header is damaged"),
        (7, "its bytes do not have their checksum"),
        (18, "the file ends before the extent does"),
        (19, "the file ends before the extent does"),
    ):
        where = f"in segment 1, extent {number} ({directory}/segments/00000001.kv from byte {4096 + number * 8192})"
        assert f'bad: block {hashes()[number].hex()} {where}: {why}; namespace "llama ?[31m"' in text
    assert "4 bad extents" in text
    assert "one of its two headers is damaged" in text
    assert main(["check", str(directory), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [extent["extent"] for extent in report["bad_extents"]] == [3, 7, 18, 19]
    assert (report["checked_blocks"], report["is_clean"], len(report["damage"])) == (20, False, 1)


def test_damage_beside_extents_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(directory, 20)
    (directory / "namespaces").write_bytes(b"rubbish")
    log = min((directory / "index").glob("log-*"))
    content = bytearray(log.read_bytes())
    content[200] ^= 1
    log.write_bytes(content)
    assert main(["check", str(directory)]) == 1
    text = capsys.readouterr().out
    assert f"{directory}/namespaces: this copy of the namespaces' names is damaged" in text
    assert f"{directory}/index: 1 pages of the index are damaged" in text


def test_what_a_crash_left_behind_is_counted_and_is_no_damage(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segment = directory / "segments" / "00000001.kv"
    content = bytearray(segment.read_bytes())
    start, other = 4096 + 5 * STRIDE_BYTES, 4096 + 6 * STRIDE_BYTES
    content[start : start + STRIDE_BYTES] = content[other : other + STRIDE_BYTES]
    segment.write_bytes(content)
    assert main(["check", str(directory)]) == 0
    assert "1 extent already had another block when a crash came" in capsys.readouterr().out


def test_inspect_says_what_is_there(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(directory)]) == 0
    text = capsys.readouterr().out
    assert f"{directory}: 20 blocks, 160 KiB" in text
    assert "llama ?[31m" in text
    assert main(["inspect", str(directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (namespace,) = found["namespaces"]
    assert (namespace["blocks"], namespace["bytes"], namespace["sessions"]) == (20, 20 * 8192, 1)
    assert namespace["used_longest_s_ago"] - namespace["used_last_s_ago"] == pytest.approx(19, abs=0.01)
    assert (found["segments"], found["blocks"]) == (1, 20)
    assert found["log_bytes"] == 2 * 4096


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_a_directory_in_use_or_of_something_else_is_refused(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    volume = opened(directory)
    assert main([command, str(directory)]) == 2
    assert f"another process uses {directory}; stop it first" in capsys.readouterr().err
    volume.close()
    assert main([command, str(tmp_path)]) == 2
    assert f"{tmp_path} is no directory of an NVMe tier" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["tier"]
