"""How far along the queue it pays to look."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Windows:
    """Lengths from the head of the queue, in requests."""

    prefetch: int
    """What these need is fetched into DRAM."""
    eviction: int
    """What these need does not leave the store."""


def window_lengths(memory_blocks: int, disk_blocks: int, blocks_per_request: float) -> Windows:
    """The paper's L_pw = C_mem / S_kv and L_ev = (C_mem + C_disk) / S_kv (CachedAttention, 3.3).

    Args:
        memory_blocks: C_mem, blocks that DRAM can hold for this.
        disk_blocks: C_disk, blocks that NVMe can hold.
        blocks_per_request: S_kv, the live mean of what a waiting request needs; shared ones counted once.
    """
    if blocks_per_request <= 0:
        return Windows(0, 0)
    prefetch = int(memory_blocks / blocks_per_request)
    return Windows(prefetch, max(prefetch, int((memory_blocks + disk_blocks) / blocks_per_request)))
