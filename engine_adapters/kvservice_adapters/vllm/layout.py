"""layout: where each block's bytes lie in the engine's KV tensors.

vLLM keeps one tensor per layer, or one for several layers at other offsets. Whatever the order of its dimensions, a
block is one or a few contiguous pieces of every layer, a fixed stride apart from the next block's. The adapter copies
these pieces whole and never looks inside: the CPU backend, for one, stores keys transposed. A block in the store is all
its pieces, one after the other, layer by layer in the engine's order.

    engine, layer 0   | block 0 | block 1 | block 2 | ...        a Region: address, stride, size
    engine, layer 1   | block 0 | block 1 | block 2 | ...
    store, block 1    | layer 0 | layer 1 | ...                  block_size_bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch


class UnsupportedLayout(ValueError):
    """A block of this tensor is not made of a few contiguous pieces; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Region:
    """The same piece of every block: block b's starts at address + b * stride_bytes.

    Attributes:
        tensor: the layer's, as the engine registered it.
    """

    address: int
    stride_bytes: int
    size_bytes: int
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All regions, in the order in which the store keeps them."""

    regions: tuple[Region, ...]
    blocks: int
    device: torch.device

    @property
    def block_size_bytes(self) -> int:
        """Of all layers together."""
        return sum(region.size_bytes for region in self.regions)

    def addresses(self, block_id: int) -> list[tuple[int, int]]:
        """(address, size in bytes) of the block's pieces."""
        return [(region.address + block_id * region.stride_bytes, region.size_bytes) for region in self.regions]

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """(address, stride in bytes, size in bytes) of what is contiguous in a block, across layers too, in order."""
        pieces: list[tuple[int, int, int]] = []
        for region in self.regions:
            address, stride, size = region.address, region.stride_bytes, region.size_bytes
            if pieces:
                first, before, so_far = pieces[-1]
                if before == stride and first + so_far == address and so_far + size <= stride:
                    address, size = first, so_far + size
                    pieces.pop()
            pieces.append((address, stride, size))
        return pieces


def layout_of(kv_caches: Mapping[str, torch.Tensor], *, blocks: int) -> KVLayout:
    """Find the pieces.

    Args:
        kv_caches: one tensor per layer, as the engine registers them; layers may share a tensor.
        blocks: how many blocks the engine's block ids count.

    Raises:
        UnsupportedLayout: see there.
    """
    devices = {tensor.device for tensor in kv_caches.values()}
    if len(devices) != 1:
        raise UnsupportedLayout(f"the KV tensors are on {len(devices)} devices: {sorted(map(str, devices))}")
    regions: dict[tuple[int, int], Region] = {}
    for name, tensor in kv_caches.items():
        for region in _regions_of(name, tensor, blocks):
            regions.setdefault((region.address, region.size_bytes), region)
    return KVLayout(tuple(regions.values()), blocks, devices.pop())


def _regions_of(name: str, tensor: torch.Tensor, blocks: int) -> list[Region]:
    item = tensor.element_size()
    dims = [(size, stride * item) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    # The engine's kernels may use smaller blocks than its block ids count: then a block is several in a row.
    candidates = [dim for dim in dims if dim[0] % blocks == 0]
    if not candidates:
        raise UnsupportedLayout(f"{name}: no dimension of {tuple(tensor.shape)} counts the {blocks} blocks")
    size, kernel_stride = max(candidates, key=lambda dim: dim[1])
    kernel_blocks = size // blocks
    outer = [dim for dim in dims if dim[1] > kernel_stride and dim[0] > 1]
    dense_bytes = item
    for length, stride in sorted(
        (dim for dim in dims if dim[1] < kernel_stride and dim[0] > 1), key=lambda dim: dim[1]
    ):
        if stride != dense_bytes:
            raise UnsupportedLayout(
                f"{name}: the bytes of a block are not contiguous: {tensor.shape} {tensor.stride()}"
            )
        dense_bytes *= length
    if kernel_blocks > 1 and dense_bytes != kernel_stride:
        raise UnsupportedLayout(f"{name}: a block is {kernel_blocks} kernel blocks that are not adjacent")
    return [
        Region(
            tensor.data_ptr() + sum(place * stride for place, (_, stride) in zip(places, outer, strict=True)),
            kernel_stride * kernel_blocks,
            dense_bytes * kernel_blocks,
            tensor,
        )
        for places in product(*(range(length) for length, _ in outer))
    ]
