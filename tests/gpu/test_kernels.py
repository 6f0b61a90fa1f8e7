"""The kernels on a GPU: what kernel_checks says of them, and what host memory does not have: streams, and size."""

from __future__ import annotations

import threading

import pytest
import torch

from kvservice_client.device import CachePart
from kvservice_cuda.driver import Driver

pytest.importorskip("triton", reason="Triton has no build for this system")

import triton

from kvservice_adapters.gpu.kernels import BlockMover, KeyRows
from kvservice_adapters.gpu.turning import turned
from kvservice_adapters.positions import Rope, moved
from tests.gpu.kernel_checks import CHECKS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = torch.device("cuda", 0)
LAYERS, HEADS, TOKENS, DIM = 4, 8, 16, 128
PART_BYTES = 2 * HEADS * TOKENS * DIM * 2
KEYS = KeyRows(DIM, DIM, key_rows=HEADS * TOKENS, tokens=TOKENS, group_rows=HEADS * TOKENS, row_divisor=1)
ROPE = Rope(tuple(10_000.0 ** (-pair / 64) for pair in range(64)))


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: str) -> None:
    CHECKS[check](DEVICE)


def _mover(layers: list[torch.Tensor]) -> BlockMover:
    parts = [CachePart(layer.data_ptr(), PART_BYTES, PART_BYTES, at) for at, layer in enumerate(layers)]
    return BlockMover(parts, dtype=torch.bfloat16, device=DEVICE, keys=KEYS)


def _load(layers: list[torch.Tensor], run: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Made on the current stream, scattered on another one."""
    shifts = [0, 512, 512]
    mover = _mover(layers)
    turn = turned(ROPE, shifts, first_place=3, tokens=TOKENS, device=DEVICE)
    block_ids = torch.tensor([5, 0, 2], dtype=torch.int32, pin_memory=True).to(DEVICE, non_blocking=True)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(LAYERS):
            mover.scatter(run, block_ids, first_layer=layer, end_layer=layer + 1, turn=turn)


def test_nothing_waits_for_the_gpu() -> None:
    layers = [torch.zeros((6, 2, HEADS, TOKENS, DIM), dtype=torch.bfloat16, device=DEVICE) for _ in range(LAYERS)]
    blocks = torch.randn((3, LAYERS, 2, HEADS, TOKENS, DIM), device=DEVICE).to(torch.bfloat16)
    run = blocks.view(torch.uint8).view(3, -1)
    engine, other = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(engine):
        _load(layers, run, other)  # what is compiled and allocated once
    torch.cuda.synchronize()
    for layer in layers:
        layer.zero_()
    torch.cuda.synchronize()
    word = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    release = threading.Timer(60, word.fill_, [1])
    release.start()
    try:
        context = Driver().context(0)
        with torch.cuda.stream(engine), context.current():
            context.await_flag(engine.cuda_stream, word.data_ptr(), 1)
            held = engine.record_event()
            _load(layers, run, other)
            assert not held.query(), "launching waited until the stream was let go"
    finally:
        word.fill_(1)
        release.cancel()
    other.synchronize()
    now_at = torch.arange(3 * TOKENS, 6 * TOKENS, device=DEVICE).view(3, 1, 1, TOKENS)
    shift = torch.tensor([0, 512, 512], device=DEVICE).view(3, 1, 1, 1)
    blocks[:, :, 0] = moved(blocks[:, :, 0], ROPE, computed_at=now_at - shift, now_at=now_at)
    for at, layer in enumerate(layers):
        assert torch.equal(layer[[5, 0, 2]], blocks[:, at])
        assert not layer[[1, 3, 4]].any()


def test_beyond_four_gib() -> None:
    size_bytes, blocks = 2 << 20, 2_200
    assert size_bytes * blocks > 1 << 32
    cache = torch.zeros((blocks, size_bytes), dtype=torch.uint8, device=DEVICE)
    run = torch.randint(256, (blocks, size_bytes), dtype=torch.uint8, device=DEVICE)
    mover = BlockMover([CachePart(cache.data_ptr(), size_bytes, size_bytes)], dtype=torch.bfloat16, device=DEVICE)
    block_ids = torch.arange(blocks - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    mover.scatter(run, block_ids, first_layer=0, end_layer=1)
    assert all(torch.equal(cache[blocks - 1 - at], run[at]) for at in range(blocks))
    cache.random_(256)
    mover.gather(run, block_ids)
    assert all(torch.equal(cache[blocks - 1 - at], run[at]) for at in range(blocks))


def test_a_thread_that_nobody_told_the_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    device = torch.device("cuda", 1)
    cache = torch.zeros((4, 4096), dtype=torch.uint8, device=device)
    run = torch.randint(256, (2, 4096), dtype=torch.uint8, device=device)
    mover = BlockMover([CachePart(cache.data_ptr(), 4096, 4096)], dtype=torch.bfloat16, device=device)
    block_ids = torch.tensor([3, 1], dtype=torch.int32, device=device)
    thread = threading.Thread(target=lambda: mover.scatter(run, block_ids, first_layer=0, end_layer=1))
    thread.start()
    thread.join()
    torch.cuda.synchronize(device)
    assert torch.equal(cache[[3, 1]], run)
    assert not cache[[0, 2]].any()


def test_a_prepared_mover_compiles_nothing_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, blocks = 5, 3  # of no other test
    memory = torch.zeros((4, 2, heads, TOKENS, DIM), dtype=torch.bfloat16, device=DEVICE)
    part_bytes = memory[0].nbytes
    rows = heads * TOKENS
    mover = BlockMover(
        [CachePart(memory.data_ptr(), part_bytes, part_bytes)],
        dtype=torch.bfloat16,
        device=DEVICE,
        keys=KeyRows(DIM, DIM, key_rows=rows, tokens=TOKENS, group_rows=rows, row_divisor=1),
    )
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: compiled.append(told))
    mover.prepare(ROPE)
    assert len(compiled) == 3, "scatter, scatter that turns, gather"
    run = torch.zeros((blocks, part_bytes), dtype=torch.uint8, device=DEVICE)
    block_ids = torch.arange(blocks + 1, dtype=torch.int32, device=DEVICE)[1:]  # aligned otherwise
    turn = turned(ROPE, [0, 16, 16], first_place=0, tokens=TOKENS, device=DEVICE)
    mover.scatter(run, block_ids, first_layer=0, end_layer=1)
    mover.scatter(run, block_ids, first_layer=0, end_layer=1, turn=turn)
    mover.gather(run, block_ids)
    torch.cuda.synchronize()
    assert len(compiled) == 3
