"""gpu_blocks: which way the blocks in GPU memory take.

A GPU's copy engines are fast with large pieces and slow with small ones. So blocks that are few large pieces are copied
straight from and to where they are, and others by way of a buffer, which kernels fill and empty.
"""

from __future__ import annotations

import logging

import torch

from kvservice_adapters.gpu.buffer import HbmBuffer, default_buffer_bytes
from kvservice_adapters.vllm.blocks import BlockMemory
from kvservice_adapters.vllm.buffered_blocks import BufferedBlocks, key_rows_of, layer_bytes_of, parts_of
from kvservice_adapters.vllm.direct_blocks import DirectBlocks
from kvservice_adapters.vllm.keys import KeyTurner
from kvservice_adapters.vllm.layout import KVLayout
from kvservice_client import Client

DIRECT_PIECE_BYTES_MIN = 256 << 10

_log = logging.getLogger(__name__)


def gpu_blocks(
    client: Client, layout: KVLayout, keys: KeyTurner | None, *, buffer_bytes: int = 0
) -> tuple[BlockMemory, str]:
    """The way to these blocks, and what to tell of it. Blocks, also while kernels are compiled.

    Args:
        keys: where keys are, and how they turn; None: blocks that moved are misses.
        buffer_bytes: of GPU memory, where a buffer is needed; 0: 3 %, at most a quarter of what is free.

    Raises:
        InvalidRequest: they are not on a GPU that can be used.
    """
    if min(size for _, _, size in layout.pieces) < DIRECT_PIECE_BYTES_MIN:
        try:
            return _buffered(client, layout, keys, buffer_bytes or _default_bytes(layout))
        except Exception:  # noqa: BLE001  # no memory for it, or no compiler for the kernels: the other way works too
            _log.warning("no buffer for KV blocks: copies of small pieces will be slow", exc_info=True)
    direct = DirectBlocks(client, layout, keys=keys)
    return direct, f"the engine's own blocks, {direct.plane}"


def _default_bytes(layout: KVLayout) -> int:
    # The engine may yet capture its graphs, out of the same memory.
    free_bytes, _ = torch.cuda.mem_get_info(layout.device)
    return min(default_buffer_bytes(layout.device, block_size_bytes=layout.block_size_bytes), free_bytes // 4)


def _buffered(client: Client, layout: KVLayout, keys: KeyTurner | None, size_bytes: int) -> tuple[BlockMemory, str]:
    from kvservice_adapters.gpu.kernels import BlockMover  # noqa: PLC0415  # needs Triton: without it there is no buffer

    rope = None if keys is None else keys.rope
    mover = BlockMover(
        parts_of(layout),
        dtype=layout.regions[0].tensor.dtype,
        device=layout.device,
        keys=key_rows_of(layout, keys) if keys is not None and keys.rope.rotates else None,
    )
    mover.prepare(rope)
    buffer = HbmBuffer(client, layer_bytes=layer_bytes_of(layout), size_bytes=size_bytes, device=layout.device)
    way = f"a buffer of {buffer.blocks} blocks ({size_bytes >> 20} MiB), {buffer.plane}"
    return BufferedBlocks(buffer, mover, layout, rope=rope), way
