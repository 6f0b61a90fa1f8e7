"""Who may have how much of the disk: quotas, fair shares, time to live, and what was forgotten; across restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvservice.blocks import NO_EXTENT, NO_SLOT, DropReason
from kvservice.config import NamespaceRule
from kvservice.nvme.format import extent_stride_bytes
from kvservice.store import Namespace, explain
from kvservice.store.outcomes import Dropped
from tests.nodes import MIB, Node, running
from tests.stores import BLOCK_BYTES, PAGE_BYTES, chain, spec_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

EXTENT_BYTES = extent_stride_bytes(BLOCK_BYTES)
SEGMENT_EXTENTS = (MIB - 2 * 4096) // EXTENT_BYTES
SEGMENT_BYTES = 2 * 4096 + SEGMENT_EXTENTS * EXTENT_BYTES
JOURNAL_BYTES = 4 * MIB


def on_nvme(namespace: Namespace) -> int:
    return int((namespace.index.extent != NO_EXTENT).sum())


def reason_of(node: Node, block_hash: bytes) -> DropReason:
    namespaces = node.store.namespaces.values()
    finding = explain(namespaces, spec_of().key.tenant, block_hash, b"", node.clock())[0].finding
    assert isinstance(finding, Dropped), finding
    return finding.reason


async def fill(node: Node, label: str, chains: int, *, blocks: int = 8) -> None:
    """Save many chains through the small DRAM, each durable before the next."""
    engine = node.engine_of(label)
    for number in range(chains):
        await engine.save(chain(f"{label}{number}", blocks))
        node.advance(1.0)
        await node.flush()


def test_a_namespace_keeps_to_its_quota_and_its_coldest_blocks_leave(tmp_path: Path) -> None:
    async def scenario() -> None:
        rules = {"small": NamespaceRule(nvme_quota_bytes=40 * EXTENT_BYTES)}
        specs = [spec_of("small"), spec_of("large")]
        async with running(tmp_path, specs=specs, namespaces=rules) as node:
            await fill(node, "small", 12)
            await fill(node, "large", 12)
            small, large = (node.engine_of(label).namespace for label in ("small", "large"))
            assert on_nvme(small) == 40
            assert on_nvme(large) == 96
            assert node.engine_of("small").lookup(chain("small0", 8)).hit_blocks == 0
            assert node.engine_of("small").lookup(chain("small11", 8)).hit_blocks == 8
            assert reason_of(node, chain("small0", 1)[0]) is DropReason.QUOTA
            node.store.check()

    asyncio.run(scenario())


def test_a_batch_larger_than_the_quota_is_written_as_far_as_it_fits_its_front_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, nvme_quota_bytes=5 * EXTENT_BYTES)
        await node.start()
        await node.engine.save(chain("a", 12))
        await node.stop()
        await node.start()
        assert await node.load(chain("a", 12)) == 5
        await node.stop()

    asyncio.run(scenario())


def test_of_a_batch_larger_than_the_quota_the_chain_that_was_used_last_is_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, nvme_quota_bytes=5 * EXTENT_BYTES, nvme_write_behind_s=600.0)
        await node.start()
        for name in ("older", "newer"):
            node.advance(1.0)
            await node.engine.save(chain(name, 5))
        await node.store.write_behind.write_batch()  # both in one
        await node.stop()
        await node.start()
        assert [await node.load(chain(name, 5)) for name in ("older", "newer")] == [0, 5]
        await node.stop()

    asyncio.run(scenario())


def test_a_quota_lowered_for_a_restart_is_reached_in_slices(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as node:
            await fill(node, "model", 12)
            assert on_nvme(node.engine.namespace) == 96
        async with running(tmp_path, nvme_quota_bytes=20 * EXTENT_BYTES) as node:
            await node.store.upkeep()
            assert on_nvme(node.engine.namespace) == 20
            assert node.engine.lookup(chain("model11", 8)).hit_blocks == 8, "the warmest stay"

    asyncio.run(scenario())


def test_a_full_disk_is_shared_and_nobody_who_has_less_gives(tmp_path: Path) -> None:
    async def scenario() -> None:
        specs = [spec_of("first"), spec_of("second"), spec_of("third")]
        capacity = JOURNAL_BYTES + 6 * SEGMENT_BYTES
        knobs: dict[str, Any] = {"nvme_bytes": capacity, "dram_bytes": 48 * PAGE_BYTES}
        async with running(tmp_path, specs=specs, **knobs) as node:
            await fill(node, "first", 2 + 6 * SEGMENT_EXTENTS // 8)
            volume = node.store.disks.disks[0].volume
            owned = [len(volume.segments_of(spec)) for spec in specs]
            assert owned == [6, 0, 0], "alone, it may have all"
            await fill(node, "second", 1 + 4 * SEGMENT_EXTENTS // 8)
            assert [len(volume.segments_of(spec)) for spec in specs] == [3, 3, 0]
            await fill(node, "third", 1 + 3 * SEGMENT_EXTENTS // 8)
            assert [len(volume.segments_of(spec)) for spec in specs] == [2, 2, 2]
            await fill(node, "first", 4)
            assert [len(volume.segments_of(spec)) for spec in specs] == [2, 2, 2], "shares that are equal stay"
            assert reason_of(node, chain("first9", 8)[7]) is DropReason.RECLAIMED
            for label in ("second", "third"):
                newest = 4 * SEGMENT_EXTENTS // 8 if label == "second" else 3 * SEGMENT_EXTENTS // 8
                assert await node.load(chain(f"{label}{newest}", 8), engine=node.engine_of(label)) == 8
            node.store.check()
        async with running(tmp_path, specs=specs, **knobs) as node:
            volume = node.store.disks.disks[0].volume
            assert [len(volume.segments_of(spec)) for spec in specs] == [2, 2, 2]

    asyncio.run(scenario())


def test_blocks_in_dram_outlive_the_segment_that_is_taken_from_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        specs = [spec_of("first"), spec_of("second")]
        knobs: dict[str, Any] = {
            "nvme_bytes": JOURNAL_BYTES + 2 * SEGMENT_BYTES,
            "dram_bytes": 3 * MIB,
            "dram_segment_bytes": MIB,
        }
        async with running(tmp_path, specs=specs, **knobs) as node:
            await fill(node, "first", 2 * SEGMENT_EXTENTS // 8)
            first = node.engine_of("first").namespace
            assert int((first.index.slot != NO_SLOT).sum()) == on_nvme(first), "all of it is in both tiers"
            await fill(node, "second", 1)
            assert on_nvme(first) <= SEGMENT_EXTENTS
            for number in range(2 * SEGMENT_EXTENTS // 8):
                assert await node.load(chain(f"first{number}", 8), engine=node.engine_of("first")) == 8
            node.store.check()

    asyncio.run(scenario())


def test_the_newest_block_is_durable_even_while_everything_on_disk_is_in_dram_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, nvme_quota_bytes=8 * EXTENT_BYTES)
        await node.start()
        await fill(node, "model", 2)  # 16 blocks fit into DRAM, 8 on disk
        await node.crash()
        await node.start()
        assert await node.load(chain("model1", 8)) == 8, "the coldest copy made room for the newest block"
        assert await node.load(chain("model0", 8)) == 0
        await node.stop()

    asyncio.run(scenario())


def test_the_time_to_live_counts_from_the_last_use_also_across_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, ttl_s=100.0)
        await node.start()
        for name in ("used", "unused"):
            await node.engine.save(chain(name, 4))
        await node.flush()
        node.advance(80.0)
        assert await node.load(chain("used", 4)) == 4
        await node.stop()
        node.advance(30.0)
        await node.start()
        await node.store.upkeep()
        assert await node.load(chain("unused", 4)) == 0
        assert reason_of(node, chain("unused", 4)[0]) is DropReason.EXPIRED
        assert await node.load(chain("used", 4)) == 4
        assert on_nvme(node.engine.namespace) == 4, "what expired left the disk as well"
        await node.stop()

    asyncio.run(scenario())


def test_a_wall_clock_set_back_makes_nothing_immortal(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, ttl_s=100.0)
        await node.start()
        await node.engine.save(chain("a", 2))
        await node.stop()
        node.wall_clock.advance(-1e6)
        await node.start()
        node.advance(101.0)
        await node.store.upkeep()
        assert await node.load(chain("a", 2)) == 0
        await node.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("whole", [False, True], ids=["session", "namespace"])
def test_what_was_forgotten_is_gone_from_both_tiers_and_its_extents_are_used_again(
    tmp_path: Path, *, whole: bool
) -> None:
    async def scenario() -> None:
        assert SEGMENT_EXTENTS == 127
        node = Node(tmp_path, nvme_bytes=JOURNAL_BYTES + SEGMENT_BYTES)
        await node.start()
        for number in range(15):  # 120 blocks through 16 slots: most are on NVMe only
            await node.engine.save(chain(f"c{number}", 8), session_id=f"s{number}")
            await node.flush()
        volume = node.store.disks.disks[0].volume
        if whole:
            assert node.store.forget_namespace(node.engine.peer, 1).dropped == 120
        else:
            assert node.store.forget_session(node.engine.peer, 1, "s0").dropped == 8
        await node.store.durability.record()
        assert volume.usage().used_bytes == (0 if whole else 112) * EXTENT_BYTES
        await node.crash()  # nothing but what `record` made durable
        await node.start()
        left = [0 if whole else 8] * 14
        assert [await node.load(chain(f"c{number}", 8)) for number in range(15)] == [0, *left]
        await node.engine.save(chain("new", 15))  # seven extents were never used
        await node.flush()
        assert [await node.load(chain(f"c{number}", 8)) for number in range(15)] == [0, *left]
        assert await node.load(chain("new", 15)) == 15
        await node.stop()

    asyncio.run(scenario())


def test_what_was_forgotten_while_the_disk_was_offline_for_long_stays_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvservice.store.journal._PENDING_MAX", 20)

    async def scenario() -> None:
        node = Node(tmp_path)
        await node.start()
        for number in range(2):
            await node.engine.save(chain(f"c{number}", 6), session_id=f"s{number}")
        await node.flush()
        disk = node.store.disks.disks[0]
        disk.health.fail("the test says so")
        assert node.store.forget_session(node.engine.peer, 1, "s0").dropped == 6
        for _ in range(100):
            assert await node.load(chain("c1", 6)) == 6
        disk.health.come_back()
        await node.store.durability.record()
        await node.crash()
        await node.start()
        assert [await node.load(chain(f"c{number}", 6)) for number in range(2)] == [0, 6]
        await node.stop()

    asyncio.run(scenario())
