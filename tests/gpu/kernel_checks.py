"""What the kernels have to do, against plain torch: on a GPU, or interpreted on host memory.

    TRITON_INTERPRET=1 python -m tests.gpu.kernel_checks NAME     one of CHECKS, without a GPU

The whole memory is compared, poisoned before: what is not named must not change. Interpreted, Triton cuts bfloat16 off
where every GPU rounds it: the reference does the same there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from kvservice_adapters.gpu.kernels import BlockMover, KeyRows
from kvservice_adapters.gpu.turning import turned
from kvservice_adapters.positions import Rope, RopeForm, Turn, moved, turn_between
from kvservice_client.device import CachePart

_SPARE_BYTES = 64


@dataclass(frozen=True)
class Cache:
    """An engine's cache in one piece of memory; addresses in `parts` count from its start."""

    blocks: int
    parts: tuple[CachePart, ...]
    size_bytes: int

    def placed(self, memory: torch.Tensor) -> list[CachePart]:
        start = memory.data_ptr()
        return [
            CachePart(start + part.address, part.block_stride_bytes, part.size_bytes, part.layer) for part in self.parts
        ]


def cache_of(sizes: list[int], layers: list[int], *, blocks: int, gap: int, start: int, is_interleaved: bool) -> Cache:
    """Parts of these sizes: each in a region of its own, or a block's side by side."""
    stride = sum(sizes) + gap
    parts, at = [], start
    for size, layer in zip(sizes, layers, strict=True):
        parts.append(CachePart(at, stride if is_interleaved else size + gap, size, layer))
        at += size if is_interleaved else (size + gap) * blocks
    return Cache(blocks, tuple(parts), start + (stride + gap * len(sizes)) * blocks + _SPARE_BYTES)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@st.composite
def _caches(draw: st.DrawFn) -> Cache:
    unit = draw(st.sampled_from([1, 2, 2, 4, 8, 16, 48]))
    size = st.integers(1, 40).map(lambda units: units * unit) | st.sampled_from([16 << 10, 40 << 10]).map(
        lambda size: size // unit * unit
    )
    some = draw(st.lists(size, min_size=1, max_size=3))
    sizes = draw(st.lists(st.sampled_from(some), min_size=1, max_size=5))
    layers = draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    gap, start = draw(st.integers(0, 3)) * unit, draw(st.integers(0, 3)) * unit
    return cache_of(
        sizes, layers, blocks=draw(st.integers(1, 4)), gap=gap, start=start, is_interleaved=draw(st.booleans())
    )


def copies_every_byte_and_no_other(device: torch.device) -> None:
    @hypothesis.given(cache=_caches(), data=st.data())
    @hypothesis.settings(max_examples=60)
    def check(cache: Cache, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, cache.blocks - 1), unique=True))
        check_copy(cache, ids, device, run_start=data.draw(st.sampled_from([0, 0, 1, 2, 8])))

    check()


def check_copy(cache: Cache, ids: list[int], device: torch.device, *, run_start: int = 0) -> None:
    """Both ways, and every range of layers one after the other."""
    before = noise(cache.size_bytes, seed=1)
    memory = before.to(device)
    elsewhere = torch.empty_like(memory)  # poisoned by nobody: what is written there is missing here
    made = BlockMover(cache.placed(elsewhere), dtype=torch.bfloat16, device=device)
    mover = made.at(np.array([part.address for part in cache.placed(memory)]))
    with pytest.raises(ValueError, match="addresses for"):
        made.at(np.zeros(len(cache.parts) + 1, dtype=np.int64))
    assert mover.block_size_bytes == sum(part.size_bytes for part in cache.parts)
    block_ids = torch.tensor(ids, dtype=torch.int32, device=device)
    ends = range(mover.layers + 1)
    for first, end in [(first, end) for first in ends for end in ends if first <= end]:
        run_before = noise(run_start + len(ids) * mover.block_size_bytes + _SPARE_BYTES, seed=2)
        run_memory = run_before.to(device)
        run = (
            run_memory[run_start:-_SPARE_BYTES].view(len(ids), -1)
            if ids
            else run_memory[:0].view(0, mover.block_size_bytes)
        )
        memory.copy_(before)
        mover.scatter(run, block_ids, first_layer=first, end_layer=end)
        expected, run_expected = before.clone(), run_before.clone()
        for here, there, size in _pieces(cache, ids, run_start, range(first, end)):
            expected[there : there + size] = run_before[here : here + size]
            run_expected[here : here + size] = before[there : there + size]
        assert torch.equal(memory.cpu(), expected)
        assert torch.equal(run_memory.cpu(), run_before)
        memory.copy_(before)
        mover.gather(run, block_ids, first_layer=first, end_layer=end)
        assert torch.equal(run_memory.cpu(), run_expected)
        assert torch.equal(memory.cpu(), before)


def _pieces(cache: Cache, ids: list[int], run_start: int, layers: range) -> list[tuple[int, int, int]]:
    """(offset in the run's memory, offset in the cache's, size) of all that moves."""
    found, here = [], run_start
    for block_id in ids:
        for part in cache.parts:
            if part.layer in layers:
                found.append((here, part.address + block_id * part.block_stride_bytes, part.size_bytes))
            here += part.size_bytes
    return found


class Arrangement(Enum):
    """Of a layer's block. "2": keys, then values in one part; "|": in two parts; "+": side by side in each row."""

    HEADS_FIRST_2 = "[2, heads, tokens, dim]"
    TOKENS_FIRST_2 = "[2, tokens, heads, dim]"
    HEADS_FIRST_APART = "[heads, tokens, dim] | the same"
    TOKENS_FIRST_APART = "[tokens, heads, dim] | the same"
    HEADS_FIRST_BESIDE = "[heads, tokens, dim + dim]"
    TOKENS_FIRST_BESIDE = "[tokens, heads, dim + dim]"


@dataclass(frozen=True)
class Model:
    """What a turn depends on. `kernel_blocks`: of one block, where keys and values are not in one part."""

    arrangement: Arrangement
    dtype: torch.dtype
    heads: int
    tokens: int
    head_dim: int
    rope: Rope
    layers: int = 2
    kernel_blocks: int = 1

    @property
    def has_heads_first(self) -> bool:
        return self.arrangement.name.startswith("HEADS")

    @property
    def block_tokens(self) -> int:
        return self.tokens * self.kernel_blocks

    @property
    def row_elements(self) -> int:
        return self.head_dim * (2 if self.arrangement.name.endswith("BESIDE") else 1)

    @property
    def part_bytes(self) -> int:
        twice = 2 if self.arrangement.name.endswith("2") else 1
        return twice * self.kernel_blocks * self.heads * self.tokens * self.row_elements * self.dtype.itemsize

    @property
    def parts_of_layer(self) -> int:
        return 2 if self.arrangement.name.endswith("APART") else 1

    @property
    def keys(self) -> KeyRows | dict[int, KeyRows]:
        rows = KeyRows(
            row_elements=self.row_elements,
            head_dim=self.head_dim,
            key_rows=self.kernel_blocks * self.heads * self.tokens,
            tokens=self.tokens,
            group_rows=self.heads * self.tokens,
            row_divisor=1 if self.has_heads_first else self.heads,
        )
        return rows if self.parts_of_layer == 1 else dict.fromkeys(range(0, 2 * self.layers, 2), rows)

    def keys_in(self, part: torch.Tensor) -> torch.Tensor:
        """A view [kernel blocks, heads, tokens, head_dim] of a part [part_bytes] with keys."""
        inner = (self.heads, self.tokens) if self.has_heads_first else (self.tokens, self.heads)
        rows = part.view(self.dtype).view(-1, *inner, self.row_elements)[: self.kernel_blocks, ..., : self.head_dim]
        return rows if self.has_heads_first else rows.transpose(1, 2)


@st.composite
def _models(draw: st.DrawFn) -> Model:
    pairs = draw(st.sampled_from([1, 2, 3, 8, 32]))
    theta = draw(st.sampled_from([500.0, 10_000.0]))
    rope = Rope(tuple(theta ** (-pair / pairs) for pair in range(pairs)), draw(st.sampled_from(RopeForm)))
    arrangement = draw(st.sampled_from(Arrangement))
    return Model(
        arrangement,
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        heads=draw(st.integers(1, 3)),
        tokens=draw(st.sampled_from([1, 3, 8, 16, 80])),
        head_dim=2 * pairs + draw(st.sampled_from([0, 0, 1, 6])),
        rope=rope,
        kernel_blocks=1 if arrangement.name.endswith("2") else draw(st.integers(1, 2)),
    )


def turns_keys_and_nothing_else(device: torch.device) -> None:
    shifts = st.lists(st.just(0) | st.integers(-3_000, 3_000), min_size=1, max_size=4)

    @hypothesis.given(model=_models(), shifts=shifts, first_place=st.integers(0, 500), is_interleaved=st.booleans())
    @hypothesis.settings(max_examples=60)
    def check(model: Model, shifts: list[int], first_place: int, is_interleaved: bool) -> None:
        check_turn(model, shifts, device, first_place=first_place, is_interleaved=is_interleaved)

    check()


def check_turn(
    model: Model, shifts: list[int], device: torch.device, *, first_place: int = 0, is_interleaved: bool = False
) -> None:
    """A scatter of blocks of which some moved, a layer at a time."""
    layers = [layer for layer in range(model.layers) for _ in range(model.parts_of_layer)]
    sizes, blocks, item = [model.part_bytes] * len(layers), len(shifts) + 2, model.dtype.itemsize
    cache = cache_of(sizes, layers, blocks=blocks, gap=3 * item, start=item, is_interleaved=is_interleaved)
    before = noise(cache.size_bytes, seed=1)
    memory = before.to(device)
    mover = BlockMover(cache.placed(memory), dtype=model.dtype, device=device, keys=model.keys)
    ids = torch.randperm(blocks, generator=torch.Generator().manual_seed(3))[: len(shifts)].tolist()
    run = noise(len(shifts), mover.block_size_bytes, seed=2)
    expected, in_cache = before.clone(), iter(_pieces(cache, ids, 0, range(model.layers)))
    moves: list[Turn] = []
    for at, shift in enumerate(shifts):
        # Every token by a way of its own: a key turned as its neighbour should would not show otherwise.
        now_at = torch.arange(model.block_tokens, device=device) + (first_place + at) * model.block_tokens
        computed_at = 3 * (now_at - shift)
        if shift:
            moves.append(turn_between(model.rope, computed_at=computed_at, now_at=now_at))
        for number, part in enumerate(run[at].view(len(layers), -1)):
            moved_part = part.clone()
            if shift and number % model.parts_of_layer == 0:
                keys = model.keys_in(part)
                # The rest stays noise: whatever its bits mean, NaN too.
                keys.copy_(torch.randn(keys.shape, generator=torch.Generator().manual_seed(at)))
                moved_part = part.clone()
                places = (place.view(model.kernel_blocks, 1, -1) for place in (computed_at, now_at))
                model.keys_in(moved_part).copy_(_moved(keys.to(device), model.rope, *places))
            _, there, size = next(in_cache)
            expected[there : there + size] = moved_part
    turn = turned(model.rope, shifts, first_place=first_place, tokens=model.block_tokens, device=device)
    assert (turn is None) == (not moves)
    if turn is not None:
        tables = [
            torch.stack(of_blocks) for of_blocks in zip(*((move.cosine, move.sine) for move in moves), strict=True)
        ]
        turn = replace(turn, cosine=tables[0], sine=tables[1])
    run_there = run.to(device)
    block_ids = torch.tensor(ids, dtype=torch.int32, device=device)
    for layer in range(model.layers):
        mover.scatter(run_there, block_ids, first_layer=layer, end_layer=layer + 1, turn=turn)
    assert torch.equal(memory.cpu(), expected)
    assert torch.equal(run_there.cpu(), run)


def _moved(keys: torch.Tensor, rope: Rope, computed_at: torch.Tensor, now_at: torch.Tensor) -> torch.Tensor:
    if keys.is_cuda or keys.dtype != torch.bfloat16:
        return moved(keys, rope, computed_at=computed_at, now_at=now_at)
    exact = moved(keys.float(), rope, computed_at=computed_at, now_at=now_at)
    cut_off = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
    # What carries no position was never float32.
    return torch.cat([cut_off[..., : rope.rotary_dims], keys[..., rope.rotary_dims :]], dim=-1)


CHECKS: dict[str, Callable[[torch.device], None]] = {
    check.__name__: check for check in (copies_every_byte_and_no_other, turns_keys_and_nothing_else)
}

if __name__ == "__main__":
    from tests import conftest  # noqa: F401  # the house's settings of hypothesis

    CHECKS[sys.argv[1]](torch.device("cpu"))
