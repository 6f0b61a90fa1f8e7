"""layout: how one block's bytes are arranged, and how they move in and out of an engine's cache.

One block is [layers, 2 (keys, values), kv_heads, tokens_per_block, head_dim], contiguous, in
the model's dtype; keys are as the cache holds them, already rotated to their position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

LAYOUT_NAME = "layers-kv-heads-tokens-dim"
LAYOUT_VERSION = 1

# One sequence's cache, layer by layer: (keys, values), each [kv_heads, tokens, head_dim].
KVRows: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BlockLayout:
    """The shape of a block. Two engines with equal layouts read each other's bytes."""

    layers: int
    kv_heads: int
    tokens_per_block: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "tokens_per_block", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not at least 1")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[layers, 2, kv_heads, tokens_per_block, head_dim]."""
        return (self.layers, 2, self.kv_heads, self.tokens_per_block, self.head_dim)

    @property
    def block_size_bytes(self) -> int:
        """Bytes of one block."""
        return math.prod(self.block_shape) * self.dtype.itemsize

    def as_blocks(self, memory: torch.Tensor) -> torch.Tensor:
        """View bytes, uint8 [blocks * block_size_bytes], as blocks [blocks, *block_shape]."""
        return memory.view(-1).view(self.dtype).view(-1, *self.block_shape)

    def gather(self, rows: KVRows, first_block: int, blocks: torch.Tensor) -> None:
        """Copy the tokens of `len(blocks)` blocks from `first_block` on out of a cache.

        Args:
            rows: The cache, at least (first_block + len(blocks)) * tokens_per_block tokens long.
            first_block: Index of the first block in the sequence.
            blocks: Destination [blocks, *block_shape] of the layout's dtype.

        Raises:
            ValueError: The cache is shorter, of another shape or of another dtype.
        """
        for layer, pair in enumerate(self._spans(rows, first_block, blocks)):
            for part, span in enumerate(pair):
                blocks[:, layer, part].copy_(span)

    def scatter(self, blocks: torch.Tensor, first_block: int, rows: KVRows) -> None:
        """Copy blocks [blocks, *block_shape] into a cache, the counterpart of `gather`.

        Raises:
            ValueError: The cache is shorter, of another shape or of another dtype.
        """
        for layer, pair in enumerate(self._spans(rows, first_block, blocks)):
            for part, span in enumerate(pair):
                span.copy_(blocks[:, layer, part])

    def _spans(self, rows: KVRows, first_block: int, blocks: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if blocks.dtype != self.dtype or tuple(blocks.shape[1:]) != self.block_shape:
            raise ValueError(
                f"blocks are {blocks.dtype} {list(blocks.shape[1:])}, not {self.dtype} {list(self.block_shape)}"
            )
        if len(rows) != self.layers:
            raise ValueError(f"the cache has {len(rows)} layers, not {self.layers}")
        return [
            (self._span(keys, first_block, len(blocks)), self._span(values, first_block, len(blocks)))
            for keys, values in rows
        ]

    def _span(self, row: torch.Tensor, first_block: int, blocks: int) -> torch.Tensor:
        # A view [blocks, kv_heads, tokens_per_block, head_dim] of the tokens of these blocks.
        start = first_block * self.tokens_per_block
        end = start + blocks * self.tokens_per_block
        heads, tokens, head_dim = row.shape
        # copy_ would convert the dtype without a word, and the bytes would no longer be the engine's.
        if row.dtype != self.dtype or (heads, head_dim) != (self.kv_heads, self.head_dim) or tokens < end:
            raise ValueError(
                f"the cache row is {row.dtype} {list(row.shape)}; needed: {self.dtype} "
                f"[{self.kv_heads}, at least {end}, {self.head_dim}]"
            )
        return row[:, start:end].view(heads, blocks, self.tokens_per_block, head_dim).transpose(0, 1)
