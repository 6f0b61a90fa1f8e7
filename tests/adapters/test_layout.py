"""The layout of a block: what goes in comes out, bit by bit, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice_adapters.transformers import BlockLayout, KVRows

pytestmark = pytest.mark.unit

SMALL = st.integers(1, 3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.builds(
    BlockLayout, layers=SMALL, kv_heads=SMALL, tokens_per_block=SMALL, head_dim=st.integers(1, 5), dtype=DTYPES
)


def filled_rows(layout: BlockLayout, tokens: int, *, seed: int = 0) -> KVRows:
    draw = torch.Generator().manual_seed(seed)
    shape = (layout.kv_heads, tokens, layout.head_dim)
    return [
        (torch.randn(shape, generator=draw).to(layout.dtype), torch.randn(shape, generator=draw).to(layout.dtype))
        for _ in range(layout.layers)
    ]


def empty_blocks(layout: BlockLayout, blocks: int) -> torch.Tensor:
    return layout.as_blocks(torch.zeros(blocks * layout.block_size_bytes, dtype=torch.uint8))


@given(LAYOUTS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 4))
@settings(deadline=None)
def test_blocks_survive_the_way_out_and_back(layout: BlockLayout, first: int, blocks: int, behind: int) -> None:
    start, end = first * layout.tokens_per_block, (first + blocks) * layout.tokens_per_block
    source = filled_rows(layout, end + behind, seed=1)
    target = filled_rows(layout, end + behind, seed=2)
    before = [(keys.clone(), values.clone()) for keys, values in target]
    stored = empty_blocks(layout, blocks)
    layout.gather(source, first, stored)
    layout.scatter(stored, first, target)
    for (out_pair, in_pair), old_pair in zip(zip(target, source, strict=True), before, strict=True):
        for out, sent, old in zip(out_pair, in_pair, old_pair, strict=True):
            assert torch.equal(out[:, start:end], sent[:, start:end])
            assert torch.equal(out[:, :start], old[:, :start])
            assert torch.equal(out[:, end:], old[:, end:])


@given(LAYOUTS, st.integers(1, 3))
@settings(deadline=None)
def test_a_blocks_bytes_are_layers_parts_heads_tokens_dims(layout: BlockLayout, blocks: int) -> None:
    rows = filled_rows(layout, blocks * layout.tokens_per_block)
    memory = torch.zeros(blocks * layout.block_size_bytes, dtype=torch.uint8)
    layout.gather(rows, 0, layout.as_blocks(memory))
    expected = [
        rows[layer][part][head, block * layout.tokens_per_block + token]
        for block in range(blocks)
        for layer in range(layout.layers)
        for part in (0, 1)
        for head in range(layout.kv_heads)
        for token in range(layout.tokens_per_block)
    ]
    assert torch.equal(memory, torch.cat(expected).view(torch.uint8))


def test_a_block_can_be_moved_to_another_place() -> None:
    layout = BlockLayout(layers=2, kv_heads=2, tokens_per_block=4, head_dim=3, dtype=torch.float32)
    source, target = filled_rows(layout, 12, seed=1), filled_rows(layout, 12, seed=2)
    stored = empty_blocks(layout, 1)
    layout.gather(source, 2, stored)
    layout.scatter(stored, 0, target)
    assert torch.equal(target[1][0][:, :4], source[1][0][:, 8:12])


def test_views_of_a_batch_work_like_tensors_of_their_own() -> None:
    layout = BlockLayout(layers=1, kv_heads=2, tokens_per_block=2, head_dim=4, dtype=torch.float32)
    batch = torch.randn(3, 2, 10, 4)
    stored = empty_blocks(layout, 2)
    layout.gather([(batch[1], batch[2])], 1, stored)
    assert torch.equal(stored[1, 0, 0, 1, 0], batch[1, 1, 4])
    layout.scatter(stored, 0, [(batch[0], batch[0].clone())])
    assert torch.equal(batch[0, :, :4], batch[1, :, 2:6])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4))], "has 1 layers, not 2"),
        ([(torch.zeros(2, 8, 4), torch.zeros(2, 7, 4))] * 2, "at least 8"),
        ([(torch.zeros(2, 8, 4), torch.zeros(3, 8, 4))] * 2, "at least 8"),
        ([(torch.zeros(2, 8, 4), torch.zeros(2, 8, 5))] * 2, "at least 8"),
        ([(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4, dtype=torch.bfloat16))] * 2, "bfloat16"),
    ],
)
def test_a_cache_of_another_shape_or_dtype_is_refused(rows: KVRows, reason: str) -> None:
    layout = BlockLayout(layers=2, kv_heads=2, tokens_per_block=4, head_dim=4, dtype=torch.float32)
    blocks = torch.ones(2, *layout.block_shape)
    with pytest.raises(ValueError, match=reason):
        layout.gather(rows, 0, blocks)
    with pytest.raises(ValueError, match=reason):
        layout.scatter(blocks, 0, rows)
    assert all(not tensor.any() for pair in rows for tensor in pair), "a refused scatter wrote something"


def test_blocks_of_another_dtype_are_refused() -> None:
    layout = BlockLayout(layers=1, kv_heads=1, tokens_per_block=2, head_dim=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"torch\.float16"):
        layout.gather(filled_rows(layout, 2), 0, torch.zeros(1, *layout.block_shape, dtype=torch.float16))


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads is 0"):
        BlockLayout(layers=1, kv_heads=0, tokens_per_block=2, head_dim=2, dtype=torch.float32)
