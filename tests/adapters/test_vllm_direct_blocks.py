"""The vLLM adapter's loads and saves straight into and out of GPU memory: a real daemon, a GPU of host memory.

What a GPU does with it is tried in tests/gpu/test_vllm_blocks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from kvservice_adapters.positions import Rope, moved
from kvservice_adapters.vllm.direct_blocks import DirectBlocks
from kvservice_adapters.vllm.keys import KeyTurner, split_keys
from kvservice_adapters.vllm.layout import layout_of
from tests.adapters.vllm_blocks import Transfers, attached
from tests.blocks import chain
from tests.buffers import tensor_of
from tests.daemons import DaemonThread
from tests.devices import FakeGpu
from tests.waiting import eventually

pytestmark = pytest.mark.integration

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 2, 16, 3, 8, 4
ROPE = Rope(tuple(100.0 ** (-pair / 2) for pair in range(2)))


class Rig(Transfers):
    """An engine whose blocks are contiguous across layers: [blocks, layers, heads, tokens, 2 * dim]."""

    def __init__(self, gpu: FakeGpu, daemon: DaemonThread, *, load_timeout_s: float = 5.0) -> None:
        shape = (BLOCKS, LAYERS, HEADS, TOKENS, 2 * DIM)
        address = gpu.allocate(4 * torch.Size(shape).numel())
        self.whole = tensor_of(gpu, address).view(torch.float32).view(shape)
        self.whole.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        caches = {f"layer {layer}": self.whole[:, layer] for layer in range(LAYERS)}
        layout = layout_of(caches, blocks=BLOCKS)
        client = attached(daemon, layout, TOKENS)
        keys = {tensor.data_ptr(): split_keys(tensor, DIM) for tensor in caches.values()}
        turner = KeyTurner(ROPE, keys, torch.device("cpu"), kernel_blocks=1, kernel_tokens=TOKENS)
        self.direct = DirectBlocks(client, layout, keys=turner, driver=gpu.driver)
        super().__init__(client, self.direct, load_timeout_s=load_timeout_s)


@pytest.fixture
def daemon(tmp_path: Path, gpu: FakeGpu) -> Iterator[DaemonThread]:
    with DaemonThread(tmp_path / "s", driver=gpu.driver, device_plane="auto") as made:
        yield made


@pytest.fixture
def rig(gpu: FakeGpu, daemon: DaemonThread) -> Iterator[Rig]:
    made = Rig(gpu, daemon)
    yield made
    made.close()
    daemon.wait_no_instances()


def test_the_end_of_a_chain_is_loaded_into_the_engine_s_blocks_and_no_others(rig: Rig) -> None:
    assert rig.direct.plane.name == "cuda-ipc"
    rig.save("a", [0, 1, 2, 3])
    before = rig.whole.clone()
    rig.load("a", 2, [10, 11, 12, 13])
    before[[10, 11]] = before[[2, 3]]
    assert torch.equal(rig.whole, before)
    assert rig.failed == {12, 13}
    eventually(lambda: not rig.saves._queue)
    counted = rig.counters.take()
    assert (counted["saved_blocks"], counted["loaded_blocks"], counted["unloaded_blocks:not_held"]) == (4, 2, 2)


def test_keys_of_blocks_that_moved_are_turned_before_the_load_is_over(rig: Rig) -> None:
    rig.save("a", [0, 1, 2, 3], session_id="s")
    kept = chain("what is left", 3)
    named = rig.client.truncate("s", kept, source=chain("a", 4), keep=[(TOKENS, 4 * TOKENS)])
    assert named.held_blocks == 3
    saved = rig.whole[1:4].clone()
    rig.load("what is left", 1, [10, 11], session_id="s")
    now_at = torch.arange(TOKENS, 3 * TOKENS).view(2, 1, 1, TOKENS)
    keys = moved(saved[1:, ..., :DIM], ROPE, computed_at=now_at + TOKENS, now_at=now_at)
    assert not rig.failed
    assert torch.equal(rig.whole[10:12, ..., :DIM], keys)
    assert torch.equal(rig.whole[10:12, ..., DIM:], saved[1:, ..., DIM:])
    rig.load("what is left", 1, [12, 13])
    assert rig.failed == {12, 13}, "who does not turn keys must not be given them"


def test_a_late_load_keeps_the_engine_s_blocks_until_nobody_writes_into_them(
    gpu: FakeGpu, daemon: DaemonThread, stack: ExitStack
) -> None:
    rig = Rig(gpu, daemon, load_timeout_s=0.1)
    stack.callback(rig.close)
    rig.save("a", [0, 1])
    with gpu.held():
        rig.order_load("a", 0, [10, 11])
        rig.load("missing", 0, [12])
        eventually(lambda: rig.loads._unquiet != [])
        assert rig.failed == {12}
        assert not rig.is_over("a"), "its copy is still queued"
    eventually(lambda: rig.is_over("a"))
    assert rig.failed == {10, 11, 12}, "what came too late does not count"


def test_blocks_that_change_hands_while_they_are_read_are_not_stored_and_nobody_waits(
    rig: Rig, gpu: FakeGpu, daemon: DaemonThread
) -> None:
    copies = daemon.store.device_copies.plane
    with gpu.held():
        rig.order_save("a", [0, 1])
        eventually(lambda: daemon.on_loop(lambda: copies.copies_in_flight) == 1)
        assert rig.saves.take_done({"a"}) == set(), "the engine must not free them yet"
        rig.saves.stop_reading(["a"])
        rig.whole[0] = 0
    eventually(lambda: rig.counters.take().get("unsaved_blocks:changed") == 2)
    assert rig.client.lookup(chain("a", 2)).blocks == 0


def test_a_chain_whose_beginning_has_left_is_saved_from_its_root(rig: Rig) -> None:
    rig.save("a", [0, 1, 2])
    rig.client.forget_namespace()
    rig.order_save("a", [3, 4], first=3)
    rig.wait_held("a", 5)
