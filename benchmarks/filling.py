"""filling: indexes of a wanted size: blocks that are committed and held, in chains of several lengths.

The blocks are not written: what a lookup or an index costs does not depend on their bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import kvservice_client as kv
from benchmarks.batches import fresh_hashes
from benchmarks.daemon import settle
from benchmarks.measuring import progress

BLOCK_SIZE_BYTES = 4096
CHAIN_BLOCKS = (2048, 128, 64)
_BLOCKS_PER_REPORT = 100_000


def fill(client: kv.Client, blocks: int, *, seed: int = 1) -> list[list[bytes]]:
    """Commit exactly that many blocks and wait until the daemon is done with them; the chains.

    Raises:
        RuntimeError: the daemon did not take or does not hold a block.
    """
    chains: list[list[bytes]] = []
    done_blocks = 0
    for chain in _chains(blocks, seed):
        reservation = client.put(chain)
        published = reservation.commit()
        if len(published) != len(chain) or any(outcome is not kv.Committed.PUBLISHED for outcome in published):
            raise RuntimeError(f"of {len(chain)} blocks {len(published)} were committed")
        chains.append(chain)
        if done_blocks // _BLOCKS_PER_REPORT != (done_blocks + len(chain)) // _BLOCKS_PER_REPORT:
            progress(f"filled {done_blocks + len(chain)} of {blocks} blocks")
        done_blocks += len(chain)
    settle(client, chains[-1][-1])
    for chain in chains:
        if client.lookup(chain).blocks != len(chain):
            raise RuntimeError("a chain that was committed is not held: the daemon has too little memory")
    return chains


def _chains(blocks: int, seed: int) -> Iterator[list[bytes]]:
    """Random chains with that many blocks together: a third of the blocks in chains of each length, where it fits."""
    source = random.Random(seed)
    left = blocks
    for length in CHAIN_BLOCKS:
        wanted = blocks // len(CHAIN_BLOCKS) if length != CHAIN_BLOCKS[-1] else left
        for _ in range(wanted // length):
            yield fresh_hashes(length, source)
            left -= length
    if left:
        yield fresh_hashes(left, source)
