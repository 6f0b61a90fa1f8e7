"""Load or recompute: loading is worth it only where it is faster than the engine."""

from __future__ import annotations

from dataclasses import dataclass

_GAIN_MIN = 0.05  # loading must be faster by this share: estimates are never exact


@dataclass(frozen=True, slots=True)
class Speeds:
    """What both ways cost, as measured lately. A rate of 0.0 is not known yet."""

    prefill_tokens_per_s: float
    """The engine's; as it reports it."""
    copy_bytes_per_s: float = 0.0
    """From DRAM into the engine; as it reports it."""
    nvme_bytes_per_s: float = 0.0
    nvme_wait_s: float = 0.0
    """Until the device gets round to this request."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How many leading blocks to load, and what that and its alternative take."""

    blocks: int
    load_s: float
    """Loading these; 0.0 where it is not known."""
    recompute_s: float
    """Computing these instead; 0.0 where it is not known."""


def load_or_recompute(
    dram_blocks: int, held_blocks: int, *, block_bytes: int, tokens_per_block: int, speeds: Speeds
) -> LoadPlan:
    """The fastest of: load all that is held, load what is in DRAM and compute the rest, compute everything.

    Costs are linear in blocks, so that the optimum is one of the three. What is not known yet counts
    as free: the first loads are what measures it.

    Args:
        dram_blocks: leading blocks that are in DRAM.
        held_blocks: leading blocks that are held at all; the rest of them comes from NVMe.
    """
    if speeds.prefill_tokens_per_s <= 0:
        return LoadPlan(held_blocks, _load_s(dram_blocks, held_blocks, block_bytes, speeds), 0.0)
    compute_s = tokens_per_block / speeds.prefill_tokens_per_s

    def takes_s(blocks: int) -> float:
        return _load_s(dram_blocks, blocks, block_bytes, speeds) + (held_blocks - blocks) * compute_s

    best = 0
    for blocks in (dram_blocks, held_blocks):
        if blocks and takes_s(blocks) < (1.0 - _GAIN_MIN) * takes_s(best):
            best = blocks
    return LoadPlan(best, _load_s(dram_blocks, best, block_bytes, speeds), best * compute_s)


def _load_s(dram_blocks: int, blocks: int, block_bytes: int, speeds: Speeds) -> float:
    copy_s = blocks * block_bytes / speeds.copy_bytes_per_s if speeds.copy_bytes_per_s else 0.0
    on_nvme = max(0, blocks - dram_blocks)
    if not on_nvme or not speeds.nvme_bytes_per_s:
        return copy_s
    return copy_s + speeds.nvme_wait_s + on_nvme * block_bytes / speeds.nvme_bytes_per_s
