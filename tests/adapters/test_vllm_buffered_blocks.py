"""The vLLM adapter's loads and saves by way of the buffer: a real daemon, a GPU of host memory, kernels made of torch.

What a GPU does with it is tried in tests/gpu/test_vllm_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from kvservice_adapters.gpu.buffer import HbmBuffer
from kvservice_adapters.positions import Rope, moved
from kvservice_adapters.vllm.buffered_blocks import BufferedBlocks, key_rows_of, layer_bytes_of
from kvservice_adapters.vllm.keys import KeyTurner, split_keys
from kvservice_adapters.vllm.layout import Region, layout_of
from tests.adapters.vllm_blocks import Transfers, attached
from tests.blocks import chain
from tests.buffers import FakeMover, FakeStreams, tensor_of
from tests.daemons import DaemonThread
from tests.devices import FakeGpu
from tests.waiting import eventually

pytestmark = pytest.mark.integration

LAYERS, BLOCKS, TOKENS, DIM = 3, 32, 8, 4
BUFFER_BLOCKS = 8
ROPE = Rope(tuple(100.0 ** (-pair / 2) for pair in range(2)))


class Rig(Transfers):
    """An engine with keys and values apart, [2, blocks, tokens, dim] per layer, and a buffer of a few blocks."""

    def __init__(
        self, gpu: FakeGpu, daemon: DaemonThread, *, save_threads: int = 1, load_timeout_s: float = 5.0
    ) -> None:
        shape = (2, BLOCKS, TOKENS, DIM)
        self.caches = [
            self._memory(gpu, 4 * torch.Size(shape).numel()).view(torch.float32).view(shape) for _ in range(LAYERS)
        ]
        for number, tensor in enumerate(self.caches):
            tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(number)))
        layout = layout_of({f"layer {number}": tensor for number, tensor in enumerate(self.caches)}, blocks=BLOCKS)
        client = attached(daemon, layout, TOKENS)
        size_bytes = BUFFER_BLOCKS * layout.block_size_bytes
        streams = FakeStreams(gpu)
        self.engine_stream = streams.default
        self.buffer = HbmBuffer(
            client,
            layer_bytes=layer_bytes_of(layout),
            size_bytes=size_bytes,
            device=torch.device("cpu"),
            driver=gpu.driver,
            memory=self._memory(gpu, size_bytes),
            streams=streams,
        )
        halves = [[half.view(torch.uint8).view(BLOCKS, -1) for half in tensor] for tensor in self.caches]
        mover = FakeMover(gpu, streams, halves)
        memory = BufferedBlocks(self.buffer, mover, layout, rope=ROPE)
        super().__init__(client, memory, save_threads=save_threads, load_timeout_s=load_timeout_s)

    def blocks(self, *block_ids: int) -> torch.Tensor:
        """A copy, [layers, 2, blocks, tokens, dim]."""
        return torch.stack([tensor[:, list(block_ids)] for tensor in self.caches])

    @staticmethod
    def _memory(gpu: FakeGpu, size_bytes: int) -> torch.Tensor:
        return tensor_of(gpu, gpu.allocate(size_bytes))


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
    rig.save("a", [0, 1, 2, 3])
    before = rig.blocks(*range(BLOCKS))
    rig.load("a", 2, [10, 11, 12, 13])
    before[:, :, [10, 11]] = before[:, :, [2, 3]]
    assert torch.equal(rig.blocks(*range(BLOCKS)), before)
    assert rig.failed == {12, 13}
    eventually(lambda: rig.buffer.free_blocks == BUFFER_BLOCKS)


def test_keys_of_blocks_that_moved_turn_on_the_way(rig: Rig) -> None:
    rig.save("a", [0, 1, 2, 3], session_id="s")
    kept = chain("what is left", 3)
    assert rig.client.truncate("s", kept, source=chain("a", 4), keep=[(TOKENS, 4 * TOKENS)]).held_blocks == 3
    expected = rig.blocks(2, 3)
    rig.load("what is left", 1, [10, 11], session_id="s")
    now_at = torch.arange(TOKENS, 3 * TOKENS).view(2, TOKENS)
    expected[:, 0] = moved(expected[:, 0], ROPE, computed_at=now_at + TOKENS, now_at=now_at)
    assert not rig.failed
    torch.testing.assert_close(rig.blocks(10, 11), expected)
    assert rig.counters.take()["shifted_blocks"] == 2
    rig.load("what is left", 1, [12, 13])
    assert rig.failed == {12, 13}, "who does not turn keys must not be given them"


def test_blocks_are_free_when_the_engine_s_stream_has_come_to_their_gathering(rig: Rig, gpu: FakeGpu) -> None:
    before = rig.blocks(0, 1, 2)
    with gpu.held():
        rig.order_save("a", [0, 1, 2])
        assert rig.saves.take_done({"a"}) == {"a"}

        def overwrite() -> bool:
            for tensor in rig.caches:
                tensor[:, :3] = 0
            return True

        gpu.queue(rig.engine_stream, overwrite)
    rig.wait_held("a", 3)
    assert not rig.blocks(0, 1, 2).any()
    rig.load("a", 0, [10, 11, 12])
    assert torch.equal(rig.blocks(10, 11, 12), before)


def test_more_blocks_than_the_buffer_has_room_for_are_gathered_in_turn_and_needed_until_then(
    rig: Rig, gpu: FakeGpu
) -> None:
    blocks = list(range(3 * BUFFER_BLOCKS))
    before = rig.blocks(*blocks)
    with gpu.held():
        rig.order_save("a", blocks)
        assert rig.saves.take_done({"a"}) == set()
    eventually(lambda: rig.saves.take_done({"a"}) == {"a"})
    rig.wait_held("a", len(blocks))
    for tensor in rig.caches:
        tensor.zero_()
    rig.load("a", 0, blocks)
    assert not rig.failed
    assert torch.equal(rig.blocks(*blocks), before)
    eventually(lambda: rig.buffer.free_blocks == BUFFER_BLOCKS)


def test_two_threads_save_through_one_buffer(gpu: FakeGpu, daemon: DaemonThread) -> None:
    rig = Rig(gpu, daemon, save_threads=2)
    chains = {"gathered": [0, 1, 2], "large": list(range(3, 15)), "large too": list(range(15, 27)), "last": [27, 28]}
    before = rig.blocks(*range(BLOCKS))
    for name, block_ids in chains.items():
        rig.order_save(name, block_ids)
    eventually(lambda: rig.saves.take_done(set(chains)) == set(chains))
    for name, block_ids in chains.items():
        rig.wait_held(name, len(block_ids))
    counted = rig.counters.take()
    assert not [name for name in counted if name.startswith("unsaved_blocks")], counted
    for tensor in rig.caches:
        tensor.zero_()
    for name, block_ids in chains.items():
        rig.load(name, 0, block_ids)
        assert torch.equal(rig.blocks(*block_ids), before[:, :, block_ids]), name
    assert not rig.failed
    eventually(lambda: rig.buffer.free_blocks == BUFFER_BLOCKS)
    rig.close()


def test_what_waits_to_be_gathered_is_not_read_after_it_changed_hands(rig: Rig, gpu: FakeGpu) -> None:
    blocks = list(range(BUFFER_BLOCKS))
    with gpu.held():
        rig.order_save("first", blocks[:4])
        rig.order_save("released", blocks)
        rig.saves.stop_reading(["released"])
    rig.wait_held("first", 4)
    rig.order_save("next", [1])
    rig.wait_held("next", 1)
    assert rig.client.lookup(chain("released", 1)).blocks == 0


def test_a_chain_whose_beginning_has_left_is_saved_from_its_root(rig: Rig) -> None:
    rig.save("a", [0, 1, 2])
    rig.client.forget_namespace()
    rig.order_save("a", [3, 4], first=3)
    rig.wait_held("a", 5)
    before = rig.blocks(0, 1, 2, 3, 4)
    rig.load("a", 0, [10, 11, 12, 13, 14])
    assert torch.equal(rig.blocks(10, 11, 12, 13, 14), before)


def test_a_late_load_is_over_at_once_and_never_writes_into_the_engine_s_blocks(
    gpu: FakeGpu, daemon: DaemonThread, stack: ExitStack
) -> None:
    rig = Rig(gpu, daemon, load_timeout_s=0.1)
    stack.callback(rig.close)
    rig.save("a", [0, 1])
    with gpu.copies_held():
        rig.load("a", 0, [10, 11])
        assert rig.failed == {10, 11}
        before = rig.blocks(10, 11)  # whatever they hold: they are the engine's again
        assert rig.buffer.free_blocks == BUFFER_BLOCKS - 2, "the daemon's copy is still queued"
    eventually(lambda: rig.buffer.free_blocks == BUFFER_BLOCKS)
    assert torch.equal(rig.blocks(10, 11), before)


# ------------------------------------------------------------ where keys stand


def hnd() -> torch.Tensor:
    return torch.empty(5, 3, TOKENS, 2 * DIM)


def nhd() -> torch.Tensor:
    return torch.empty(5, TOKENS, 3, 2 * DIM).transpose(1, 2)


def heads_first() -> torch.Tensor:
    return torch.empty(3, 5, TOKENS, 2 * DIM).transpose(0, 1)


def one_head() -> torch.Tensor:
    return torch.empty(5, 1, TOKENS, 2 * DIM)


def two_kernel_blocks() -> torch.Tensor:
    return torch.empty(10, TOKENS, 3, 2 * DIM).transpose(1, 2)


def across_layers() -> torch.Tensor:
    return torch.empty(5, 2, 3, TOKENS, 2 * DIM)[:, 1]


@pytest.mark.parametrize("make", [hnd, nhd, heads_first, one_head, two_kernel_blocks, across_layers])
def test_rows_of_keys_are_those_of_their_tokens(make: Callable[[], torch.Tensor]) -> None:
    """Each element is its token's number in the engine's block; values are negative."""
    tensor = make()
    kernel_blocks = tensor.shape[0] // 5
    token = torch.arange(kernel_blocks * TOKENS).view(kernel_blocks, 1, TOKENS, 1).repeat(5, 1, 1, 1).float()
    tensor[..., :DIM] = token
    tensor[..., DIM:] = -1
    layout = layout_of({"layer": tensor}, blocks=5)
    turner = KeyTurner(
        ROPE,
        {tensor.data_ptr(): split_keys(tensor, DIM)},
        torch.device("cpu"),
        kernel_blocks=kernel_blocks,
        kernel_tokens=TOKENS,
    )
    rows = key_rows_of(layout, turner)
    assert sorted(rows) == list(range(len(layout.regions)))
    for at, region in enumerate(layout.regions):
        of = rows[at]
        found = _floats(region, block_id=4).view(-1, of.row_elements)
        assert len(found) == of.key_rows
        for row, elements in enumerate(found):
            number = row // of.group_rows * of.tokens + row % of.group_rows // of.row_divisor % of.tokens
            assert elements.tolist() == [number] * DIM + [-1] * DIM


def _floats(region: Region, block_id: int) -> torch.Tensor:
    start = region.address - region.tensor.untyped_storage().data_ptr() + block_id * region.stride_bytes
    return torch.empty(0).set_(region.tensor.untyped_storage(), start // 4, (region.size_bytes // 4,), (1,))
