"""One namespace's blocks: tree, slots, eviction order, sessions and history, kept in step.

Every way in which a block leaves goes through `drop`, so that no book forgets the others.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kvservice.aliases import Aliases
from kvservice.blocks import NO_EXTENT, NO_ROW, NO_SLOT, DropReason, NamespaceSpec, Rows, Slots
from kvservice.config import NamespaceRule
from kvservice.dram import SlotPool, slot_stride_bytes
from kvservice.history import Departure, History
from kvservice.index import Index, State
from kvservice.instances import Instance
from kvservice.metrics import Metrics
from kvservice.policies import NO_MEMORY, EvictionPolicy, Window, make_policy
from kvservice.sessions import Sessions, session_key
from kvservice.store.arrivals import Arrival


@dataclass(slots=True)
class Counters:
    """Blocks since the daemon started; requested = dram_hits + nvme_hits + misses."""

    requested: int = 0
    dram_hits: int = 0
    nvme_hits: int = 0
    misses: int = 0
    shifted_hits: int = 0
    """Of the hits, those whose keys the reader has to rotate."""
    committed: int = 0
    dropped: dict[DropReason, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Namespace:
    """The state of one namespace. The event loop owns it."""

    spec: NamespaceSpec
    metrics: Metrics
    rule: NamespaceRule
    """Its quotas and time to live."""
    policy: EvictionPolicy
    """In which order blocks leave DRAM."""
    nvme_policy: EvictionPolicy
    """In which order blocks leave NVMe, and with it the store."""
    sessions: Sessions
    aliases: Aliases
    """What truncated conversations name a second time."""
    history: History
    pool: SlotPool
    window: Window = field(default_factory=Window)
    """What waiting requests need."""
    index: Index = field(default_factory=Index)
    counters: Counters = field(default_factory=Counters)
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    """What is being read from NVMe, by row."""
    on_extents_left: Callable[[Namespace, list[int]], None] = field(default=lambda namespace, extents: None)
    """Told of the extents of blocks that left."""
    on_alias_left: Callable[[Namespace, int], None] = field(default=lambda namespace, row: None)
    """Told of an alias row that is about to leave."""
    last_used_s: float = 0.0
    expiry_cursor: int = 0
    """Where in the index the search for blocks whose time passed goes on."""
    growing_bytes: int = 0
    """Of segments being made for it."""
    growth: set[asyncio.Task[bool]] = field(default_factory=set)
    """The making of these segments."""
    is_retired: bool = False
    """Dropped from the registry; memory that arrives late must not be added."""

    @property
    def stride_bytes(self) -> int:
        """Bytes of DRAM per block."""
        return slot_stride_bytes(self.spec.block_size_bytes)

    def touch(self, rows: Rows, now_s: float) -> None:
        """A request used the chain `rows` (root first), and with it what its aliases stand for."""
        if len(rows):
            of_bytes = self.index.bytes_rows(rows)
            self.index.last_used_s[of_bytes] = now_s
            if of_bytes is not rows:
                self.index.last_used_s[rows] = now_s
            self.policy.touch(of_bytes, now_s)
            self.nvme_policy.touch(of_bytes, now_s)
            self.last_used_s = now_s

    def stored(self, rows: Rows, now_s: float) -> None:
        """These blocks became resident, a block before what follows it."""
        if len(rows):
            self.index.last_used_s[rows] = now_s
            parents, memories = self.index.parent[rows], self.history.memories(self.index.hashes_of(rows))
            self.policy.stored(rows, parents, now_s, memories)
            self.nvme_policy.stored(rows, parents, now_s, memories)
            self.last_used_s = now_s

    def queue(self, request: Hashable, rows: Rows, order: float) -> None:
        """The request waits and needs the held chain `rows` (root first); replaces what was said of it before.

        Args:
            order: finite; smaller starts earlier.
        """
        self._tell_needed(self.window.queue(request, self.index.bytes_rows(rows), order))

    def unqueue(self, request: Hashable) -> None:
        """The request started or was cancelled; nothing happens where it is unknown."""
        self._tell_needed(self.window.unqueue(request))

    def exempt_until(self, order: float) -> None:
        """What requests up to that order need does not leave the store, though it may leave DRAM for NVMe."""
        self._recall(self.window.exempt_until(order))

    def expect(self, rows: Rows, at_s: float) -> None:
        """The application says when an idle conversation's rows will be used; infinite: never again."""
        if len(rows):
            of_bytes = self.index.bytes_rows(rows)
            self.policy.expect(of_bytes, at_s)
            self.nvme_policy.expect(of_bytes, at_s)

    def swap_index(self, index: Index, moved: Mapping[int, int]) -> None:
        """Take another index into use; `moved` says which rows of it the present ones became."""
        self.index = index
        self.policy, self.nvme_policy = make_policy(self.policy.name), make_policy(self.nvme_policy.name)
        self._tell_needed(self.window.move(moved))
        self.sessions.moved(moved)

    def end_hold(self, slots: Slots) -> None:
        """A holder let go of these slots (chain order): what is nobody's becomes free."""
        rows = self.pool.row_of[slots]
        self.pool.unhold(slots)
        rows = rows[rows != NO_ROW]
        # Blocks that were passed over by eviction while held take their place in the order again.
        self.policy.released(rows[self.index.state[rows] >= State.RESIDENT])

    def end_work(self, slots: Slots) -> None:
        """The daemon's own work (checksums, writing) let go of these slots (chain order): that was no use of theirs."""
        rows = self.pool.row_of[slots]
        self.pool.unhold(slots)
        rows = rows[rows != NO_ROW]
        # In front again if eviction passed them over meanwhile, else where they are; the others when they become ends.
        is_end = (self.index.state[rows] >= State.RESIDENT) & (self.index.dram_children[rows] == 0)
        for row in rows[is_end].tolist():
            self.policy.exposed(row)

    def drop(self, row: int, reason: DropReason, now_s: float) -> None:
        """Take out a block that has nothing behind it, and its aliases. Its slot is free at once unless held."""
        index = self.index
        self.drop_subtrees(self.aliases.of_source(row), DropReason.SOURCE_LOST, now_s)
        slot, extent, source = int(index.slot[row]), int(index.extent[row]), int(index.source[row])
        memory = self.policy.forget(row)
        self.nvme_policy.forget(row)  # told the same as the other one, it would have the same remembered
        if index.state[row] != State.UNNAMED:
            self._lose_name(row, reason, now_s, memory)
        if source != NO_ROW:
            self.on_alias_left(self, row)
            self.aliases.row_left(row)
        parent = int(index.parent[row])
        self.window.forget(row)
        self.arrivals.pop(row, None)
        self._count_wasted(row)
        index.remove(row)
        if slot != NO_SLOT:
            self.pool.disown(slot)
        if extent != NO_EXTENT:
            self.on_extents_left(self, [extent])
        if parent != NO_ROW:
            self._expose(parent)
        if source == NO_ROW:
            since_s = (float(index.committed_at_s[row]), float(index.last_used_s[row]))
            age_s, idle_s = (max(0.0, now_s - at_s) for at_s in since_s)
            self.metrics.evictions.evicted(reason, age_s=age_s, idle_s=idle_s)
            self.metrics.dropped_blocks[reason].inc()
            self.counters.dropped[reason] = self.counters.dropped.get(reason, 0) + 1
        elif reason is not DropReason.SOURCE_LOST and index.state[source] == State.UNNAMED:
            self.drop_subtrees([source] * (not self.aliases.of_source(source)), reason, now_s)

    def _lose_name(self, row: int, reason: DropReason, now_s: float, memory: int = NO_MEMORY) -> None:
        index = self.index
        idle_s = max(0.0, now_s - float(index.last_used_s[row]))
        self.history.remember(index.hash_of(row), Departure(reason, now_s, idle_s, memory))
        self.sessions.row_left(row, int(index.parent[row]))

    def _leave_chain(self, row: int, reason: DropReason, now_s: float) -> None:
        """What is in front of the row leaves: so does the row, but for bytes that aliases of it still reach."""
        if not self.aliases.of_source(row):
            self.drop(row, reason, now_s)
            return
        parent = int(self.index.parent[row])
        self._lose_name(row, reason, now_s)
        self.index.unname(row)
        self._expose(row)
        if parent != NO_ROW:
            self._expose(parent)

    def demote(self, row: int) -> None:
        """Let a block that is on NVMe too leave DRAM: no write, no loss."""
        parent, slot = int(self.index.parent[row]), int(self.index.slot[row])
        self.policy.demoted(row)
        self._count_wasted(row)
        self.index.detach_slot(row)
        self.pool.disown(slot)
        self._expose(row)  # eviction from NVMe passed it over while it was in DRAM
        if parent != NO_ROW:
            self._expose(parent)

    def leave_nvme(self, row: int) -> None:
        """Give up the NVMe copy of a block that is in DRAM too: it leaves the store from there, if it leaves."""
        parent, extent = int(self.index.parent[row]), int(self.index.extent[row])
        self.nvme_policy.demoted(row)
        self.index.detach_extent(row)
        self.on_extents_left(self, [extent])
        if parent != NO_ROW:
            self._expose(parent)

    def drop_subtrees(self, rows: Iterable[int], reason: DropReason, now_s: float) -> tuple[int, int]:
        """Take out blocks and everything behind them.

        Returns:
            How many were dropped, and how many of those are still held.
        """
        dropped = held = 0
        for top in rows:
            if self.index.state[top] == State.ABSENT:
                continue  # went with another one's subtree
            for row in self.index.subtree(top):
                if self.index.state[row] == State.ABSENT:
                    continue  # an alias that went with its source
                held += self._is_held(row)
                dropped += int(self.index.source[row] == NO_ROW)
                if row == top:
                    self.drop(row, reason, now_s)
                else:
                    self._leave_chain(row, self._reason_behind(reason), now_s)
        return dropped, held

    @staticmethod
    def _reason_behind(reason: DropReason) -> DropReason:
        # A whole session or segment going is the reason for each block of it; a single
        # block's fate is not that of the blocks behind it.
        own = (DropReason.CORRUPT, DropReason.ABORTED, DropReason.SOURCE_LOST)
        return DropReason.PREFIX_LOST if reason in own else reason

    def evict(self, slots_wanted: int, reason: DropReason, now_s: float) -> int:
        """Free slots in the policy's order until that many more are free, or nothing may leave.

        What is on NVMe is demoted; what is not, leaves the store (and what is behind it).

        Returns:
            How many became free.
        """
        before = self.pool.free_slots
        if slots_wanted > 0:
            for row in self.policy.victims(self._may_leave_dram, now_s):
                if self.index.extent[row] != NO_EXTENT:
                    self.demote(row)
                else:
                    self.drop_subtrees([row], reason, now_s)
                if self.pool.free_slots - before >= slots_wanted:
                    break
        return self.pool.free_slots - before

    def evict_from_nvme(self, extents_wanted: int, reason: DropReason, now_s: float) -> int:
        """Free extents in the policy's order, ends of chains first; what is in DRAM too lives on there.

        Returns:
            How many became free.
        """
        freed = 0
        if extents_wanted > 0:
            for row in self.nvme_policy.victims(self._may_leave_nvme, now_s):
                if self.index.slot[row] == NO_SLOT:
                    self.drop(row, reason, now_s)
                else:
                    self.leave_nvme(row)
                freed += 1
                if freed == extents_wanted:
                    break
        return freed

    def forget_session(self, session_id: str, now_s: float) -> tuple[int, int]:
        """Drop what only this session needs, from its tips back to a block that others need too.

        Returns:
            How many were dropped, and how many of those are still held.
        """
        dropped = held = 0
        for tip in self.sessions.forget(session_key(session_id)):
            row = tip
            while row != NO_ROW and self._is_only_for_forgotten(row):
                parent = int(self.index.parent[row])
                held += self._is_held(row)
                dropped += int(self.index.source[row] == NO_ROW)
                self._leave_chain(row, DropReason.FORGOTTEN, now_s)
                row = parent
        return dropped, held

    def forget_all(self, now_s: float) -> tuple[int, int]:
        """Drop every block; like `drop_subtrees`."""
        return self.drop_subtrees(self.index.roots().tolist(), DropReason.FORGOTTEN, now_s)

    def evictable_slots(self, enough: int) -> int:
        """How many slots eviction can free now; exact unless it is clearly at least `enough`.

        What stands in front of a held block cannot leave either; what is not resident yet leaves
        with its writer only, and what waiting requests need leaves DRAM only where it stays on NVMe.
        """
        owned = self.pool.row_of != NO_ROW
        held = (self.pool.holders > 0) | (self.index.state[self.pool.row_of] < State.RESIDENT)
        if len(self.window):
            rows = self.pool.row_of[owned]
            held[owned] |= self.window.exempt(rows) & (self.index.extent[rows] == NO_EXTENT)
        free_standing = int(np.count_nonzero(owned & ~held))
        held_rows = self.pool.row_of[owned & held]
        if free_standing - int(np.sum(self.index.depth[held_rows])) >= enough:
            return free_standing
        kept: set[int] = set()
        for held_row in held_rows.tolist():
            for row in self.index.ancestors(held_row):
                if row in kept:
                    break
                kept.add(row)
        in_dram = np.count_nonzero(self.index.slot[list(kept)] != NO_SLOT)
        return int(np.count_nonzero(owned) - in_dram)

    def _tell_needed(self, rows: Rows) -> None:
        if len(rows):
            orders = self.window.order_of(rows)
            self.policy.needed(rows, orders)
            self.nvme_policy.needed(rows, orders)
            self._recall(rows[orders == math.inf])

    def _recall(self, rows: Rows) -> None:
        """Eviction may have passed these rows over while they were exempt."""
        index = self.index
        for row in rows[(index.dram_children[rows] == 0) & (index.slot[rows] != NO_SLOT)].tolist():
            self.policy.exposed(row)
        for row in rows[index.nvme_children[rows] == 0].tolist():
            self.nvme_policy.exposed(row)

    def _count_wasted(self, row: int) -> None:
        """It leaves DRAM: had a hint brought it there, nobody used it since."""
        if self.index.prefetched[row]:
            self.index.prefetched[row] = False
            self.metrics.prefetches.wasted.inc()

    def _is_only_for_forgotten(self, row: int) -> bool:
        """Whether nothing follows the block and no session that is still known ends there."""
        index = self.index
        is_end = index.state[row] == State.RESIDENT and index.first_child[row] == NO_ROW
        return bool(is_end) and not self.sessions.is_tip(row)

    def _expose(self, row: int) -> None:
        """It may be the end of its chain now, in DRAM or at all."""
        if self.index.dram_children[row] == 0 and self.index.slot[row] != NO_SLOT:
            self.policy.exposed(row)
        if self.index.nvme_children[row] == 0:
            self.nvme_policy.exposed(row)

    def _is_held(self, row: int) -> int:
        slot = int(self.index.slot[row])
        return int(slot != NO_SLOT and self.pool.holders[slot] > 0)

    def _may_leave_dram(self, row: int) -> bool:
        index = self.index
        slot = int(index.slot[row])
        return bool(
            index.state[row] >= State.RESIDENT
            and slot != NO_SLOT
            and index.dram_children[row] == 0
            and not index.dirty[row]
            and self.pool.holders[slot] == 0
            and (index.extent[row] != NO_EXTENT or not self.window.is_exempt(row))
        )

    def _may_leave_nvme(self, row: int) -> bool:
        index = self.index
        if index.state[row] < State.RESIDENT or index.extent[row] == NO_EXTENT:
            return False
        if index.arriving[row] or self.window.is_exempt(row):
            return False
        # A block in DRAM can wait there for its end; one on NVMe only takes with it what is behind it.
        in_dram = index.slot[row] != NO_SLOT
        return bool(index.nvme_children[row] == 0 if in_dram else index.first_child[row] == NO_ROW)


Peer = Instance[Namespace]
"""A connected process, as the store knows it."""
