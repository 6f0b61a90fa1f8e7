"""Where blocks lie in the engine's KV tensors: the CPU's layout and those of the GPU backends, by shape and stride."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from kvservice_adapters.vllm.blocks import HostCopies
from kvservice_adapters.vllm.layout import KVLayout, UnsupportedLayout, layout_of
from kvservice_client.memory import ThreadedCopier

pytestmark = pytest.mark.unit

BLOCKS, HEADS, TOKENS, DIM, LAYERS = 7, 3, 8, 4, 2
Caches = dict[str, torch.Tensor]
Blocks = Callable[[Caches, int], torch.Tensor]


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def per_layer() -> Caches:
    """One region per layer in one storage, as on the CPU: [blocks, heads, tokens, 2 * dim]."""
    whole = filled(LAYERS, BLOCKS, HEADS, TOKENS, 2 * DIM)
    return {f"layer {layer}": whole[layer] for layer in range(LAYERS)}


def across_layers() -> Caches:
    """A block's layers side by side: [blocks, layers, ...] seen layer by layer."""
    whole = filled(BLOCKS, LAYERS, HEADS, TOKENS, 2 * DIM)
    return {f"layer {layer}": whole[:, layer] for layer in range(LAYERS)}


def keys_apart() -> Caches:
    """Keys and values in halves of the tensor: [2, blocks, tokens, heads, dim]."""
    return {f"layer {layer}": filled(2, BLOCKS, TOKENS, HEADS, DIM) + layer for layer in range(LAYERS)}


def heads_first() -> Caches:
    """The kernel's order of dimensions differs from memory's: tokens and heads are swapped by strides."""
    return {
        f"layer {layer}": (filled(BLOCKS, 2, HEADS, TOKENS, DIM) + layer).permute(0, 1, 3, 2, 4)
        for layer in range(LAYERS)
    }


def half_precision() -> Caches:
    return {"layer 0": filled(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16)}


def smaller_kernel_blocks() -> Caches:
    """Two kernel blocks to each of the engine's: [2 * blocks, ...]."""
    return {"layer 0": filled(2 * BLOCKS, HEADS, TOKENS // 2, 2 * DIM)}


def latent() -> Caches:
    """MLA: [blocks, tokens, latent]."""
    return {"layer 0": filled(BLOCKS, TOKENS, 5 * DIM)}


LAYOUTS = [per_layer, across_layers, keys_apart, heads_first, half_precision, smaller_kernel_blocks, latent]


def block_of(caches: Caches, block_id: int) -> list[torch.Tensor]:
    """What belongs to a block, by indexing as the engine's kernels do."""
    found = []
    for tensor in caches.values():
        if tensor.shape[0] == 2 and tensor.shape[1] == BLOCKS:
            found.append(tensor[:, block_id])
        elif tensor.shape[0] == 2 * BLOCKS:
            found.append(tensor[2 * block_id : 2 * block_id + 2])
        else:
            found.append(tensor[block_id])
    return found


@pytest.fixture
def copier() -> Iterator[ThreadedCopier]:
    made = ThreadedCopier(threads=2)
    yield made
    made.close()


@pytest.mark.parametrize("make", LAYOUTS)
def test_blocks_move_between_two_engines_and_touch_no_other(make: Callable[[], Caches], copier: ThreadedCopier) -> None:
    mine, theirs = make(), make()
    for tensor in theirs.values():
        tensor.zero_()
    source = HostCopies(layout_of(mine, blocks=BLOCKS), copier)
    target = HostCopies(layout_of(theirs, blocks=BLOCKS), copier)
    size = source.layout.block_size_bytes
    held = ctypes.create_string_buffer(3 * size)
    slots = [ctypes.addressof(held) + position * size for position in (2, 0, 1)]
    source.read([5, 1, 6], slots)
    target.write([0, 3, 4], slots)
    for mine_id, their_id in ((5, 0), (1, 3), (6, 4)):
        for ours, other in zip(block_of(mine, mine_id), block_of(theirs, their_id), strict=True):
            assert torch.equal(ours, other)
    for untouched in (1, 2, 5, 6):
        assert all(not tensor.any() for tensor in block_of(theirs, untouched))


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_block_is_all_its_bytes_and_no_more(make: Callable[[], Caches]) -> None:
    caches = make()
    expected = sum(part.numel() * part.element_size() for part in block_of(caches, 0))
    assert layout_of(caches, blocks=BLOCKS).block_size_bytes == expected


@pytest.mark.parametrize(
    ("make", "pieces"),
    [(per_layer, LAYERS), (across_layers, 1), (keys_apart, 2 * LAYERS), (heads_first, LAYERS), (latent, 1)],
)
def test_what_is_contiguous_across_layers_is_one_piece(make: Callable[[], Caches], pieces: int) -> None:
    layout = layout_of(make(), blocks=BLOCKS)
    found = [(address + block * stride, size) for block in range(BLOCKS) for address, stride, size in layout.pieces]
    assert len(found) == BLOCKS * pieces
    in_memory = [b"".join(map(bytes_at, layout.addresses(block))) for block in range(BLOCKS)]
    assert b"".join(map(bytes_at, found)) == b"".join(in_memory)


def bytes_at(piece: tuple[int, int]) -> bytes:
    return ctypes.string_at(*piece)


def test_layers_that_share_a_tensor_are_stored_once() -> None:
    tensor = filled(BLOCKS, HEADS, TOKENS, 2 * DIM)
    alone: KVLayout = layout_of({"layer 0": tensor}, blocks=BLOCKS)
    shared = layout_of({"layer 0": tensor, "layer 1": tensor}, blocks=BLOCKS)
    assert shared.block_size_bytes == alone.block_size_bytes


@pytest.mark.parametrize(
    ("caches", "why"),
    [
        ({"a": torch.zeros(5, HEADS, TOKENS)}, "no dimension"),
        ({"a": torch.zeros(BLOCKS, HEADS, 2 * TOKENS)[:, :, ::2]}, "not contiguous"),
        ({"a": torch.zeros(2 * BLOCKS, 2 * HEADS, TOKENS)[:, :HEADS]}, "not adjacent"),
    ],
)
def test_what_is_not_made_of_whole_pieces_is_refused(caches: Caches, why: str) -> None:
    with pytest.raises(UnsupportedLayout, match=why):
        layout_of(caches, blocks=BLOCKS)
