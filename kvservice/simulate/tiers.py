"""tiers: the daemon's namespace (index, slots, window, policies) without memory under it; blocks are only counted."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import numpy as np

from kvservice.aliases import NO_INSTANCE, AliasBounds, Aliases
from kvservice.blocks import (
    NO_EXTENT,
    NO_ROW,
    BlockHash,
    Chain,
    DropReason,
    NamespaceKey,
    NamespaceSpec,
    Rows,
    Tenant,
)
from kvservice.config import Config
from kvservice.dram import Segment, SlotPool, slot_stride_bytes
from kvservice.history import History
from kvservice.metrics import Metrics
from kvservice.policies import EvictionPolicy
from kvservice.sessions import Sessions
from kvservice.simulate.requests import Truncated
from kvservice.store.invariants import check_namespace
from kvservice.store.namespace import Namespace
from kvservice.store.space import sparing

HASH_BYTES = 8
_HISTORY_BLOCKS = 65_536
"""As in the daemon's default configuration."""
_ALIASES_MAX = 1 << 62
_OWNER = 1
"""Of all aliases: nobody asks for another conversation's here."""


class Tiers:
    """One namespace with so many blocks of DRAM and of NVMe."""

    def __init__(
        self,
        policy: EvictionPolicy,
        nvme_policy: EvictionPolicy,
        *,
        dram_blocks: int,
        nvme_blocks: int,
        block_bytes: int,
    ) -> None:
        stride_bytes = slot_stride_bytes(block_bytes)
        pool = SlotPool(stride_bytes, dram_blocks)
        pool.add(_segment_without_memory(stride_bytes, dram_blocks))
        self.dram_blocks, self.nvme_blocks = dram_blocks, nvme_blocks
        self.nvme_used = 0
        self.namespace = Namespace(
            spec=NamespaceSpec(
                NamespaceKey(Tenant("simulated"), b"simulated"), "simulated", block_bytes, 1, HASH_BYTES
            ),
            metrics=Metrics(version="simulated"),
            rule=Config().rule_for("simulated"),
            policy=policy,
            nvme_policy=nvme_policy,
            sessions=Sessions(sessions_max=1),
            aliases=Aliases(AliasBounds(per_session=_ALIASES_MAX, per_instance=_ALIASES_MAX, in_all=_ALIASES_MAX)),
            history=History(blocks_max=_HISTORY_BLOCKS),
            pool=pool,
            on_extents_left=self._extents_left,
        )

    @property
    def dram_used(self) -> int:
        """Blocks that have a slot."""
        return self.dram_blocks - self.namespace.pool.free_slots

    def held(self, hashes: Sequence[BlockHash]) -> Rows:
        """The rows with the bytes of the longest held prefix, in either tier."""
        return self.namespace.index.bytes_rows(self._named(hashes))

    def truncate(self, hashes: Sequence[BlockHash], truncated: Truncated) -> None:
        """The daemon's Truncate: what is held of the blocks that stayed has a second name."""
        index, present = self.namespace.index, self._named(hashes)
        sources = self.held(truncated.chain)[truncated.first :][len(present) :]
        if len(sources):
            behind = int(present[-1]) if len(present) else NO_ROW
            names = hashes[len(present) : len(present) + len(sources)]
            added = index.insert_aliases(behind, names, sources, _OWNER)
            self.namespace.aliases.add(added.tolist(), sources.tolist(), _OWNER, NO_INSTANCE)

    def make_room(self, wanted: int, pinned: Rows, now_s: float) -> int:
        """Evict until `wanted` slots are free, sparing `pinned` rows; how many of them are free."""
        namespace, pool = self.namespace, self.namespace.pool
        if wanted > pool.free_slots:
            with sparing(namespace, pinned):
                namespace.evict(wanted - pool.free_slots, DropReason.CAPACITY, now_s)
        return min(wanted, pool.free_slots)

    def store(self, hashes: Sequence[BlockHash], now_s: float) -> Rows:
        """Hold what of the chain is not held yet, as far as it finds room; the new rows."""
        namespace = self.namespace
        held = self._named(hashes)
        room = self.make_room(len(hashes) - len(held), namespace.index.bytes_rows(held), now_s)
        new = hashes[len(held) : len(held) + room]
        if not new:
            return held[:0]
        slots = namespace.pool.allocate(len(new))
        rows = namespace.index.insert(int(held[-1]) if len(held) else NO_ROW, new, slots)
        namespace.pool.row_of[slots] = rows
        namespace.stored(namespace.index.publish(rows, now_s), now_s)
        namespace.pool.unhold(slots)
        return rows

    def take_extents(self, wanted: int, now_s: float) -> int:
        """Make room on NVMe, evicting from there; how many of the wanted extents there are."""
        missing = wanted - (self.nvme_blocks - self.nvme_used)
        if missing > 0:
            self.namespace.evict_from_nvme(missing, DropReason.CAPACITY, now_s)
        granted = max(0, min(wanted, self.nvme_blocks - self.nvme_used))
        self.nvme_used += granted
        return granted

    def check(self) -> None:
        """Assert that occupancy is what the books say and within capacity. For tests; O(n)."""
        check_namespace(self.namespace)
        index = self.namespace.index
        present = np.flatnonzero(index.state)
        assert self.dram_used <= self.dram_blocks, "more blocks in DRAM than it has"
        on_nvme = int(np.count_nonzero(index.extent[present] != NO_EXTENT))
        assert on_nvme <= self.nvme_used <= self.nvme_blocks, "more blocks on NVMe than it has"

    def _named(self, hashes: Sequence[BlockHash]) -> Rows:
        chain = Chain(b"".join(hashes), HASH_BYTES)
        return self.namespace.index.rows_of(hashes[: self.namespace.index.hit_length(chain)])

    def _extents_left(self, namespace: Namespace, extents: Iterable[int]) -> None:
        self.nvme_used -= len(list(extents))


class Waiting:
    """The queue as the daemon's window is told of it: each request's held prefix, up to date."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._requests: dict[int, tuple[Sequence[BlockHash], float]] = {}
        self._wanting: dict[BlockHash, dict[int, None]] = {}

    def add(self, number: int, hashes: Sequence[BlockHash], order: float) -> None:
        """The request waits."""
        self._requests[number] = hashes, order
        for one in hashes:
            self._wanting.setdefault(one, {})[number] = None
        self._tiers.namespace.queue(number, self._tiers.held(hashes), order)

    def remove(self, number: int) -> None:
        """The request started."""
        hashes, _ = self._requests.pop(number)
        for one in hashes:
            wanting = self._wanting[one]
            del wanting[number]
            if not wanting:
                del self._wanting[one]
        self._tiers.namespace.unqueue(number)

    def stored(self, hashes: Sequence[BlockHash]) -> None:
        """These blocks are held now: requests that want them have a longer prefix."""
        grown = {number for one in hashes for number in self._wanting.get(one, ())}
        for number in sorted(grown):
            wanted, order = self._requests[number]
            self._tiers.namespace.queue(number, self._tiers.held(wanted), order)


def _segment_without_memory(stride_bytes: int, slots: int) -> Segment:
    """A segment to count slots in: nobody reads or writes its bytes."""
    return Segment(1, stride_bytes, slots, -1, mmap.mmap(-1, mmap.PAGESIZE), -1, np.zeros(slots, dtype=np.uint64))
