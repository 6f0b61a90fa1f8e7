"""A disk that fails, fills up, hangs or goes away: its blocks are misses with a reason, DRAM serves, it comes back."""

from __future__ import annotations

import asyncio
import errno
import shutil
from pathlib import Path

import pytest

from kvservice.blocks import NO_EXTENT, DropReason, Tier
from kvservice.nvme import Throttle
from kvservice.service import getting
from kvservice.store import disk_health, explain
from kvservice.store.arrivals import Landing
from kvservice.store.disk_health import DiskState
from kvservice.store.outcomes import Dropped, Finding, Miss, Offline
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.faulty_files import INDEX, FaultyFiles
from tests.nodes import Node, running
from tests.stores import chain, spec_of, until

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.fixture
def probing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes at every round."""
    monkeypatch.setattr(disk_health, "_PROBE_INTERVAL_S", 0.0)


@pytest.fixture
def impatient(probing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides, a second of patience with an access: a busy machine may take that long, so for what hangs only."""
    monkeypatch.setattr(disk_health, "_SLOW_FACTOR", 0.0)
    monkeypatch.setattr(disk_health, "_SLOW_S_MIN", 1.0)
    monkeypatch.setattr(disk_health, "_STALLED_S", 1.0)


def state(node: Node) -> DiskState:
    return node.store.disks.disks[0].health.state


def finding(node: Node, block_hash: bytes) -> Finding:
    store = node.store
    return explain(
        store.namespaces.values(),
        spec_of().key.tenant,
        block_hash,
        b"",
        node.clock(),
        why_unreadable=store.disks.why_unreadable,
    )[0].finding


async def save_many(node: Node, chains: int = 4) -> None:
    """Save 6 blocks each, durable; all but the last two chains are on NVMe only."""
    for number in range(chains):
        await node.engine.save(chain(f"c{number}", 6))
        await node.flush()


async def keep_up_until(node: Node, wanted: DiskState) -> None:
    for _ in range(1000):
        await node.store.durability.keep_up()
        if state(node) is wanted:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"the disk is {state(node)}, not {wanted}")


@pytest.mark.usefixtures("probing")
@pytest.mark.parametrize("call", ["write", "flush", "allocate"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
def test_a_disk_that_cannot_be_written_is_read_only_until_it_can(
    tmp_path: Path, files: FaultyFiles, caplog: pytest.LogCaptureFixture, call: str, number: int
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, files=files)
        await node.start()
        await save_many(node)
        if call == "allocate":  # happens with the next segment only
            await node.engine.save(chain("long", 10))
            await node.flush()
            for _ in range(20):
                node.store.disks.disks[0].volume.reserve(spec_of(), 5)
        files.errors[call] = number
        for name in ("new", "newer"):
            await node.engine.save(chain(name, 6))
            await node.store.write_behind.flush(asyncio.get_running_loop().time() + 10)
        await node.quiet()
        assert state(node) is DiskState.READ_ONLY
        assert node.store.tiers()[1][1].state.startswith("read-only: ")
        assert await node.load(chain("c0", 6)) == 6, "what is on it can be read"
        assert await node.load(chain("newer", 6)) == 6, "DRAM serves"
        assert [record.message for record in caplog.records].count("nvme_read_only") == 1
        files.errors.clear()
        await keep_up_until(node, DiskState.ONLINE)
        await node.flush()
        await node.crash()
        await node.start()
        assert await node.load(chain("newer", 6)) == 6, "what waited was written afterwards"
        await node.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("probing")
def test_a_disk_with_no_room_for_its_index_is_read_only_at_once_and_keeps_what_it_has(
    tmp_path: Path, files: FaultyFiles
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, files=files)
        await node.start()
        files.kind, files.errors["write"] = INDEX, errno.ENOSPC
        await node.engine.save(chain("a", 6))
        await node.store.write_behind.flush(asyncio.get_running_loop().time() + 10)
        assert state(node) is DiskState.READ_ONLY, "before anybody looks after it"
        given_up = next(iter(node.store.metrics.nvme_given_up_blocks.collect())).samples[0].value
        assert given_up == 0, "its blocks are on it"
        files.errors.clear()
        await keep_up_until(node, DiskState.ONLINE)
        await node.flush()
        await node.crash()
        await node.start()
        assert await node.load(chain("a", 6)) == 6, "what the index missed was told to it afterwards"
        await node.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("probing")
def test_a_disk_that_cannot_be_read_is_offline_until_it_can(
    tmp_path: Path, files: FaultyFiles, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files) as node:
            await save_many(node)
            files.errors["read"] = errno.EIO
            assert await node.load(chain("c0", 6)) == 0
            assert state(node) is DiskState.OFFLINE
            assert (await node.get(chain("c0", 6))).miss is Miss.TIER_OFFLINE
            found = finding(node, chain("c0", 6)[0])
            assert isinstance(found, Offline)
            assert found.tier is Tier.NVME
            assert "Input/output error" in found.why
            assert await node.load(chain("c3", 6)) == 6, "DRAM serves"
            assert [record.message for record in caplog.records].count("nvme_offline") == 1
            files.errors.clear()
            await keep_up_until(node, DiskState.ONLINE)
            assert await node.load(chain("c0", 6)) == 6, "nothing was lost"

    asyncio.run(scenario())


def test_a_disk_that_is_held_back_is_not_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_health, "_SLOW_FACTOR", 0.0)  # two seconds are too long whatever was usual

    async def scenario() -> None:
        async with running(tmp_path) as node:
            await save_many(node)
            node.store.disks.disks[0].throttle = Throttle(8 * 1024)  # 20 KiB in one transfer: 2.5 s
            assert await node.load(chain("c0", 6)) == 6
            assert state(node) is DiskState.ONLINE

    asyncio.run(scenario())


@pytest.mark.usefixtures("probing")
def test_a_block_that_can_never_be_read_does_not_take_the_disk_down_for_ever(
    tmp_path: Path, files: FaultyFiles
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files) as node:
            await save_many(node)
            for _ in range(2):
                files.errors["read"] = errno.EIO
                assert await node.load(chain("c0", 1)) == 0
                files.errors.clear()
                await keep_up_until(node, DiskState.ONLINE)
            found = finding(node, chain("c0", 1)[0])
            assert isinstance(found, Dropped)
            assert found.reason is DropReason.CORRUPT
            assert (await node.get(chain("c0", 1))).miss is Miss.NOT_HELD

    asyncio.run(scenario())


@pytest.mark.usefixtures("impatient")
def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files, dram_bytes=32 * 4096) as node:
            await save_many(node, 8)
            files.gate.clear()
            granted = await node.get(chain("c0", 6))
            assert len(granted.pending) == 6
            await until(lambda: files.waiting > 0)
            await keep_up_until(node, DiskState.OFFLINE)
            for position, arrival in granted.pending.items():
                landed = await asyncio.wait_for(arrival.landed, 5)
                assert landed[granted.rows[position]] is Landing.TIER_OFFLINE
            node.store.release(node.engine.peer, [granted.hold_id])
            assert await node.load(chain("c7", 6)) == 6, "DRAM serves"
            await node.engine.save(chain("new", 6))
            assert await node.load(chain("new", 6)) == 6
            node.store.check()
            assert files.waiting > 0, "it hangs still"
            files.gate.set()
            await node.quiet()
            await keep_up_until(node, DiskState.ONLINE)
            assert await node.load(chain("c0", 6)) == 6
            node.store.check()

    asyncio.run(scenario())


@pytest.mark.usefixtures("probing")
@pytest.mark.parametrize("with_contents", [False, True], ids=["emptied", "another store"])
def test_a_directory_that_goes_and_comes_again_is_used_again(
    tmp_path: Path, files: FaultyFiles, *, with_contents: bool
) -> None:
    directory, other = tmp_path / "nvme", tmp_path / "other"

    async def scenario() -> None:
        if with_contents:
            async with running(other) as node:
                await node.engine.save(chain("theirs", 6))
        node = Node(directory, files=files)
        await node.start()
        await save_many(node)
        shutil.rmtree(directory)
        await keep_up_until(node, DiskState.OFFLINE)
        assert "the directory is gone" in node.store.tiers()[1][1].state
        assert await node.load(chain("c0", 6)) == 0
        assert await node.load(chain("c3", 6)) == 6, "DRAM serves"
        await node.store.durability.keep_up()
        assert not directory.exists(), "nobody makes it again: a mount may be missing"
        if with_contents:
            other.rename(directory)
        else:
            directory.mkdir()
        await keep_up_until(node, DiskState.ONLINE)
        node.store.check()
        assert await node.load(chain("theirs", 6)) == (6 if with_contents else 0)
        assert await node.load(chain("c0", 6)) == 0, "it was lost with the directory"
        await node.engine.save(chain("new", 6))
        await node.flush()
        await node.crash()
        await node.start()
        assert await node.load(chain("new", 6)) == 6
        assert await node.load(chain("theirs", 6)) == (6 if with_contents else 0)
        await node.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("probing")
def test_one_of_two_disks_begins_anew_and_the_other_loses_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"

    async def scenario() -> None:
        node = Node(Path(f"{first}:{second}"))
        await node.start()
        await save_many(node, 8)
        on_second = node.store.disks.disks[1].volume.usage().used_bytes
        assert on_second > 0
        shutil.rmtree(first)
        first.mkdir()
        lost = node.store.disks.disks[0].volume
        while node.store.disks.disks[0].volume is lost:
            await node.store.durability.keep_up()
        assert state(node) is DiskState.ONLINE
        node.store.check()
        assert node.store.disks.disks[0].volume.usage().used_bytes < on_second
        index = node.engine.namespace.index
        assert (index.extent[index.extent != NO_EXTENT] >> 56 == 1).any()
        await node.engine.save(chain("new", 6))
        await node.stop()

    asyncio.run(scenario())


@pytest.mark.usefixtures("probing")
def test_what_one_disk_took_while_another_was_recovered_stays(tmp_path: Path, files: FaultyFiles) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"

    async def scenario() -> None:
        async with running(other) as node:
            await node.engine.save(chain("theirs", 6))
        async with running(Path(f"{first}:{second}"), files=files) as node:
            index = node.engine.namespace.index
            shutil.rmtree(first)
            await keep_up_until(node, DiskState.OFFLINE)
            other.rename(first)
            files.kind = INDEX
            files.gate.clear()
            recovering = asyncio.create_task(keep_up_until(node, DiskState.ONLINE))
            await until(lambda: files.waiting > 0)
            await node.engine.save(chain("new", 6))
            await until(lambda: bool((index.extent != NO_EXTENT).any()))
            files.gate.set()
            await recovering
            await node.flush()
            node.store.check()
            assert node.engine.lookup(chain("theirs", 6)).hit_blocks == 0, "an index in use is not exchanged"
            for number in range(3):  # through 16 slots: "new" leaves DRAM
                await node.engine.save(chain(f"c{number}", 6))
                await node.flush()
            assert await node.load(chain("new", 6)) == 6
            node.store.check()

    asyncio.run(scenario())


@pytest.mark.usefixtures("probing")
def test_a_recovery_that_failed_is_tried_again(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, files=files)
        await node.start()
        await save_many(node)
        await node.stop()
        files.kind, files.errors["read"] = INDEX, errno.EIO
        await node.start()
        assert state(node) is DiskState.OFFLINE
        await node.engine.save(chain("meanwhile", 4))
        await node.store.durability.keep_up()
        assert state(node) is DiskState.OFFLINE
        files.errors.clear()
        await keep_up_until(node, DiskState.ONLINE)
        node.store.check()
        assert await node.load(chain("c0", 6)) == 6
        assert await node.load(chain("meanwhile", 4)) == 4
        await node.stop()

    asyncio.run(scenario())


def test_a_get_waits_no_longer_than_it_may_and_hands_out_what_came(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files) as node:
            await save_many(node)
            await node.load(chain("c0", 2))  # in DRAM; the other four are on NVMe
            files.gate.clear()
            granted = await node.get(chain("c0", 6))
            messages = [message async for message in getting.responses(granted, wait_s=0.1)]
            handed_out = sum(run.blocks for message in messages for run in message.runs if run.HasField("handles"))
            assert handed_out == 2
            assert [(run.blocks, run.miss) for run in messages[-1].runs] == [(4, pb.MISS_REASON_OVER_LIMIT)]
            files.gate.set()
            node.store.release(node.engine.peer, [granted.hold_id])
            await node.quiet()
            assert node.engine.lookup(chain("c0", 6)).dram_blocks == 6, "it came all the same, for the next Get"

    asyncio.run(scenario())
