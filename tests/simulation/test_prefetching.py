"""Prefetch: nobody waits for it, a Get joins it, and what a request no longer needs is not read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvservice.store import promotion
from kvservice.store.arrivals import Landing
from kvservice.store.outcomes import Granted, Miss, Prefetched
from kvservice.transfers import Priority, Turns
from tests.faulty_files import FaultyFiles
from tests.nodes import Node, running
from tests.stores import PAGE_BYTES, chain, until

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

THREADS = 3  # a queue depth of one, and two that verify meanwhile
KNOBS: dict[str, Any] = {"nvme_queue_depth": 1, "dram_bytes": 32 * PAGE_BYTES}


@pytest.fixture
def files(files: FaultyFiles, monkeypatch: pytest.MonkeyPatch) -> FaultyFiles:
    """Files behind a gate; every block is a transfer of its own."""
    monkeypatch.setattr(promotion, "_TRANSFER_BYTES_MAX", 1)
    return files


async def fill(node: Node) -> None:
    """Eight chains of six blocks through DRAM for 32: the first are on NVMe only."""
    for number in range(8):
        await node.engine.save(chain(f"c{number}", 6))
        await node.flush()
    assert node.engine.lookup(chain("c0", 6)).dram_blocks == 0


def prefetch(node: Node, name: str, request_id: str = "") -> Prefetched:
    return node.store.prefetch(node.engine.peer, 1, b"".join(chain(name, 6)), request_id)


async def landings(granted: Granted) -> list[Landing]:
    return [
        (await asyncio.wait_for(arrival.landed, 10))[granted.rows[position]]
        for position, arrival in sorted(granted.pending.items())
    ]


def test_it_answers_while_the_disk_stands_still_and_the_blocks_come_later(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files, **KNOBS) as node:
            await fill(node)
            files.gate.clear()
            assert (prefetch(node, "c0").started_blocks, prefetch(node, "c0").started_blocks) == (6, 0), "read once"
            files.gate.set()
            await node.quiet()
            assert node.engine.lookup(chain("c0", 6)).dram_blocks == 6
            node.store.check()

    asyncio.run(scenario())


def test_what_does_not_fit_into_dram_is_over_the_limit_and_nothing_leased_leaves(
    tmp_path: Path, files: FaultyFiles
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files, **KNOBS) as node:
            await fill(node)
            held = [await node.get(chain(f"c{number}", 6)) for number in range(3, 8)]  # 30 of 32 slots
            prefetched = prefetch(node, "c0")
            assert (prefetched.started_blocks, prefetched.missed, prefetched.miss) == (2, 4, Miss.OVER_LIMIT)
            await node.quiet()
            for granted in held:
                node.store.release(node.engine.peer, [granted.hold_id])

    asyncio.run(scenario())


@pytest.mark.parametrize("leaves", [False, True], ids=["released", "detached"])
def test_the_end_of_a_request_cancels_what_it_prefetched_and_has_not_begun(
    tmp_path: Path, files: FaultyFiles, *, leaves: bool
) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files, **KNOBS) as node:
            await fill(node)
            free = node.engine.namespace.pool.free_slots
            files.gate.clear()
            files.calls.clear()
            prefetch(node, "c0", "request 1")
            prefetch(node, "c1", "request 2")
            await until(lambda: files.waiting > 0)
            if leaves:
                node.store.detach(node.engine.peer)
            else:
                node.store.release(node.engine.peer, [], "request 1")
            files.gate.set()
            await node.quiet()
            assert files.calls.count("read") == THREADS + (0 if leaves else 6)
            if not leaves:
                assert node.engine.lookup(chain("c0", 6)).dram_blocks == THREADS, "the rest was not read"
                assert node.engine.lookup(chain("c1", 6)).dram_blocks == 6, "another request's went on"
                assert node.engine.namespace.pool.free_slots == free + 6 - THREADS, "nor does it hold memory"
            node.store.check()

    asyncio.run(scenario())


def test_a_get_that_joined_keeps_the_blocks_coming(tmp_path: Path, files: FaultyFiles) -> None:
    async def scenario() -> None:
        async with running(tmp_path, files=files, **KNOBS) as node:
            await fill(node)
            files.gate.clear()
            files.calls.clear()
            prefetch(node, "c0", "request 1")
            granted = await node.get(chain("c0", 6))
            again = await node.get(chain("c0", 6))
            node.store.release(node.engine.peer, [], "request 1")
            files.gate.set()
            assert await landings(granted) == await landings(again) == [Landing.OK] * 6
            assert files.calls.count("read") == 6, "three wanted them, each was read once"
            for hold in (granted, again):
                node.store.release(node.engine.peer, [hold.hold_id])
            node.store.check()

    asyncio.run(scenario())


def test_blocks_become_durable_while_more_is_prefetched_than_the_disk_can_read(
    tmp_path: Path, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else DRAM fills with blocks that wait to be written, and they are lost when room is needed."""
    started: list[Priority] = []  # in the order of the queue; threads may end in another one

    def take(turns: Turns[Any]) -> Any:
        transfer = take_of(turns)
        started.append(transfer.priority)
        return transfer

    take_of = Turns.take
    monkeypatch.setattr(Turns, "take", take)

    async def scenario() -> None:
        async with running(tmp_path, files=files, **KNOBS) as node:
            await fill(node)
            files.gate.clear()
            for number in range(3):
                prefetch(node, f"c{number}")
            await node.engine.save(chain("new", 2))
            depths = node.store.disks.disks[0].transfers.depths
            await until(lambda: depths()[Priority.WRITE].waiting > 0)
            started.clear()
            files.gate.set()
            await node.quiet()
            assert started.count(Priority.PREFETCH) == 18 - THREADS
            assert started.index(Priority.WRITE) == 2, "two blocks are read for the two that are written"
            node.store.check()

    asyncio.run(scenario())
