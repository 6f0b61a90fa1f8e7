"""A volume loses power at any moment: whatever was acknowledged is found again, and no block has another's bytes.

Every write and flush of a run is recorded. For a moment in it, the directory is rebuilt as a disk may have left it:
flushed writes are there, of the others any subset, some of them torn at 512 bytes. Then the volume is recovered.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvservice.blocks import BlockHash, NamespaceSpec
from kvservice.errors import CapacityExhausted
from kvservice.nvme import ReadJob, ReadResult, RealFiles, RecordKind, Volume, WriteJob, record, records_array
from kvservice.nvme.files import Buffer
from tests.stores import chain, spec_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

MIB = 1 << 20
CAPACITY_BYTES = 4 * MIB + MIB // 2
"""Two segments beside the index: they change hands between the namespaces."""
BLOCK_BYTES = 4096
SECTOR_BYTES = 512
ROUNDS = 45
CRASHES_PER_RUN = 12


@dataclass
class Event:
    """One call that changed something, in order."""

    kind: str
    path: str
    offset: int = 0
    content: bytes = b""
    target: str = ""


class RecordingFiles(RealFiles):
    """The real thing, writing down what is asked of it. Creating, renaming and removing flush their directory."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._paths: dict[int, str] = {}

    def open(self, path: str, *, direct: bool, create: bool) -> int:
        descriptor = super().open(path, direct=direct, create=create)
        self._paths[descriptor] = path
        if create:
            self.events.append(Event("create", path))
        return descriptor

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        super().write(descriptor, buffers, offset)
        content = b"".join(bytes(buffer) for buffer in buffers)
        self.events.append(Event("write", self._paths[descriptor], offset, content))

    def flush(self, descriptor: int) -> None:
        super().flush(descriptor)
        self.events.append(Event("flush", self._paths[descriptor]))

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        super().allocate(descriptor, size_bytes)
        self.events.append(Event("allocate", self._paths[descriptor], size_bytes))

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.events.append(Event("rename", source, target=target))

    def remove(self, path: str) -> None:
        super().remove(path)
        self.events.append(Event("remove", path))


@dataclass
class File:
    """A file as the disk may have it: what is durable, and what was written since the last flush."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Event] = field(default_factory=list)

    def apply(self, offset: int, content: bytes) -> None:
        if len(self.durable) < offset:
            self.durable += bytes(offset - len(self.durable))
        self.durable[offset : offset + len(content)] = content

    def settle(self) -> None:
        for event in self.pending:
            self.apply(event.offset, event.content)
        self.pending.clear()

    def lose_power(self, chance: random.Random) -> bytes:
        """Any subset of what was not flushed, in any order, some of it torn."""
        chance.shuffle(self.pending)
        for event in self.pending:
            fate = chance.random()
            if fate < 0.4:
                self.apply(event.offset, event.content)
            elif fate < 0.7:
                for start in range(0, len(event.content), SECTOR_BYTES):
                    if chance.random() < 0.5:
                        self.apply(event.offset + start, event.content[start : start + SECTOR_BYTES])
        return bytes(self.durable)


def after_power_loss(events: Sequence[Event], source: Path, target: Path, chance: random.Random) -> None:
    """Make `target` what the disk may hold after these events."""
    files: dict[str, File] = {}
    for event in events:
        match event.kind:
            case "create":
                files.setdefault(event.path, File())
            case "write":
                files[event.path].pending.append(event)
            case "flush":
                files[event.path].settle()
            case "allocate":
                files[event.path].apply(event.offset, b"")
            case "rename":
                files[event.target] = files.pop(event.path)
            case "remove":
                files.pop(event.path, None)
    for path, file in files.items():
        place = target / Path(path).relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.lose_power(chance))


@dataclass
class Stored:
    """One block of the run: since when it must survive, and since when it need not."""

    spec: NamespaceSpec
    block_hash: BlockHash
    extent: int
    acknowledged_at: int
    given_up_at: int = 1 << 60


class Run:
    """A volume under a stream of batches, drops and folds."""

    def __init__(self, directory: Path, specs: Sequence[NamespaceSpec], chance: random.Random) -> None:
        self.files = RecordingFiles()
        self.specs = specs
        self.changed_hands = 0
        self.stored: list[Stored] = []
        self._chance = chance
        self._volume = Volume.open(
            str(directory), capacity_bytes=CAPACITY_BYTES, segment_bytes=MIB // 4, files=self.files
        )
        self._volume.recover()
        self._number = 0

    def go(self) -> None:
        for _ in range(ROUNDS):
            match self._chance.choice(["store", "store", "store", "drop", "fold"]):
                case "store":
                    self._store(self._chance.randrange(1, 20))
                case "drop":
                    self._drop()
                case "fold":
                    self._volume.journal.fold()
        self._volume.close()

    def _store(self, count: int) -> None:
        hashes = [BlockHash(chain(f"b{self._number + at}", 1)[0]) for at in range(count)]
        self._number += count
        spec = self._chance.choice(self.specs)
        try:
            extents = self._volume.reserve(spec, count)
        except CapacityExhausted:
            # Another one's blocks leave, all of them: its segments change hands.
            self._leave([stored for stored in self._live() if stored.spec is not spec])
            self._leave(self._live()[:count])
            extents = self._volume.reserve(spec, count)
            self.changed_hands += 1
        epoch = self._volume.epoch
        for block_hash, extent in zip(hashes, extents, strict=True):
            content = content_of(block_hash)
            memory = memoryview(mmap.mmap(-1, BLOCK_BYTES))
            memory[:] = content
            job = WriteJob(extent, block_hash, memory, xxhash.xxh3_64_intdigest(content))
            self._volume.write(spec, [job])
        self._volume.flush(epoch)
        records = [
            record(RecordKind.STORED, spec, extent, block_hash=block_hash, last_used_s=1.0)
            for block_hash, extent in zip(hashes, extents, strict=True)
        ]
        self._volume.append(records_array(records))
        now = len(self.files.events)
        self.stored += [Stored(spec, *pair, now) for pair in zip(hashes, extents, strict=True)]

    def _drop(self) -> None:
        live = self._live()
        self._leave(self._chance.sample(live, len(live) // 4))

    def _live(self) -> list[Stored]:
        return [stored for stored in self.stored if stored.given_up_at == 1 << 60]

    def _leave(self, leaving: Sequence[Stored]) -> None:
        for stored in leaving:
            stored.given_up_at = len(self.files.events)
            self._volume.append(records_array([record(RecordKind.DROPPED, stored.spec, stored.extent)]))
            self._volume.release([stored.extent])


def content_of(block_hash: bytes) -> bytes:
    return random.Random(block_hash).randbytes(BLOCK_BYTES)


@pytest.mark.parametrize("seed", range(12))
def test_what_was_acknowledged_survives_and_nothing_has_other_bytes(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    run = Run(tmp_path / "run", [spec_of(name, block_size_bytes=BLOCK_BYTES) for name in "ab"], chance)
    run.go()
    assert run.changed_hands, "no segment changed hands"
    events = run.files.events
    for number in range(CRASHES_PER_RUN):
        moment = chance.randrange(1, len(events) + 1)
        rebuilt = tmp_path / f"crash-{number}"
        after_power_loss(events[:moment], tmp_path / "run", rebuilt, chance)
        volume = Volume.open(str(rebuilt), capacity_bytes=CAPACITY_BYTES, segment_bytes=MIB // 4)
        recovered = volume.recover()
        found: dict[bytes, ReadResult] = {}
        memory = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        specs = [recovered.namespaces[at] for at in recovered.namespace_index.tolist()]
        for spec, block_hash, extent in zip(specs, recovered.hashes, recovered.extent.tolist(), strict=True):
            memory[:] = bytes(BLOCK_BYTES)
            found[block_hash] = volume.read(spec, [ReadJob(extent, BlockHash(block_hash), memory)])[0]
            if found[block_hash] is ReadResult.OK:
                assert memory == content_of(block_hash), "a block has bytes that are not its own"
        for stored in run.stored:
            if stored.acknowledged_at <= moment <= stored.given_up_at:
                assert found.get(stored.block_hash) is ReadResult.OK, f"lost what was acknowledged ({moment=})"
        assert len(np.unique(recovered.extent)) == len(recovered.extent), "one extent for two blocks"
        volume.close()
