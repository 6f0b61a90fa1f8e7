"""settings: how large and how often, for the real figures and for a quick check that everything runs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measuring import REPETITIONS

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of every benchmark.

    Attributes:
        repetitions: turns of each side; the median counts.
        shm_blocks: blocks of `shm_block_size_bytes` in one save or load.
        sustained_rounds: saves in a row, all of which stay resident, for the sustained figure.
        lookup_calls: calls of each side and size per repetition.
        index_blocks: size of the index behind the lookup ratios.
        growth_blocks: the small and the large index of lookup_1_growth; the large one is also what index_memory fills.
        nvme_chain_blocks: blocks of `shm_block_size_bytes` in each chain that goes to NVMe and comes back.
        versus_batches: (label, block size in bytes, blocks per batch) of the comparisons with other stores.
    """

    repetitions: int
    shm_blocks: int
    shm_block_size_bytes: int
    sustained_rounds: int
    lookup_calls: int
    index_blocks: int
    growth_blocks: tuple[int, int]
    nvme_chain_blocks: int
    versus_batches: tuple[tuple[str, int, int], ...] = (("1MiB", MIB, 64), ("16MiB", 16 * MIB, 16))


FULL = Settings(
    repetitions=REPETITIONS,
    shm_blocks=256,
    shm_block_size_bytes=4 * MIB,
    sustained_rounds=4,
    lookup_calls=200,
    index_blocks=100_000,
    growth_blocks=(1_000, 1_000_000),
    nvme_chain_blocks=256,
)

QUICK = Settings(
    repetitions=3,
    shm_blocks=64,
    shm_block_size_bytes=4 * MIB,
    sustained_rounds=2,
    lookup_calls=50,
    index_blocks=10_000,
    growth_blocks=(1_000, 50_000),
    nvme_chain_blocks=32,
)
