"""nodes: a whole store with a disk in this process: it starts, works in the background, stops in order or crashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kvservice.blocks import NamespaceSpec
from kvservice.instances import Identity
from kvservice.metrics import Metrics
from kvservice.nvme import Files
from kvservice.store import Store
from kvservice.store.arrivals import Landing
from kvservice.store.outcomes import Granted
from tests.stores import Clock, Engine, content_of, small_config, spec_of

MIB = 1 << 20
_FLUSH_S = 60.0
"""A busy machine's disk takes its time; what hangs is ended by the test's own time-out."""


class Node:
    """One daemon's store on a directory, with its background work; `crash` and `stop` end it, `start` begins anew."""

    def __init__(
        self, directory: Path, *, specs: Sequence[NamespaceSpec] = (), files: Files | None = None, **knobs: Any
    ) -> None:
        """`specs`: the engine's namespaces, "model" if none are named. `files`: the disk. `knobs`: of the daemon."""
        self._directory = directory
        self._specs = specs or [spec_of()]
        self._files = files
        self._knobs = knobs
        self.clock = Clock()
        self.wall_clock = Clock()
        self.store: Store
        self.engine: Engine
        self._work: list[asyncio.Task[None]] = []

    def advance(self, seconds: float) -> None:
        """Time passes, by both clocks."""
        self.clock.advance(seconds)
        self.wall_clock.advance(seconds)

    def engine_of(self, name: str) -> Engine:
        """The engine, its calls about the namespace with that label."""
        number = next(at for at, spec in enumerate(self._specs, 1) if spec.label == name)
        return Engine(self.store, self.engine.peer, number)

    async def start(self, *, recover: bool = True) -> None:
        small = {"nvme_bytes": 32 * MIB, "nvme_segment_bytes": MIB, "nvme_write_behind_s": 0.02}
        config = small_config(nvme_dirs=str(self._directory), **{**small, **self._knobs})
        self.store = Store(
            config, Metrics(version="0"), clock=self.clock, wall_clock=self.wall_clock, files=self._files
        )
        await self.store.durability.open()
        if recover:
            await self.store.durability.recover()
        self._work = [
            asyncio.create_task(self.store.write_behind.run()),
            asyncio.create_task(self.store.checksummer.run()),
        ]
        peer = self.store.connect(Identity("uid:1", process_id=1))
        self.engine = Engine(self.store, peer)
        await self.store.attach(peer, "engine", self._specs)

    async def flush(self) -> None:
        """Everything committed is durable."""
        for task in self._work:
            assert not task.done(), task.exception()
        assert await self.store.write_behind.flush(asyncio.get_running_loop().time() + _FLUSH_S)
        await self.quiet()
        await self.store.journal.append_all()

    async def quiet(self) -> None:
        """No byte moves any more, and nothing is held but by engines."""
        checksummer = self.store.checksummer
        while checksummer.queued_blocks or any(map(checksummer.is_holding, self.store.namespaces.values())):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await self._moved()

    async def _moved(self) -> None:
        namespaces = self.store.namespaces.values()
        while self.store.write_behind.is_busy or any(namespace.arrivals for namespace in namespaces):  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        await self.flush()
        await self.crash()

    async def crash(self) -> None:
        """End it now: what is not durable is lost."""
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._moved()
        await self.store.durability.close()
        self.store.close()

    async def get(self, hashes: list[bytes], *, engine: Engine | None = None, **arguments: int) -> Granted:
        engine = engine or self.engine
        return await self.store.get(
            engine.peer,
            engine.namespace_id,
            b"".join(hashes),
            session_id="",
            request_id="",
            duration_s=0.0,
            max_blocks=arguments.get("max_blocks", 0),
        )

    async def load(self, hashes: list[bytes], *, engine: Engine | None = None) -> int:
        """Load and compare every byte; how many leading blocks came."""
        engine = engine or self.engine
        granted = await self.get(hashes, engine=engine)
        came = len(granted.slots)
        for position, arrival in granted.pending.items():
            if (await arrival.landed)[granted.rows[position]] is not Landing.OK:
                came = min(came, position)
        for block_hash, content in zip(hashes, engine.read(granted.slots[:came]), strict=False):
            assert content == content_of(block_hash), "a block came with bytes that are not its own"
        if granted.hold_id:
            self.store.release(engine.peer, [granted.hold_id])
        return came


@asynccontextmanager
async def running(
    directory: Path, *, specs: Sequence[NamespaceSpec] = (), files: Files | None = None, **knobs: Any
) -> AsyncIterator[Node]:
    """A started node; leaving the block stops it in order."""
    node = Node(directory, specs=specs, files=files, **knobs)
    await node.start()
    yield node
    await node.stop()


def disk_bytes(directory: Path) -> int:
    """What the directory takes on disk."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())
