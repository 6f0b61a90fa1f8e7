"""index: which block is where, in what state; longest-prefix lookup.

Covers: one namespace's tree of blocks, as columns. Does not cover: memory (`dram`), who holds
what (`leases`), eviction order (`policies`).

Life of a row::

    (absent) --insert--> RESERVED --publish--> RESIDENT --remove--> (absent)
                            |                   ^  |                   ^
                            '----> WRITTEN -----'  '----> UNNAMED -----'

WRITTEN: committed before the block in front of it. UNNAMED: it lost its place in the tree, and its
bytes live on because aliases use them.

Invariant: the index is closed under prefixes. A row's parent is present, and a RESIDENT row's
parent is RESIDENT. So whether the first i blocks of a chain are held is monotonic in i, and the
hit length is found by bisection: 12 probes for 2,048 hashes.

An *alias* is a RESIDENT row without bytes of its own: `source` is the row that has them. It stands
at the depth that its tokens have in a truncated conversation; its source's depth is the position
that the bytes were computed at. `owner` is the only session that may use a row; what is behind an
owned row has the same owner.

Other rows' bytes are in DRAM (`slot`), on NVMe (`extent`) or both; `arriving` while they are read into
the slot, `dirty` while they wait to be written to NVMe, `prefetched` from when a hint brought them
into DRAM until somebody uses them.

Columns instead of objects: a million blocks take about 200 bytes each, chains are inserted,
checked and touched by vector operations, and the garbage collector has nothing to walk.
"""

from kvservice.index.columns import NO_OWNER, State
from kvservice.index.index import Index

__all__ = ["NO_OWNER", "Index", "State"]
