"""layout: where each block's bytes lie in the engine's KV tensors, and how they are moved to and from plain memory.

vLLM keeps one tensor per layer, or one for several layers at other offsets. Whatever the order of its dimensions, a
block is one or a few contiguous pieces of every layer, a fixed stride apart from the next block's. The adapter copies
these pieces whole and never looks inside: the CPU backend, for one, stores keys transposed. A block in the store is all
its pieces, one after the other, layer by layer in the engine's order.

    engine, layer 0   | block 0 | block 1 | block 2 | ...        a Region: address, stride, size
    engine, layer 1   | block 0 | block 1 | block 2 | ...
    store, block 1    | layer 0 | layer 1 | ...                  block_size_bytes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch

from kvservice_client.memory import Copy, ThreadedCopier

_STAGING_BYTES_MAX = 64 << 20


class UnsupportedLayout(ValueError):
    """A block of this tensor is not made of a few contiguous pieces; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Region:
    """The same piece of every block: block b's starts at address + b * stride_bytes.

    Attributes:
        tensor: which it lies in, for copies that go through torch; flat bytes [blocks, size_bytes].
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
        _region(
            tensor,
            offset_bytes=sum(place * stride for place, (_, stride) in zip(places, outer, strict=True)),
            stride_bytes=kernel_stride * kernel_blocks,
            size_bytes=dense_bytes * kernel_blocks,
            blocks=blocks,
        )
        for places in product(*(range(length) for length, _ in outer))
    ]


def _region(tensor: torch.Tensor, *, offset_bytes: int, stride_bytes: int, size_bytes: int, blocks: int) -> Region:
    start = tensor.storage_offset() * tensor.element_size() + offset_bytes
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    flat.set_(tensor.untyped_storage(), start, (blocks, size_bytes), (stride_bytes, 1))
    return Region(tensor.data_ptr() + offset_bytes, stride_bytes, size_bytes, flat)


class Fence(Protocol):
    """A point in the engine's work on its device."""

    def synchronize(self) -> None:
        """Block until that work is done."""
        ...


class BlockMemory(Protocol):
    """The engine's blocks, to be copied whole. Any thread; a call blocks until its bytes are there."""

    layout: KVLayout

    def fence(self) -> Fence | None:
        """On the engine's thread, after it launched a step: what reads of that step's blocks must wait for."""
        ...

    def read(self, block_ids: Sequence[int], addresses: Sequence[int], after: Fence | None) -> None:
        """Copy engine blocks to plain memory: block block_ids[i], all layers, to addresses[i]."""
        ...

    def write(self, block_ids: Sequence[int], addresses: Sequence[int]) -> None:
        """Copy plain memory into engine blocks: from addresses[i] into block block_ids[i]."""
        ...


def block_memory(layout: KVLayout, copier: ThreadedCopier) -> BlockMemory:
    """The way to that layout's memory."""
    return HostBlocks(layout, copier) if layout.device.type == "cpu" else StagedBlocks(layout, copier)


class HostBlocks:
    """KV tensors in host memory: straight copies from address to address."""

    def __init__(self, layout: KVLayout, copier: ThreadedCopier) -> None:
        self.layout = layout
        self._copier = copier

    def fence(self) -> Fence | None:
        """None: the CPU backend's step is over when it returns."""
        return None

    def read(self, block_ids: Sequence[int], addresses: Sequence[int], after: Fence | None) -> None:
        """See BlockMemory."""
        self._copier.copy([Copy(there, here, size) for there, here, size in self._pieces(block_ids, addresses)])

    def write(self, block_ids: Sequence[int], addresses: Sequence[int]) -> None:
        """See BlockMemory."""
        self._copier.copy([Copy(here, there, size) for there, here, size in self._pieces(block_ids, addresses)])

    def _pieces(self, block_ids: Sequence[int], addresses: Sequence[int]) -> list[tuple[int, int, int]]:
        pieces = []
        for block_id, start in zip(block_ids, addresses, strict=True):
            there = start
            for here, size in self.layout.addresses(block_id):
                pieces.append((there, here, size))
                there += size
        return pieces


class StagedBlocks:
    """KV tensors on a device: gathered and scattered by torch, through host memory that the device can reach fast.

    Right on every device that torch knows; the copies between staging and the store's memory are the price.
    """

    def __init__(self, layout: KVLayout, copier: ThreadedCopier) -> None:
        self.layout = layout
        self._copier = copier
        self._blocks_at_once = max(1, _STAGING_BYTES_MAX // layout.block_size_bytes)

    def fence(self) -> Fence | None:
        """An event behind everything that was launched so far."""
        if self.layout.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.layout.device))
        return event

    def read(self, block_ids: Sequence[int], addresses: Sequence[int], after: Fence | None) -> None:
        """See BlockMemory."""
        if after is not None:
            after.synchronize()
        for ids, starts in self._portions(block_ids, addresses):
            staging = self._staging(len(ids))
            chosen = torch.tensor(ids, device=self.layout.device)
            for columns, region in self._columns(staging):
                columns.copy_(region.tensor.index_select(0, chosen))
            self._copier.copy(
                [Copy(start, int(row.data_ptr()), row.numel()) for start, row in zip(starts, staging, strict=True)]
            )

    def write(self, block_ids: Sequence[int], addresses: Sequence[int]) -> None:
        """See BlockMemory."""
        for ids, starts in self._portions(block_ids, addresses):
            staging = self._staging(len(ids))
            self._copier.copy(
                [Copy(int(row.data_ptr()), start, row.numel()) for start, row in zip(starts, staging, strict=True)]
            )
            chosen = torch.tensor(ids, device=self.layout.device)
            for columns, region in self._columns(staging):
                region.tensor.index_copy_(0, chosen, columns.to(self.layout.device))
        if self.layout.device.type == "cuda":
            # This thread's stream: the blocks are not handed to the engine before they are there.
            torch.cuda.current_stream(self.layout.device).synchronize()

    def _portions(
        self, block_ids: Sequence[int], addresses: Sequence[int]
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        step = self._blocks_at_once
        return [
            (block_ids[start : start + step], addresses[start : start + step])
            for start in range(0, len(block_ids), step)
        ]

    def _staging(self, blocks: int) -> torch.Tensor:
        size = self.layout.block_size_bytes
        return torch.empty((blocks, size), dtype=torch.uint8, pin_memory=self.layout.device.type == "cuda")

    def _columns(self, staging: torch.Tensor) -> list[tuple[torch.Tensor, Region]]:
        columns = []
        start = 0
        for region in self.layout.regions:
            columns.append((staging[:, start : start + region.size_bytes], region))
            start += region.size_bytes
        return columns
