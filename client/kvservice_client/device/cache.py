"""Where an engine keeps its blocks in GPU memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvservice_client.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class CachePart:
    """One part of every block: block `b`'s is at `address + b * block_stride_bytes`.

    Attributes:
        layer: the layer that needs it first.
    """

    address: int
    block_stride_bytes: int
    size_bytes: int
    layer: int = 0


@dataclass(frozen=True, slots=True)
class DeviceCache:
    """A KV cache of `blocks` blocks; a block's bytes are its parts', in this order."""

    blocks: int
    parts: tuple[CachePart, ...]

    @classmethod
    def of_tensors(cls, layers: Sequence[Sequence[Any]]) -> DeviceCache:
        """Of CUDA tensors whose first dimension is the block.

        Args:
            layers: for each layer its tensors [blocks, ...], in the order of the block's bytes: one, or keys and
                values apart (`kv[0], kv[1]` of a [2, blocks, ...] tensor). A cache that is contiguous across layers is
                one layer of one tensor: it is there as a whole or not at all.

        Raises:
            InvalidRequest: a tensor is not on a GPU, has another number of blocks, or a block of it is not contiguous.
        """
        tensors = [(layer, tensor) for layer, of_layer in enumerate(layers) for tensor in of_layer]
        if not tensors:
            raise InvalidRequest("a KV cache without tensors")
        blocks = {int(tensor.shape[0]) for _, tensor in tensors}
        if len(blocks) != 1:
            raise InvalidRequest(f"the tensors have {sorted(blocks)} blocks; their first dimension must be the block")
        return cls(blocks.pop(), tuple(_part(tensor, layer) for layer, tensor in tensors))

    @property
    def block_size_bytes(self) -> int:
        """Bytes of one block."""
        return sum(part.size_bytes for part in self.parts)


def _part(tensor: Any, layer: int) -> CachePart:
    """Torch is not imported here: a tensor is what has these."""
    if tensor.device.type != "cuda":
        raise InvalidRequest(f"a tensor on {tensor.device} in a KV cache on a GPU")
    if not tensor[0].is_contiguous():
        raise InvalidRequest(f"layer {layer}: the bytes of a block are not contiguous: name its parts as views")
    return CachePart(
        address=int(tensor.data_ptr()),
        block_stride_bytes=int(tensor.stride(0)) * tensor.element_size(),
        size_bytes=tensor[0].numel() * tensor.element_size(),
        layer=layer,
    )
