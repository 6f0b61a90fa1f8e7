"""A disk that lies, fails and stalls under a whole store: misses, never a wrong byte, and nothing recorded is lost.

Seeded. Reads come short, fail, or with a flipped bit; writes fail half-way or find the disk full; flushes fail and then
forget what was written, and the next flush says that all is well.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from kvservice.errors import CapacityExhausted
from kvservice.nvme import RealFiles, Survey
from kvservice.nvme.files import Buffer
from tests.nodes import MIB, Node, disk_bytes
from tests.stores import chain

pytestmark = [pytest.mark.unit, pytest.mark.slow, pytest.mark.timeout(180)]

STEPS = 300
OPERATIONS = ["save"] * 5 + ["load"] * 5 + ["come back"] * 4 + ["prefetch", "flush", "fold", "forget", "restart"]
BOUND_BYTES = 24 * MIB


class FaultyFiles(RealFiles):
    """One call in so many goes wrong while `one_in` says so; 0: none does."""

    def __init__(self, seed: int) -> None:
        self.one_in = 0
        self.faults: defaultdict[str, int] = defaultdict(int)
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}
        self._undo: defaultdict[str, list[tuple[int, bytes]]] = defaultdict(list)

    def open(self, path: str, *, direct: bool, create: bool) -> int:
        if self._strikes("open", 4):
            raise OSError(errno.EIO, "the test says so: open")
        descriptor = super().open(path, direct=direct, create=create)
        self._paths[descriptor] = path
        return descriptor

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self._strikes("slow read"):
            time.sleep(0.002)
        if self._strikes("read"):
            raise OSError(errno.EIO, "the test says so: read")
        if self._strikes("short read", 0.2):
            return super().read(descriptor, [buffers[0][: self._chance.choice([512, 4096])]], offset)
        count = super().read(descriptor, buffers, offset)
        if count and self._strikes("flipped bit"):
            buffer = self._chance.choice(buffers)
            buffer[self._chance.randrange(len(buffer))] ^= 1 << self._chance.randrange(8)
        return count

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        content = b"".join(bytes(buffer) for buffer in buffers)
        self._remember(descriptor, offset, len(content))
        if self._strikes("write"):
            half = len(content) // 2 // 4096 * 4096
            self._overwrite(self._paths[descriptor], offset, content[:half])
            raise OSError(self._chance.choice([errno.EIO, errno.ENOSPC]), "the test says so: write")
        super().write(descriptor, buffers, offset)

    def flush(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        if self._strikes("flush"):
            for offset, before in reversed(self._undo.pop(path, [])):
                self._overwrite(path, offset, before)
            raise OSError(errno.EIO, "the test says so: flush")
        super().flush(descriptor)
        self._undo.pop(path, None)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        if self._strikes("allocate", 0.5):
            raise OSError(errno.ENOSPC, "the test says so: allocate")
        super().allocate(descriptor, size_bytes)

    def rename(self, source: str, target: str) -> None:
        if self._strikes("rename"):
            raise OSError(errno.EIO, "the test says so: rename")
        super().rename(source, target)

    def _strikes(self, what: str, rarer: float = 1.0) -> bool:
        with self._lock:
            if not self.one_in or self._chance.random() * self.one_in * rarer >= 1:
                return False
            self.faults[what] += 1
            return True

    def _remember(self, descriptor: int, offset: int, size_bytes: int) -> None:
        path = self._paths[descriptor]
        with open(path, "rb") as file:
            file.seek(offset)
            self._undo[path].append((offset, file.read(size_bytes).ljust(size_bytes, b"\0")))

    @staticmethod
    def _overwrite(path: str, offset: int, content: bytes) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


@pytest.mark.parametrize("seed", range(8))
def test_a_disk_that_lies_and_fails_costs_misses_only(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    files = FaultyFiles(seed)

    async def one_step(node: Node, lengths: dict[str, int]) -> None:
        match chance.choice(OPERATIONS):
            case "save":
                name = f"c{chance.randrange(20)}"
                lengths[name] = min(14, lengths.get(name, 0) + chance.randrange(1, 6))
                with suppress(CapacityExhausted):
                    await node.engine.save(chain(name, lengths[name]), session_id=name)
            case "load" if lengths:
                name = chance.choice(sorted(lengths))
                assert await node.load(chain(name, lengths[name])) <= lengths[name]
            case "prefetch" if lengths:
                name = chance.choice(sorted(lengths))
                node.store.prefetch(node.engine.peer, 1, b"".join(chain(name, lengths[name])))
            case "flush":
                await node.flush()
            case "fold":
                with suppress(OSError):
                    node.store.disks.disks[0].volume.journal.fold()
            case "forget" if lengths:
                node.store.forget_session(node.engine.peer, 1, chance.choice(sorted(lengths)))
            case "come back":
                await come_back(node)
            case "restart":
                await node.crash()
                files.one_in, usual = 0, files.one_in  # a start that fails is another test's
                await node.start()
                files.one_in = usual
        await node.quiet()
        node.store.check()
        assert disk_bytes(tmp_path) <= BOUND_BYTES

    async def come_back(node: Node) -> None:
        disk = node.store.disks.disks[0]
        if not disk.health.can_write:
            with suppress(OSError):
                disk.volume.probe()
                disk.health.come_back()

    async def scenario() -> None:
        node = Node(tmp_path, files=files, nvme_bytes=BOUND_BYTES)
        await node.start()
        lengths: dict[str, int] = {}
        for step in range(STEPS):
            files.one_in = 0 if step % 30 > 20 else 20
            await one_step(node, lengths)
        files.one_in = 0
        await come_back(node)
        await node.engine.save(chain("last", 5))
        await node.stop()
        await node.start()
        for name, length in lengths.items():
            await node.load(chain(name, length))
        assert await node.load(chain("last", 5)) == 5
        await node.stop()

    asyncio.run(scenario())
    with Survey(str(tmp_path)) as survey:
        bad = [extent for extent in survey.check() if extent.is_bad]
    assert not bad, "something was recorded that is not on the disk"
    assert len(files.faults) >= 5, f"too little went wrong: {dict(files.faults)}"


def test_a_disk_that_fails_while_it_recovers_is_not_written_over(tmp_path: Path) -> None:
    class Failing(RealFiles):
        is_failing = False

        def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
            if self.is_failing:
                raise OSError(errno.EIO, "the test says so")
            return super().read(descriptor, buffers, offset)

    files = Failing()

    async def scenario() -> None:
        node = Node(tmp_path, files=files)
        await node.start()
        await node.engine.save(chain("old", 6))
        await node.stop()
        files.is_failing = True
        await node.start()
        files.is_failing = False
        disk = node.store.disks.disks[0]
        disk.health._probe_at_s = 0.0
        assert not await disk.came_back()
        assert "recovery failed" in disk.health.why
        await node.engine.save(chain("new", 6))
        assert await node.load(chain("new", 6)) == 6, "DRAM serves"
        await node.stop()
        await node.start()
        assert await node.load(chain("old", 6)) == 6
        await node.stop()

    asyncio.run(scenario())
