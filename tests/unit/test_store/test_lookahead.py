"""The store's side of the waiting queue: windows over what is held, hints, hostile queues, fetches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client import Counter

from kvservice import errors
from kvservice.lookahead import Speeds
from kvservice.queues import Entry, QueueDelta, QueueSnapshot, QueueUpdate, UpdateOutcome
from kvservice.store.prefetching import Prefetching
from tests.nodes import Node, running
from tests.stores import Engine, Workplace, chain, small_config

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def entry(name: str, blocks: int, request_id: str = "") -> Entry:
    return Entry(request_id or name, b"".join(chain(name, blocks)), session_id=name)


def tell(engine: Engine, *entries: Entry, epoch: int = 1) -> UpdateOutcome:
    return update(engine, QueueSnapshot(epoch, entries))


def update(engine: Engine, change: QueueUpdate) -> UpdateOutcome:
    namespace = engine.store.namespace(engine.peer, 1)
    return engine.store.waiting.update(engine.peer, namespace, change).outcome


def looked_ahead(workplace: Workplace) -> None:
    workplace.run(workplace.store.prefetching.round())
    workplace.store.check()


def in_dram(engine: Engine, names: Sequence[str], blocks: int = 4) -> list[int]:
    return [engine.lookup(chain(name, blocks)).dram_blocks for name in names]


def count(counter: Counter) -> float:
    return next(iter(counter.collect())).samples[0].value


# ----------------------------------------------------------------- eviction order


def test_what_the_queue_needs_outlives_what_it_does_not(workplace: Workplace, engine: Engine) -> None:
    for name in "abcd":
        workplace.save(engine, chain(name, 4))
    assert tell(engine, entry("b", 4), entry("a", 6)) is UpdateOutcome.APPLIED
    looked_ahead(workplace)
    workplace.save(engine, chain("new", 8))
    assert in_dram(engine, "abcd") == [4, 4, 0, 0]


def test_blocks_stored_after_the_request_was_told_are_protected_too(workplace: Workplace, engine: Engine) -> None:
    tell(engine, entry("a", 4))
    looked_ahead(workplace)
    workplace.save(engine, chain("a", 2))
    workplace.save(engine, chain("b", 4))
    looked_ahead(workplace)
    workplace.save(engine, chain("c", 14))
    assert in_dram(engine, "ab") == [2, 0]


@pytest.mark.parametrize("ending", ["started", "removed", "snapshot", "detach", "hang up"])
def test_a_request_that_left_protects_nothing(workplace: Workplace, engine: Engine, ending: str) -> None:
    workplace.save(engine, chain("a", 8))
    other = workplace.engine()
    tell(other, entry("a", 8))
    looked_ahead(workplace)
    match ending:
        case "started":
            update(other, QueueDelta(1, 1, started=["a"]))
        case "removed":
            update(other, QueueDelta(1, 1, removed=["a"]))
        case "snapshot":
            tell(other, epoch=2)
        case "detach":
            workplace.store.detach(other.peer)
        case "hang up":
            other.hang_up()
    looked_ahead(workplace)
    assert len(engine.namespace.window) == len(workplace.store.waiting) == 0
    workplace.save(engine, chain("new", 16))
    assert in_dram(engine, "a", 8) == [0]


def test_only_as_much_as_fits_is_exempt(workplace: Workplace, engine: Engine) -> None:
    """16 slots, no disk, requests of four blocks: the window ends with the fourth."""
    for name in "abcd":
        workplace.save(engine, chain(name, 4))
    tell(engine, *(entry(name, 4) for name in "abcdefgh"))
    looked_ahead(workplace)
    ahead = workplace.store.waiting.ahead[engine.namespace]
    assert (ahead.windows.prefetch, ahead.windows.eviction) == (4, 4)
    tell(engine, *(entry(name, 4) for name in "efghabcd"), epoch=2)
    looked_ahead(workplace)
    workplace.save(engine, chain("e", 4))
    assert in_dram(engine, "abcd") != [4, 4, 4, 4], "behind the window's end"


def test_shared_prefixes_count_once_in_the_windows(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4))
    tell(engine, *(entry("a", 4, f"request {number}") for number in range(16)))
    looked_ahead(workplace)
    ahead = workplace.store.waiting.ahead[engine.namespace]
    assert len(ahead.prefetch) == 16, "all sixteen need the same four blocks"


# ------------------------------------------------------------------------ hostile


def test_hostile_queues_do_no_harm(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4))
    a, b = chain("a", 4), chain("b", 4)
    garbage = [
        [*b, *a],  # held blocks behind ones that are not
        [a[1], a[0], a[3], a[2]],
        [a[0]] * 4,
        [a[3]],
        [],
    ]
    entries = [Entry(str(number), b"".join(hashes)) for number, hashes in enumerate(garbage)]
    tell(engine, *entries, Entry("nobody's", b"", session_id="unknown"))
    looked_ahead(workplace)
    workplace.save(engine, chain("c", 12))
    workplace.save(engine, chain("d", 12))
    assert in_dram(engine, "cd", 12)[1] == 12


def test_an_endless_queue_is_refused_and_what_was_told_before_stays() -> None:
    with Workplace(small_config(queue_entries_max=3, queue_blocks_max=10)) as workplace:
        engine = workplace.engine()
        tell(engine, entry("a", 4))
        with workplace.unchanged(), pytest.raises(errors.InvalidRequest, match="queue_entries_max"):
            tell(engine, *(entry(str(number), 1) for number in range(4)), epoch=2)
        with workplace.unchanged(), pytest.raises(errors.InvalidRequest, match="queue_blocks_max"):
            tell(engine, entry("a", 6), entry("b", 6), epoch=2)
        assert workplace.store.waiting.length(engine.peer) == 1


def test_a_queue_needs_an_attached_namespace(workplace: Workplace, engine: Engine) -> None:
    workplace.store.detach(engine.peer)
    with pytest.raises(errors.NamespaceUnknown):
        tell(engine, entry("a", 4))


# -------------------------------------------------------------------------- hints


def test_hints_reach_the_eviction_order_of_known_sessions_only(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 4), session_id="talk")
    told: list[tuple[list[int], float]] = []
    engine.namespace.policy.expect = lambda rows, at_s: told.append((rows.tolist(), at_s))  # type: ignore[method-assign]
    hints = [("talk", 30.0), ("talk", math.inf), ("nobody", 1.0)]
    assert workplace.run(workplace.store.waiting.hint(lambda: engine.namespace, hints)) == 2
    rows = engine.namespace.index.rows_of(chain("a", 4)).tolist()  # type: ignore[arg-type]  # hashes are bytes
    assert told == [(rows, workplace.clock() + 30.0), (rows, math.inf)]


# ------------------------------------------------------------------- with a disk


def test_a_full_dram_makes_room_for_the_window_and_keeps_its_blocks(tmp_path: Path) -> None:
    """The queue's head needs six blocks from NVMe and six that are in DRAM: the other four leave."""

    async def scenario() -> None:
        async with running(tmp_path) as node:
            for name in ("cold", "warm", "idle"):
                await node.engine.save(chain(name, 6 if name != "idle" else 9))
                await node.flush()
            assert in_dram(node.engine, ["cold"], 6) < [6]
            tell(node.engine, entry("cold", 6), entry("warm", 6))
            await until_settled(node)
            assert in_dram(node.engine, ["cold", "warm"], 6) == [6, 6]
            assert node.engine.lookup(chain("idle", 9)).hit_blocks == 9, "on NVMe still"
            update(node.engine, QueueDelta(1, 1, started=["cold"]))
            assert await node.load(chain("cold", 6)) == 6
            metrics = node.store.metrics.prefetches
            assert count(metrics.useful) == count(metrics.started) > 0
            assert count(metrics.request_starts["ready"]) == 1
            node.store.check()

    asyncio.run(scenario())


def test_a_request_that_moves_while_it_is_fetched_still_knows_when_that_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as node:
            for name in ("a", "b", "c"):
                await node.engine.save(chain(name, 8))
                await node.flush()
            tell(node.engine, entry("c", 8), entry("a", 8))
            await node.store.prefetching.round()
            assert node.store.prefetching.in_flight
            tell(node.engine, entry("a", 8), epoch=2)  # with another order
            await node.store.prefetching.round()
            await until_settled(node)
            update(node.engine, QueueDelta(2, 1, started=["a"]))
            leads = next(iter(node.store.metrics.prefetches.lead_seconds.collect())).samples
            assert next(sample.value for sample in leads if sample.name.endswith("_count")) == 1

    asyncio.run(scenario())


def test_a_window_larger_than_dram_does_not_chase_its_tail(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as node:
            names = [f"c{number}" for number in range(6)]
            for name in names:
                await node.engine.save(chain(name, 6))
                await node.flush()
            tell(node.engine, *(entry(name, 6) for name in names))
            async with asyncio.timeout(30):  # slots that a checksum or a write still holds come free a little later
                while in_dram(node.engine, names[:2], 6) != [6, 6]:
                    await until_settled(node)
            started = count(node.store.metrics.prefetches.started)
            for _ in range(20):
                await until_settled(node)
            assert count(node.store.metrics.prefetches.started) == started, "blocks came and went for nothing"

    asyncio.run(scenario())


def test_a_disk_whose_writes_were_slow_is_measured_before_it_is_given_up(tmp_path: Path) -> None:
    """Recomputing on the word of a wrong rate would leave that rate for good: nothing would be read."""

    async def scenario() -> None:
        async with running(tmp_path) as node:
            for number in range(5):
                await node.engine.save(chain(f"c{number}", 6))
                await node.flush()
            store, engine, disk = node.store, node.engine, node.store.disks.disks[0]
            disk.writes.began(1, 0.0)
            disk.writes.ended(1, 1, 1e9)
            speeds = Speeds(prefill_tokens_per_s=0.01)  # a block is computed in half an hour
            planned = store.plan_load(engine.peer, engine.namespace_id, b"".join(chain("c0", 6)), speeds)
            assert planned.plan.blocks == planned.looked.dram_blocks < 6, "on the word of the writes"
            await node.quiet()
            again = store.plan_load(engine.peer, engine.namespace_id, b"".join(chain("c1", 6)), speeds)
            assert again.looked.dram_blocks < again.plan.blocks == 6
            store.check()

    asyncio.run(scenario())


async def until_settled(node: Node) -> None:
    """Rounds until nothing is on its way and a round starts nothing."""
    prefetching: Prefetching = node.store.prefetching
    for _ in range(50):
        await prefetching.round()
        if not prefetching.in_flight:
            return
        await node.quiet()
        await asyncio.sleep(0)
    raise AssertionError("it fetches without end")
