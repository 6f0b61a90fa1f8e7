"""geometry: where the bytes of an engine's blocks are in GPU memory.

Pure: numbers in, numbers out. A block of the service is a run of bytes; the engine keeps it as *pieces*, in this
order: one per block where the engine's blocks are contiguous across layers, one or two per layer where each layer has
a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

PIECES_MAX = 4096
LAYERS_MAX = 1024
BLOCKS_MAX = 1 << 31


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of every block.

    Attributes:
        region: which registered region it is in.
        offset_bytes: where block 0's part starts in the region.
        block_stride_bytes: from one block's part to the next block's.
        size_bytes: how long the part is.
        layer: the layer that needs it; a piece of several layers carries the first of them.
    """

    region: int
    offset_bytes: int
    block_stride_bytes: int
    size_bytes: int
    layer: int = 0


@dataclass(frozen=True)
class Geometry:
    """How an engine's blocks are arranged in its registered regions."""

    blocks: int
    pieces: tuple[Piece, ...]

    @property
    def block_size_bytes(self) -> int:
        """Bytes of one block, all pieces together."""
        return sum(piece.size_bytes for piece in self.pieces)

    @cached_property
    def layers(self) -> int:
        """How many layers are told apart."""
        return max(piece.layer for piece in self.pieces) + 1

    @cached_property
    def by_layer(self) -> list[list[tuple[int, Piece]]]:
        """For each layer its pieces, each with where it starts in the block."""
        found: list[list[tuple[int, Piece]]] = [[] for _ in range(self.layers)]
        start = 0
        for piece in self.pieces:
            found[piece.layer].append((start, piece))
            start += piece.size_bytes
        return found

    def require_fits(self, region_sizes_bytes: Sequence[int], *, block_size_bytes: int) -> None:
        """Whether every byte of every block lies inside its region, and a block is what the namespace says.

        Raises:
            ValueError: what does not fit, and by how much.
        """
        if not 1 <= self.blocks <= BLOCKS_MAX:
            raise ValueError(f"{self.blocks} blocks, must be 1 to {BLOCKS_MAX}")
        if not 1 <= len(self.pieces) <= PIECES_MAX:
            raise ValueError(f"{len(self.pieces)} pieces per block, must be 1 to {PIECES_MAX}")
        for position, piece in enumerate(self.pieces):
            _require_piece_fits(position, piece, self.blocks, region_sizes_bytes)
        if self.block_size_bytes != block_size_bytes:
            raise ValueError(
                f"the pieces of a block have {self.block_size_bytes} bytes, a block of the namespace {block_size_bytes}"
            )


def _require_piece_fits(position: int, piece: Piece, blocks: int, region_sizes_bytes: Sequence[int]) -> None:
    if not 0 <= piece.region < len(region_sizes_bytes):
        raise ValueError(f"piece {position} is in region {piece.region}, of {len(region_sizes_bytes)}")
    if not 0 <= piece.layer < LAYERS_MAX:
        raise ValueError(f"piece {position} is of layer {piece.layer}, must be 0 to {LAYERS_MAX - 1}")
    if piece.size_bytes < 1 or piece.offset_bytes < 0:
        raise ValueError(f"piece {position} has {piece.size_bytes} bytes at {piece.offset_bytes}")
    if blocks > 1 and piece.block_stride_bytes < piece.size_bytes:
        raise ValueError(
            f"piece {position}: blocks are {piece.block_stride_bytes} bytes apart and {piece.size_bytes} long"
        )
    end = piece.offset_bytes + (blocks - 1) * piece.block_stride_bytes + piece.size_bytes
    if end > region_sizes_bytes[piece.region]:
        raise ValueError(
            f"piece {position} of the last block ends at byte {end} of region {piece.region}, which has "
            f"{region_sizes_bytes[piece.region]}"
        )
