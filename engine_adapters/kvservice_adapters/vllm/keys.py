"""keys: where a token's key stands inside the engine's blocks, and how it is turned there when the token moved.

Of a layer's tensor [kernel blocks, kv_heads, tokens, 2 * head_dim] (in the engine's order of dimensions, whatever
memory's) the GPU backends keep a key in the first half of its token's row. The CPU backend sees a head's part of a
block as one flat piece instead, keys in its first half, in an order that its kernel chooses by instruction set:
transposed by the vector code, in tiles by AMX. So that order is not assumed but asked for: the engine's own kernel
writes numbered keys into a block, and where they went is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvservice_adapters.positions import Rope, Turn, UnsupportedPositions, turn_between

_BLOCKS_AT_ONCE = 32
_SPLIT_BACKENDS = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"})
_KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DIGIT = 128  # every number below it is exact in every dtype

CacheWriter = Callable[[torch.Tensor, torch.Tensor], None]
"""Writes keys [tokens, kv_heads, head_dim] as block 0 of a tensor like a layer's, as the engine's kernel does."""


class LayerKeys(Protocol):
    """The keys of one layer's tensor."""

    def turn(self, kernel_blocks: Sequence[int], turn: Turn) -> None:
        """Turn these blocks' keys in place; the turn's first dimension is theirs, its second that of heads."""
        ...


@dataclass(frozen=True, slots=True)
class StridedKeys:
    """Keys that a view shows in order, in host memory: block by block, without a copy.

    Attributes:
        view: [kernel blocks, kv_heads, tokens, head_dim].
    """

    view: torch.Tensor

    def turn(self, kernel_blocks: Sequence[int], turn: Turn) -> None:
        """See LayerKeys."""
        if self.view.stride(-2) < self.view.stride(-1):
            turn = turn.transposed()
        for at, block in enumerate(kernel_blocks):
            turn.at(at).apply(self.view[block])


@dataclass(frozen=True, slots=True)
class GatheredKeys:
    """The same on a device, where many small operations cost more than a copy: all blocks at once."""

    view: torch.Tensor

    def turn(self, kernel_blocks: Sequence[int], turn: Turn) -> None:
        """See LayerKeys."""
        chosen = torch.tensor(kernel_blocks, device=self.view.device)
        keys = self.view[chosen]
        turn.apply(keys)
        self.view[chosen] = keys


@dataclass(frozen=True, slots=True)
class PackedKeys:
    """Keys in an order that no view shows.

    Attributes:
        flat: [kernel blocks, kv_heads, elements].
        places: int64 [tokens, head_dim]: each one's place among the elements.
    """

    flat: torch.Tensor
    places: torch.Tensor

    def turn(self, kernel_blocks: Sequence[int], turn: Turn) -> None:
        """See LayerKeys."""
        chosen = torch.tensor(kernel_blocks)
        whole = self.flat[chosen]
        keys = whole[..., self.places]
        turn.apply(keys)
        whole[..., self.places] = keys
        self.flat[chosen] = whole


def split_keys(tensor: torch.Tensor, head_dim: int) -> LayerKeys:
    """The keys of a GPU backend's tensor, whatever its strides."""
    view = tensor[..., :head_dim]
    return StridedKeys(view) if tensor.device.type == "cpu" else GatheredKeys(view)


def packed_keys(tensor: torch.Tensor, places: torch.Tensor) -> LayerKeys:
    """The keys of a tensor whose blocks' interior is flat; `places` as in PackedKeys."""
    blocks, heads, tokens, both = tensor.shape
    flat = tensor.view(blocks, heads, tokens * both)
    by_token, by_dim = int(places[1, 0]), int(places[0, 1])
    count = torch.arange(tokens)[:, None] * by_token + torch.arange(places.shape[1]) * by_dim
    if not torch.equal(count, places):
        return PackedKeys(flat, places)
    block_stride, head_stride, _ = flat.stride()
    shape, strides = (blocks, heads, *places.shape), (block_stride, head_stride, by_token, by_dim)
    return StridedKeys(flat.as_strided(shape, strides, flat.storage_offset()))


def places_written(write: CacheWriter, *, tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Where the engine's kernel puts each dimension of each token's key: int64 [tokens, head_dim]; see PackedKeys.

    Raises:
        UnsupportedPositions: it does not put every one into a place of its own.
    """
    elements = tokens * head_dim
    number = torch.zeros(2 * elements, dtype=torch.int64)
    ordered = torch.arange(elements)
    worth = 1
    while worth < elements:
        cache = torch.full((1, 1, tokens, 2 * head_dim), -1.0, dtype=dtype)
        write((ordered // worth % _DIGIT).to(dtype).view(tokens, 1, head_dim), cache)
        number += cache.flatten().to(torch.int64) * worth
        worth *= _DIGIT
    # The other half was written by the values, or by nobody.
    found = number[:elements]
    if not torch.equal(found.sort().values, ordered):
        raise UnsupportedPositions("the CPU backend's kernel does not keep the keys of a block in its first half")
    places = torch.empty(elements, dtype=torch.int64)
    places[found] = ordered
    return places.view(tokens, head_dim)


def layer_keys(tensor: torch.Tensor, *, backend: str, head_dim: int, write: CacheWriter) -> LayerKeys:
    """The keys of a layer's tensor.

    Raises:
        UnsupportedPositions: it is not known where they stand.
    """
    if tensor.dtype not in _KEY_DTYPES:
        raise UnsupportedPositions(f"keys are kept in {tensor.dtype}: rotating them would round them a second time")
    if tensor.dim() != 4 or tensor.shape[-1] != 2 * head_dim:
        raise UnsupportedPositions(f"a KV tensor of shape {tuple(tensor.shape)} with heads of {head_dim} is not known")
    if backend in _SPLIT_BACKENDS:
        block, _, token, dim = tensor.stride()
        if dim != 1 or token > block:
            raise UnsupportedPositions(f"a block's keys are no rows in a KV tensor with strides {tensor.stride()}")
        return split_keys(tensor, head_dim)
    if backend == "CPU_ATTN":
        places = places_written(write, tokens=tensor.shape[2], head_dim=head_dim, dtype=tensor.dtype)
        return packed_keys(tensor, places)
    raise UnsupportedPositions(f"where the attention backend {backend} keeps keys is not known")


class KeyTurner:
    """Turns the keys of the engine's blocks, in place. Any thread, as long as the blocks are nobody else's."""

    def __init__(
        self,
        rope: Rope,
        layers: Mapping[int, LayerKeys],
        device: torch.device,
        *,
        kernel_blocks: int,
        kernel_tokens: int,
    ) -> None:
        """Turn keys of these layers.

        Args:
            layers: by the address of their tensor: layers that share one are turned once.
            device: where these tensors are.
            kernel_blocks: of one of the engine's blocks.
            kernel_tokens: of one of the kernel's blocks.
        """
        self.rope = rope
        self.layers = layers
        self._device = device
        self._kernel_blocks = kernel_blocks
        self._kernel_tokens = kernel_tokens

    def turn(self, block_ids: Sequence[int], places: Sequence[int], shifts_tokens: Sequence[int]) -> int:
        """Turn these blocks' keys from where they were computed to where they stand now; how many blocks moved.

        Args:
            places: of each block in its request, in blocks.
            shifts_tokens: where each block's tokens stand now, less where they stood then; 0: it is left alone.
        """
        shifted = [at for at, shift in enumerate(shifts_tokens) if shift]
        if self.rope.rotates:
            for start in range(0, len(shifted), _BLOCKS_AT_ONCE):
                chosen = shifted[start : start + _BLOCKS_AT_ONCE]
                kernel_blocks = [
                    block_ids[at] * self._kernel_blocks + part for at in chosen for part in range(self._kernel_blocks)
                ]
                turn = self._turn_of([places[at] for at in chosen], [shifts_tokens[at] for at in chosen])
                for layer in self.layers.values():
                    layer.turn(kernel_blocks, turn)
        if self._device.type == "cuda":
            # This thread's stream: the blocks are not handed to the engine before their keys are right.
            torch.cuda.current_stream(self._device).synchronize()
        return len(shifted)

    def _turn_of(self, places: Sequence[int], shifts_tokens: Sequence[int]) -> Turn:
        """Of these blocks' kernel blocks: [kernel blocks, 1, tokens]."""
        parts, tokens = self._kernel_blocks, self._kernel_tokens
        first = torch.tensor(places, device=self._device) * (parts * tokens)
        now_at = first[:, None] + torch.arange(parts * tokens, device=self._device)
        computed_at = now_at - torch.tensor(shifts_tokens, device=self._device)[:, None]
        return turn_between(self.rope, computed_at=computed_at.view(-1, 1, tokens), now_at=now_at.view(-1, 1, tokens))
