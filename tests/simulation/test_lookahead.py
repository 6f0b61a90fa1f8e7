"""What waits is fetched in the queue's order, and no longer than it waits: on a disk that a test holds still."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import Counter

from kvservice.blocks import NO_SLOT, BlockHash
from kvservice.queues import Entry, QueueDelta, QueueSnapshot, QueueUpdate
from kvservice.store import disks
from tests.faulty_files import FaultyFiles
from tests.nodes import Node
from tests.stores import PAGE_BYTES, chain, until

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

NAMES = "abcde"
BLOCKS = 6
KNOBS: dict[str, Any] = {"nvme_queue_depth": 1, "dram_bytes": 64 * PAGE_BYTES}


@pytest.fixture
def files(files: FaultyFiles, monkeypatch: pytest.MonkeyPatch) -> FaultyFiles:
    """Files behind a gate, of a disk that has begun one read at a time."""
    monkeypatch.setattr(disks, "_VERIFYING_THREADS", 0)
    return files


async def on_nvme(directory: Path, files: FaultyFiles) -> Node:
    """A node that has five chains, all of them on NVMe only. Each is two reads: its first block goes alone."""
    node = Node(directory, files=files, **KNOBS)
    await node.start()
    for name in NAMES:
        await node.engine.save(chain(name, BLOCKS))
        await node.flush()  # or two chains of one batch would lie among each other
    await node.stop()
    await node.start()
    assert in_dram(node) == [0] * len(NAMES)
    files.calls.clear()
    return node


def in_dram(node: Node) -> list[int]:
    """Of each chain, how many blocks are there: those on their way are not."""
    index = node.engine.namespace.index
    rows = [index.rows_of([BlockHash(one) for one in chain(name, BLOCKS)]) for name in NAMES]
    return [int(np.count_nonzero((index.slot[of] != NO_SLOT) & ~index.arriving[of])) for of in rows]


def queue(names: Sequence[str], *, epoch: int) -> QueueSnapshot:
    return QueueSnapshot(epoch, [Entry(name, b"".join(chain(name, BLOCKS))) for name in names])


async def tell(node: Node, change: QueueUpdate) -> None:
    node.store.waiting.update(node.engine.peer, node.engine.namespace, change)
    await node.store.prefetching.round()


async def at_the_gate(node: Node, files: FaultyFiles, *, arrived: Sequence[int] = (0, 0, 0, 0, 0)) -> None:
    """One read has been begun and does not pass the gate; what was read before has arrived."""
    await until(lambda: files.waiting == 1 and in_dram(node) == list(arrived))


def count(counter: Counter) -> float:
    return next(iter(counter.collect())).samples[0].value


def test_a_new_order_of_the_queue_is_the_new_order_of_the_fetches(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        node = await on_nvme(tmp_path, files)
        files.gate.clear()
        await tell(node, queue("abcde", epoch=1))
        await at_the_gate(node, files)  # the first block of a
        await tell(node, queue("edcba", epoch=2))
        files.until_gate["read"] = 1
        files.gate.set()
        await at_the_gate(node, files, arrived=[1, 0, 0, 0, 0])  # the first block of e
        await tell(node, queue("", epoch=3))  # what has not begun is not read
        files.gate.set()
        await node.quiet()
        assert in_dram(node) == [1, 0, 0, 0, 1]
        node.store.check()
        await node.stop()

    asyncio.run(scenario())


def test_what_leaves_the_queue_is_not_read(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        node = await on_nvme(tmp_path, files)
        files.gate.clear()
        await tell(node, queue("abcde", epoch=1))
        await at_the_gate(node, files)
        await tell(node, queue("e", epoch=2))
        files.gate.set()
        await node.quiet()
        assert in_dram(node) == [1, 0, 0, 0, BLOCKS]
        assert files.calls.count("read") == 1 + 2
        assert count(node.store.metrics.prefetches.cancelled) == 4 * BLOCKS - 1
        assert await node.load(chain("c", BLOCKS)) == BLOCKS
        node.store.check()
        await node.stop()

    asyncio.run(scenario())


def test_a_request_that_starts_too_early_waits_for_its_fetch_and_is_counted(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        node = await on_nvme(tmp_path, files)
        files.gate.clear()
        await tell(node, queue("ab", epoch=1))
        await at_the_gate(node, files)
        node.store.waiting.update(node.engine.peer, node.engine.namespace, QueueDelta(1, 1, started=["b"]))
        loading = asyncio.create_task(node.load(chain("b", BLOCKS)))
        await until(lambda: count(node.store.metrics.prefetches.late) == BLOCKS)
        await node.store.prefetching.round()  # nobody waits for it, but somebody loads it
        files.gate.set()
        assert await loading == BLOCKS
        await node.quiet()
        assert count(node.store.metrics.prefetches.request_starts["late"]) == 1
        assert files.calls.count("read") == 4, "each was read once"
        node.store.check()
        await node.stop()

    asyncio.run(scenario())
