"""Where keys stand in an engine's blocks, and their turning there: CPU packings and GPU layouts, by shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice_adapters.positions import Rope, RopeForm, UnsupportedPositions, moved
from kvservice_adapters.positions.rope import NO_ROTATION
from kvservice_adapters.vllm.keys import (
    CacheWriter,
    GatheredKeys,
    KeyTurner,
    LayerKeys,
    PackedKeys,
    StridedKeys,
    layer_keys,
    packed_keys,
    places_written,
    split_keys,
)

pytestmark = pytest.mark.unit

BLOCKS, HEADS, TOKENS, DIM, LAYERS = 7, 3, 32, 8, 2
ROPE = Rope(tuple(100.0 ** (-pair / 3) for pair in range(3)))  # of 8 dimensions 6
Caches = list[torch.Tensor]
SHIFTS = [-3 * TOKENS, 0, 2 * TOKENS]


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def per_layer() -> Caches:
    """[blocks, heads, tokens, 2 * dim], dense: LBHNC."""
    return list(filled(LAYERS, BLOCKS, HEADS, TOKENS, 2 * DIM))


def across_layers() -> Caches:
    """A block's layers side by side: BLHNC."""
    return list(filled(BLOCKS, LAYERS, HEADS, TOKENS, 2 * DIM).transpose(0, 1))


def tokens_first() -> Caches:
    """Memory has tokens before heads; the engine's order of dimensions is the same: LBNHC."""
    return list(filled(LAYERS, BLOCKS, TOKENS, HEADS, 2 * DIM).transpose(2, 3))


def half_precision() -> Caches:
    return list(filled(LAYERS, BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16))


def smaller_kernel_blocks() -> Caches:
    """Two kernel blocks to each of the engine's."""
    return list(filled(LAYERS, 2 * BLOCKS, HEADS, TOKENS // 2, 2 * DIM))


def transposed(token: torch.Tensor, dim: torch.Tensor) -> torch.Tensor:
    """Where the CPU's vector code puts a key's dimension."""
    return dim * TOKENS + token


def in_tiles(token: torch.Tensor, dim: torch.Tensor) -> torch.Tensor:
    """Where AMX wants it."""
    return token // 16 * (16 * DIM) + dim // 2 * 32 + token % 16 * 2 + dim % 2


PLACES = {order.__name__: order(torch.arange(TOKENS)[:, None], torch.arange(DIM)) for order in (transposed, in_tiles)}


def as_split(tensor: torch.Tensor) -> LayerKeys:
    return split_keys(tensor, DIM)


def as_gathered(tensor: torch.Tensor) -> LayerKeys:
    """As on a device."""
    return GatheredKeys(tensor[..., :DIM])


def as_packed(places: str) -> Callable[[torch.Tensor], LayerKeys]:
    return lambda tensor: packed_keys(tensor, PLACES[places])


def keys_of(tensor: torch.Tensor, places: str = "") -> torch.Tensor:
    """A copy of all keys by indexing as the kernels do: [kernel blocks, heads, tokens, dim]."""
    if not places:
        return tensor[..., :DIM].clone()
    blocks, heads, tokens, both = tensor.shape
    return tensor.reshape(blocks, heads, tokens * both)[..., PLACES[places].flatten()].view(blocks, heads, tokens, DIM)


def put_keys(tensor: torch.Tensor, keys: torch.Tensor, places: str) -> None:
    """The other way."""
    if not places:
        tensor[..., :DIM] = keys
        return
    blocks, heads, tokens, both = tensor.shape
    tensor.view(blocks, heads, tokens * both)[..., PLACES[places].flatten()] = keys.flatten(2)


CASES: list[tuple[Callable[[], Caches], str]] = [
    (per_layer, ""),
    (across_layers, ""),
    (tokens_first, ""),
    (half_precision, ""),
    (smaller_kernel_blocks, ""),
    (per_layer, "transposed"),
    (half_precision, "transposed"),
    (half_precision, "in_tiles"),
]


@pytest.mark.parametrize("form", RopeForm)
@pytest.mark.parametrize("split", [as_split, as_gathered])
@pytest.mark.parametrize(("make", "places"), CASES)
def test_keys_of_moved_blocks_turn_and_nothing_else_changes(
    make: Callable[[], Caches], places: str, form: RopeForm, split: Callable[[torch.Tensor], LayerKeys]
) -> None:
    caches, before = make(), make()
    rope = Rope(ROPE.inverse_frequencies, form)
    kernel_blocks, tokens = caches[0].shape[0] // BLOCKS, caches[0].shape[2]
    keys = as_packed(places) if places else split
    layers = {number: keys(tensor) for number, tensor in enumerate(caches)}
    turner = KeyTurner(rope, layers, torch.device("cpu"), kernel_blocks=kernel_blocks, kernel_tokens=tokens)
    assert turner.turn([5, 1, 6], [4, 5, 6], SHIFTS) == 2
    for tensor, original in zip(caches, before, strict=True):
        expected = keys_of(original, places).view(BLOCKS, kernel_blocks, HEADS, tokens, DIM)
        for block, place, shift in zip([5, 1, 6], [4, 5, 6], SHIFTS, strict=True):
            for part in range(kernel_blocks):
                now = torch.arange(tokens) + place * TOKENS + part * tokens
                expected[block, part] = moved(expected[block, part], rope, computed_at=now - shift, now_at=now)
        assert torch.equal(keys_of(tensor, places), expected.flatten(0, 1))
        # Values, and every bit of blocks that did not move.
        put_keys(tensor, keys_of(original, places), places)
        assert torch.equal(tensor, original)


def test_the_cpus_orders_are_views_where_they_can_be() -> None:
    tensor = filled(BLOCKS, HEADS, TOKENS, 2 * DIM)
    assert isinstance(packed_keys(tensor, PLACES["transposed"]), StridedKeys)
    assert isinstance(packed_keys(tensor, PLACES["in_tiles"]), PackedKeys)


def test_keys_without_positions_stay_as_they_are() -> None:
    caches, before = per_layer(), per_layer()
    layers = {number: as_split(tensor) for number, tensor in enumerate(caches)}
    turner = KeyTurner(NO_ROTATION, layers, torch.device("cpu"), kernel_blocks=1, kernel_tokens=TOKENS)
    assert turner.turn([5, 1, 6], [4, 5, 6], SHIFTS) == 2
    assert all(torch.equal(tensor, original) for tensor, original in zip(caches, before, strict=True))


def writer(places: torch.Tensor) -> CacheWriter:
    def write(keys: torch.Tensor, cache: torch.Tensor) -> None:
        cache.zero_()
        cache.view(-1)[places] = keys[:, 0]

    return write


@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(deadline=None, max_examples=20)
def test_any_order_of_a_kernel_is_found_out(seed: int, dtype: torch.dtype) -> None:
    order = torch.randperm(TOKENS * DIM, generator=torch.Generator().manual_seed(seed)).view(TOKENS, DIM)
    assert torch.equal(places_written(writer(order), tokens=TOKENS, head_dim=DIM, dtype=dtype), order)


def test_a_kernel_that_keeps_keys_elsewhere_is_refused() -> None:
    def elsewhere(keys: torch.Tensor, cache: torch.Tensor) -> None:
        cache.view(TOKENS, 2 * DIM)[:, :DIM] = keys[:, 0]

    with pytest.raises(UnsupportedPositions, match="first half"):
        places_written(elsewhere, tokens=TOKENS, head_dim=DIM, dtype=torch.float32)


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "why"),
    [
        ((BLOCKS, HEADS, TOKENS, 2 * DIM), torch.float32, "FLASHMLA", "FLASHMLA"),
        ((BLOCKS, HEADS, TOKENS, 2 * DIM), torch.uint8, "FLASH_ATTN", "second time"),
        ((BLOCKS, TOKENS, 5 * DIM), torch.float32, "FLASH_ATTN", "not known"),
        ((BLOCKS, HEADS, TOKENS, 3 * DIM), torch.float32, "CPU_ATTN", "not known"),
    ],
)
def test_what_is_not_known_is_refused(shape: tuple[int, ...], dtype: torch.dtype, backend: str, why: str) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    with pytest.raises(UnsupportedPositions, match=why):
        layer_keys(tensor, backend=backend, head_dim=DIM, write=writer(PLACES["transposed"]))


@pytest.mark.parametrize("backend", ["CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"])
def test_known_backends_keys_are_found(backend: str) -> None:
    tensor = filled(BLOCKS, HEADS, TOKENS, 2 * DIM)
    found = layer_keys(tensor, backend=backend, head_dim=DIM, write=writer(PLACES["transposed"]))
    expected = keys_of(tensor, "transposed" if backend == "CPU_ATTN" else "")
    assert isinstance(found, StridedKeys)
    assert torch.equal(found.view, expected)
