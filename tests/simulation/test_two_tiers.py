"""Both tiers under one store, against a dictionary: only a miss may differ, never a byte.

Real files, real threads, a seeded stream of operations: saves, loads, prefetches, write-behind, forgetting, restarts
with and without notice, damaged bytes on disk, a disk that goes away and comes back.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kvservice.blocks import NO_EXTENT, DropReason
from kvservice.errors import CapacityExhausted
from kvservice.queues import Entry, QueueDelta, QueueSnapshot
from kvservice.store import explain
from kvservice.store.outcomes import Held, Miss
from tests.nodes import Node, disk_bytes, running
from tests.stores import chain, content_of, spec_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

MIB = 1 << 20
STEPS = 120
OPERATIONS = ["save"] * 4 + ["load"] * 5 + ["queue"] * 3
OPERATIONS += ["prefetch", "flush", "forget", "crash", "stop", "damage", "offline"]


def damage(directory: Path, chance: random.Random) -> None:
    """Flip one byte of a segment file or of the index."""
    files = sorted((directory / "segments").iterdir()) + sorted((directory / "index").iterdir())
    written = [file for file in files if file.stat().st_size]
    if not written:
        return
    chosen = chance.choice(written)
    with chosen.open("r+b") as file:
        file.seek(chance.randrange(chosen.stat().st_size))
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ chance.randrange(1, 256)]))


def overwrite(directory: Path, pattern: str) -> None:
    """Nothing of what was in these files is left."""
    for file in directory.glob(pattern):
        file.write_bytes(b"\x5a" * file.stat().st_size)


@pytest.mark.parametrize(
    ("seed", "admission"), [*((seed, "all") for seed in range(6)), *((seed, "reused") for seed in range(6, 9))]
)
def test_whatever_happens_a_block_has_its_own_bytes_or_is_a_miss(seed: int, admission: str, tmp_path: Path) -> None:
    chance, epochs = random.Random(seed), itertools.count(1)

    async def one_step(node: Node, lengths: dict[str, int]) -> None:
        match chance.choice(OPERATIONS):
            case "save":
                name = f"c{chance.randrange(12)}"
                lengths[name] = min(14, lengths.get(name, 0) + chance.randrange(1, 6))
                with suppress(CapacityExhausted):  # it may not fit beside what is in front of it
                    await node.engine.save(chain(name, lengths[name]), session_id=name)
            case "load" if lengths:
                name = chance.choice(sorted(lengths))
                assert await node.load(chain(name, lengths[name])) <= lengths[name]
            case "prefetch" if lengths:
                name = chance.choice(sorted(lengths))
                node.store.prefetch(node.engine.peer, 1, b"".join(chain(name, lengths[name])))
            case "queue":
                names = chance.sample(sorted(lengths), chance.randrange(min(5, len(lengths) + 1)))
                entries = [Entry(name, b"".join(chain(name, 14))) for name in names]
                epoch = next(epochs)
                node.store.waiting.update(node.engine.peer, node.engine.namespace, QueueSnapshot(epoch, entries))
                if names:
                    delta = QueueDelta(epoch, 1, started=names[:1])
                    await node.store.prefetching.round()
                    node.store.waiting.update(node.engine.peer, node.engine.namespace, delta)
                await node.store.prefetching.round()
            case "flush":
                await node.flush()
            case "forget" if lengths:
                name = chance.choice(sorted(lengths))
                node.store.forget_session(node.engine.peer, 1, name)
            case "crash":
                await node.crash()
                await node.start()
            case "stop":
                await node.stop()
                if chance.random() < 0.5:
                    damage(tmp_path, chance)
                await node.start()
            case "damage":
                damage(tmp_path, chance)
            case "offline":
                node.store.disks.disks[0].health.fail("the test says so")
                for name in sorted(lengths)[:3]:
                    await node.load(chain(name, lengths[name]))
                node.store.disks.disks[0].health.come_back()
        await node.quiet()
        node.store.check()

    async def scenario() -> None:
        node = Node(tmp_path, nvme_admission=admission)
        await node.start()
        lengths: dict[str, int] = {}
        for _ in range(STEPS):
            await one_step(node, lengths)
        await node.stop()

    asyncio.run(scenario())


def test_what_is_durable_is_found_again_with_its_recency_and_sessions(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        await node.start()
        for number in range(10):
            await node.engine.save(chain(f"c{number}", 6), session_id=f"s{number}")
        await node.flush()
        await node.crash()
        await node.start()
        assert node.store.durability.recovered_blocks == 60
        assert [await node.load(chain(f"c{number}", 6)) for number in range(10)] == [6] * 10
        await node.flush()
        await node.crash()
        await node.start()
        forgotten = node.store.forget_session(node.engine.peer, 1, "s3")
        assert forgotten.dropped == 6
        await node.stop()
        await node.start()
        assert [await node.load(chain(f"c{number}", 6)) for number in range(10)] == [6, 6, 6, 0, 6, 6, 6, 6, 6, 6]
        await node.stop()

    asyncio.run(scenario())


def test_with_admission_of_what_is_reused_the_rest_is_never_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, nvme_admission="reused")
        await node.start()
        index = node.engine.namespace.index
        for name in ("once", "twice"):
            await node.engine.save(chain(name, 6))
        await node.flush()
        assert (index.extent == NO_EXTENT).all(), "nobody has used them again"
        assert await node.load(chain("twice", 4)) == 4
        await node.flush()
        assert np.count_nonzero(index.extent != NO_EXTENT) == 4
        for number in range(3):  # through 16 slots: what is in DRAM only leaves the store
            await node.engine.save(chain(f"c{number}", 6))
        assert [await node.load(chain(name, 6)) for name in ("once", "twice")] == [0, 4]
        await node.flush()
        await node.crash()
        await node.start()
        assert [await node.load(chain(name, 6)) for name in ("c2", "twice")] == [0, 4]
        await node.stop()

    asyncio.run(scenario())


def test_what_was_reused_while_the_disk_was_offline_is_written_when_it_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, nvme_admission="reused") as node:
            node.store.disks.disks[0].health.fail("the test says so")
            for name in ("once", "twice"):
                await node.engine.save(chain(name, 6))
            assert await node.load(chain("twice", 6)) == 6
            node.store.disks.disks[0].health.come_back()
            node.store.write_behind.submit_missing(node.engine.namespace)
            await node.flush()
            assert np.count_nonzero(node.engine.namespace.index.extent != NO_EXTENT) == 6

    asyncio.run(scenario())


@pytest.mark.parametrize("folds", [False, True])
def test_a_forgotten_session_does_not_come_back_to_keep_what_another_leaves(tmp_path: Path, *, folds: bool) -> None:
    """The first session's end lies in what the second uses too: forgetting it drops no block, only its end."""

    async def scenario() -> None:
        node = Node(tmp_path)
        await node.start()
        blocks = chain("shared", 6)
        await node.engine.save(blocks[:4], session_id="first")
        await node.flush()
        await node.engine.save(blocks, session_id="second")
        await node.flush()
        assert node.store.forget_session(node.engine.peer, 1, "first").dropped == 0
        await node.flush()
        if folds:
            node.store.disks.disks[0].volume.journal.fold()
        await node.crash()
        await node.start()
        assert len(node.engine.namespace.sessions) == 1
        assert node.store.forget_session(node.engine.peer, 1, "second").dropped == 6
        # A session of that name that begins later is another one.
        await node.engine.save(blocks, session_id="first")
        await node.stop()
        await node.start()
        assert len(node.engine.namespace.sessions) == 1
        assert node.store.forget_session(node.engine.peer, 1, "first").dropped == 6
        await node.stop()

    asyncio.run(scenario())


def test_a_block_damaged_on_disk_is_a_miss_with_a_reason_and_the_rest_is_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        await node.start()
        await node.engine.save(chain("a", 5))
        await node.engine.save(chain("b", 5))
        await node.stop()
        segment = next((tmp_path / "segments").iterdir())
        content = bytearray(segment.read_bytes())
        at = content.index(content_of(chain("a", 5)[2]))
        content[at + 7] ^= 1
        segment.write_bytes(content)
        await node.start()
        assert await node.load(chain("a", 5)) == 2
        assert await node.load(chain("b", 5)) == 5
        spec = spec_of()
        found = explain(node.store.namespaces.values(), spec.key.tenant, chain("a", 5)[2], b"", node.clock())
        assert found[0].finding.reason is DropReason.CORRUPT  # type: ignore[union-attr]
        await node.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("damaged", ["index/*", "namespaces*", "segments/*"])
def test_an_index_that_is_lost_costs_the_blocks_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    async def scenario() -> None:
        for _ in range(2):
            async with running(tmp_path) as node:
                await node.engine.save(chain("a", 5))
        assert "nvme_index_damaged" not in caplog.messages
        overwrite(tmp_path, damaged)
        async with running(tmp_path) as node:
            assert caplog.messages.count("nvme_index_damaged") == 1
            assert await node.load(chain("a", 5)) == 0
            await node.engine.save(chain("a", 5))
        async with running(tmp_path) as node:
            assert await node.load(chain("a", 5)) == 5

    asyncio.run(scenario())


def test_blocks_leave_dram_for_nvme_and_come_back_inclusive(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as node:
            for number in range(8):  # 48 blocks through 16 slots
                await node.engine.save(chain(f"c{number}", 6))
                await node.flush()
            looked = node.engine.lookup(chain("c0", 6))
            assert (looked.hit_blocks, looked.dram_blocks) == (6, 0)
            written = node.store.disks.disks[0].volume.written_bytes
            assert await node.load(chain("c0", 6)) == 6
            finding = explain(
                node.store.namespaces.values(), spec_of().key.tenant, chain("c0", 1)[0], b"", node.clock()
            )[0].finding
            assert isinstance(finding, Held)
            assert [tier.value for tier in finding.tiers] == ["dram", "nvme"]
            for number in range(1, 8):
                assert await node.load(chain(f"c{number}", 6)) == 6
            assert node.store.disks.disks[0].volume.written_bytes == written, "demoting again wrote again"

    asyncio.run(scenario())


def test_an_offline_disk_is_misses_with_a_reason_while_dram_serves(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as node:
            for number in range(4):
                await node.engine.save(chain(f"c{number}", 6))
                await node.flush()
            node.store.disks.disks[0].health.fail("the test says so")
            granted = await node.get(chain("c0", 6))
            assert (len(granted.slots), granted.miss) == (0, Miss.TIER_OFFLINE)
            assert node.engine.lookup(chain("c0", 6)).miss is Miss.TIER_OFFLINE
            assert await node.load(chain("c3", 6)) == 6
            assert node.store.tiers()[1][1].state.startswith("offline")
            node.store.disks.disks[0].health.come_back()
            assert await node.load(chain("c0", 6)) == 6

    asyncio.run(scenario())


def test_what_is_committed_while_the_disk_recovers_becomes_durable_afterwards(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        await node.start()
        await node.engine.save(chain("old", 4), session_id="old")
        await node.stop()
        await node.start(recover=False)
        await node.engine.save(chain("new", 4), session_id="new")
        assert await node.load(chain("old", 4)) == 0, "not recovered yet"
        await node.engine.save(chain("old", 2))
        await node.store.durability.recover()
        node.store.check()
        assert [await node.load(chain(name, 4)) for name in ("old", "new")] == [4, 4]
        await node.flush()
        await node.crash()
        await node.start()
        assert [await node.load(chain(name, 4)) for name in ("old", "new")] == [4, 4]
        await node.stop()

    asyncio.run(scenario())


def test_a_directory_has_one_daemon(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path):
            other = Node(tmp_path)
            with pytest.raises(Exception, match="another process uses"):
                await other.start()
            other.store.close()

    asyncio.run(scenario())


def test_the_disk_keeps_to_its_bound(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as node:
            for number in range(700):  # more than 32 MiB of extents
                await node.engine.save(chain(f"c{number}", 8))
                if number % 50 == 0:
                    await node.flush()
                    assert disk_bytes(tmp_path) <= 32 * MIB
            await node.flush()
            assert await node.load(chain("c699", 8)) == 8
            assert node.engine.lookup(chain("c0", 8)).hit_blocks == 0, "the coldest left"

    asyncio.run(scenario())
