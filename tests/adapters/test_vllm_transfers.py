"""The vLLM adapter's loads and saves over blocks in host memory: what may be read when, in what order, by how many."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kvservice_client as kv
from kvservice_adapters.vllm.blocks import HostBlocks, HostCopies
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.layout import layout_of
from kvservice_adapters.vllm.orders import LoadOrder, SaveOrder
from kvservice_adapters.vllm.transfers import Loads, Saves
from kvservice_client.memory import ThreadedCopier
from tests.blocks import chain
from tests.daemons import DaemonThread
from tests.waiting import eventually

pytestmark = pytest.mark.integration

ENGINE_BLOCKS = 64
BLOCK_BYTES = 1024


class GatedCopies(HostCopies):
    """Engine blocks whose next read waits until it is let through.

    Attributes:
        gated: the blocks that this is about; None: all.
        reads: what was read, in the order in which that began.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()
        self.gated: set[int] | None = None
        self.begun = threading.Event()
        self.reads: list[tuple[int, ...]] = []

    def read(self, block_ids: Sequence[int], addresses: Sequence[int]) -> None:
        self.reads.append(tuple(block_ids))
        self.begun.set()
        if self.gated is None or self.gated & set(block_ids):
            assert self.gate.wait(30)
        super().read(block_ids, addresses)


class Rig:
    """Saves and loads between a tensor and a real daemon."""

    def __init__(self, daemon: DaemonThread, save_threads: int) -> None:
        self.daemon = daemon
        self.tensor = torch.randint(0, 255, (ENGINE_BLOCKS, BLOCK_BYTES), dtype=torch.uint8)
        self.copies = GatedCopies(layout_of({"layer": self.tensor}, blocks=ENGINE_BLOCKS), ThreadedCopier(threads=1))
        self.client = kv.attach(kv.Namespace(b"f" * 32, "rig", BLOCK_BYTES, 16), socket_dir=daemon.socket_dir)
        self.counters = Counters()
        memory = HostBlocks(self.client, self.copies)
        self.saves = Saves(memory, self.counters, threads=save_threads, waiting_max=4, timeout_s=5.0)
        self.loads = Loads(memory, self.counters, threads=1, timeout_s=5.0)

    def save(self, name: str, blocks: int, first: int = 0, *, engine_first: int | None = None) -> None:
        start = first if engine_first is None else engine_first
        ids = tuple(range(start, start + blocks))
        self.saves.order([SaveOrder(name, "", tuple(chain(name, blocks, start=first)), first, ids)])

    def save_standing_still(self, name: str, blocks: int) -> None:
        """One that has begun to read, and reads on when the gate is opened."""
        self.copies.gate.clear()
        self.save(name, blocks)
        assert self.copies.begun.wait(30)

    def held(self, name: str, blocks: int) -> int:
        return self.client.lookup(chain(name, blocks)).blocks

    def close(self) -> None:
        self.copies.gate.set()
        self.saves.stop()
        self.loads.stop()
        self.client.close()


@pytest.fixture
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """One thread saves, or as many as a test's parameter says."""
    with DaemonThread(tmp_path / "s") as daemon:
        made = Rig(daemon, getattr(request, "param", 1))
        yield made
        made.close()
        daemon.wait_no_instances()


def test_what_is_saved_is_loaded_into_other_blocks(rig: Rig) -> None:
    rig.save("a", 6)
    rig.save("a", 2, first=6)
    eventually(lambda: rig.saves.take_done({"a"}) == {"a"})
    rig.loads.order(LoadOrder("r", "", tuple(chain("a", 8)), 3, (40, 41, 42, 43, 44)))
    eventually(lambda: rig.loads.ended().request_ids == {"r"})
    assert torch.equal(rig.tensor[40:45], rig.tensor[3:8])


def test_what_is_not_held_is_named_block_by_block(rig: Rig) -> None:
    rig.save("a", 4)
    eventually(lambda: rig.held("a", 4) == 4)
    rig.loads.order(LoadOrder("r", "", tuple(chain("a", 7)), 2, (40, 41, 42, 43, 44)))
    failed: set[int] = set()

    def is_over() -> bool:
        ended = rig.loads.ended()
        failed.update(ended.failed_block_ids)
        return ended.request_ids == {"r"}

    eventually(is_over)
    assert failed == {42, 43, 44}
    assert torch.equal(rig.tensor[40:42], rig.tensor[2:4])


def test_blocks_that_change_hands_are_not_read(rig: Rig) -> None:
    rig.save_standing_still("reading", 3)
    rig.save("waiting", 3)
    released = threading.Event()

    def release() -> None:
        rig.saves.stop_reading(["waiting", "reading"])
        released.set()

    thread = threading.Thread(target=release)
    thread.start()
    assert not released.wait(0.1), "it did not wait for the copy that is under way"
    rig.copies.gate.set()
    assert released.wait(30)
    thread.join()
    rig.save("next", 1)
    eventually(lambda: rig.held("next", 1) == 1)
    assert len(rig.copies.reads) == 2
    assert rig.held("waiting", 3) == 0


def test_a_chain_whose_beginning_has_left_is_saved_from_its_root(rig: Rig) -> None:
    rig.save("a", 4)
    eventually(lambda: rig.held("a", 4) == 4)
    rig.client.forget_namespace()
    rig.save("a", 2, first=4)
    eventually(lambda: rig.held("a", 6) == 6)


def test_saves_that_wait_are_bounded_and_made_up_for(rig: Rig) -> None:
    rig.save_standing_still("first", 1)
    for position in range(6):
        rig.save("many", 1, first=position)
    assert rig.counters.take()["unsaved_blocks:queue_full"] == 2
    rig.copies.gate.set()
    eventually(lambda: rig.held("many", 4) == 4)
    rig.save("many", 1, first=6)
    eventually(lambda: rig.held("many", 7) == 7)


def test_a_load_that_was_not_begun_ends_all_the_same(rig: Rig) -> None:
    rig.loads.give_up([LoadOrder("r", "", tuple(chain("a", 2)), 0, (5, 6))])
    ended = rig.loads.ended()
    assert (ended.request_ids, ended.failed_block_ids) == ({"r"}, {5, 6})


@pytest.mark.parametrize("rig", [2], indirect=True)
def test_a_save_that_is_held_up_holds_up_its_own_request_only(rig: Rig) -> None:
    rig.copies.gated = {0}
    rig.save_standing_still("slow", 1)
    rig.save("slow", 1, first=1)
    rig.save("other", 2, engine_first=10)
    rig.save("other", 1, first=2, engine_first=12)
    eventually(lambda: rig.held("other", 3) == 3)
    assert rig.copies.reads == [(0,), (10, 11), (12,)], "a block was saved before the one that it hangs on"
    assert rig.saves.take_done({"slow"}) == set()
    rig.copies.gate.set()
    eventually(lambda: rig.held("slow", 2) == 2)
    assert rig.copies.reads[3:] == [(1,)]


@pytest.mark.parametrize("rig", [2, 4], indirect=True)
def test_many_threads_save_each_request_in_order_and_nothing_twice(rig: Rig) -> None:
    names = ["a", "b", "c"]
    for position in range(12):
        for number, name in enumerate(names):
            rig.save(name, 1, first=position, engine_first=20 * number + position)
        eventually(lambda: not rig.saves._queue)
    eventually(lambda: rig.saves.take_done(set(names)) == set(names))
    counted = rig.counters.take()
    assert counted["saved_blocks"] == 36
    assert not [name for name in counted if name.startswith("unsaved_blocks")]
    for number, name in enumerate(names):
        read = [block_ids[0] for block_ids in rig.copies.reads if block_ids[0] // 20 == number]
        assert read == list(range(20 * number, 20 * number + 12)), name
        assert rig.held(name, 12) == 12


@pytest.mark.parametrize("rig", [2], indirect=True)
def test_what_waits_when_it_is_stopped_is_saved_by_whichever_thread_is_left(rig: Rig) -> None:
    rig.save_standing_still("a", 1)
    rig.save("a", 1, first=1)
    stopping = threading.Thread(target=rig.saves.stop)
    stopping.start()
    eventually(lambda: rig.saves._stopping)
    rig.copies.gate.set()
    stopping.join(30)
    assert not any(thread.is_alive() for thread in rig.saves._threads)
    assert rig.held("a", 2) == 2


@pytest.mark.parametrize("rig", [2], indirect=True)
def test_requests_with_a_common_beginning_are_saved_at_once(rig: Rig) -> None:
    rig.copies.gated = {0}
    rig.save_standing_still("a", 1)
    both = (*chain("a", 1), *chain("b", 1))
    rig.saves.order([SaveOrder("b", "", both, 0, (10, 11))])
    eventually(lambda: rig.saves.take_done({"b"}) == {"b"})
    assert rig.copies.reads == [(0,), (11,)], "what is being written is not read again"
    assert rig.client.lookup(both).blocks == 0
    rig.copies.gate.set()
    eventually(lambda: rig.client.lookup(both).blocks == 2)
    counted = rig.counters.take()
    assert not [name for name in counted if name.startswith("unsaved_blocks")], counted
