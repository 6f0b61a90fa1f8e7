"""What a drain writes when it has not time for everything: the most valuable first, whole from the front."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvservice.store import write_behind
from tests.faulty_files import FaultyFiles
from tests.nodes import Node
from tests.stores import PAGE_BYTES, chain, until

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

BLOCKS = 6


async def drained(node: Node, files: FaultyFiles, *, writes: int) -> list[int]:
    """Flush until the disk hangs after so many batches, end the daemon then, start again: blocks found, by chain."""
    files.until_gate["write"] = writes
    flush = asyncio.create_task(node.store.write_behind.flush(asyncio.get_running_loop().time() + 60))
    await until(lambda: not files.gate.is_set() and files.waiting > 0)
    assert not flush.done()
    flush.cancel()
    end = asyncio.create_task(node.crash())
    await asyncio.sleep(0)
    files.gate.set()
    await end
    await node.start()
    found = [await node.load(chain(f"c{number}", BLOCKS + 2)) for number in range(5)]
    await node.stop()
    return found


async def warm_up(node: Node) -> None:
    """Have the headers of the first segment written, so that a batch is one write."""
    await node.engine.save(chain("warm", 1))
    await node.flush()


def unhurried(directory: Path, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node that writes nothing by itself, and a chain per batch when it is drained."""
    monkeypatch.setattr(write_behind, "_FLUSH_BATCH_BYTES", BLOCKS * PAGE_BYTES)
    return Node(directory, files=files, dram_bytes=64 * PAGE_BYTES, nvme_write_behind_s=600.0)


async def save_five(node: Node) -> None:
    """Start it and save chains, a second between each and the next."""
    await node.start()
    await warm_up(node)
    for number in range(5):
        node.advance(1.0)
        await node.engine.save(chain(f"c{number}", BLOCKS))
    node.advance(1.0)


def test_what_was_used_last_is_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        files = FaultyFiles()
        node = unhurried(tmp_path, files, monkeypatch)
        await save_five(node)
        assert await node.load(chain("c1", BLOCKS)) == BLOCKS
        assert await drained(node, files, writes=3) == [0, 6, 0, 6, 6]

    asyncio.run(scenario())


def test_a_fresh_end_takes_its_old_front_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        files = FaultyFiles()
        node = unhurried(tmp_path, files, monkeypatch)
        await save_five(node)
        longer = chain("c0", BLOCKS + 2)
        await node.engine.save(longer[BLOCKS:], parent=longer[BLOCKS - 1])
        found = await drained(node, files, writes=2)
        assert found[0] == BLOCKS + 2, "the front of the newest block is as valuable as itself"
        assert found[1:4] == [0, 0, 0]

    asyncio.run(scenario())


def test_a_flush_waits_for_the_batch_under_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        files = FaultyFiles()
        node = Node(tmp_path, files=files)
        await node.start()
        files.gate.clear()
        await node.engine.save(chain("a", BLOCKS))
        await until(lambda: node.store.write_behind.is_busy)
        loop = asyncio.get_running_loop()
        assert not await node.store.write_behind.flush(loop.time() + 0.05), "nothing waits, but nothing is durable yet"
        files.gate.set()
        assert await node.store.write_behind.flush(loop.time() + 10)
        await node.store.journal.append_all()
        await node.crash()
        await node.start()
        assert await node.load(chain("a", BLOCKS)) == BLOCKS
        await node.stop()

    asyncio.run(scenario())
