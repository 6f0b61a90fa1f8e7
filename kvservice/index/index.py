"""The tree of one namespace's blocks; see the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_ROW, NO_SLOT, BlockHash, Chain, Rows, Slots
from kvservice.errors import InvalidRequest
from kvservice.index.columns import COLUMNS, NO_OWNER, State
from kvservice.index.tree import Tree


class Index(Tree):
    """The blocks of one namespace. Not thread-safe: the event loop owns it."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[BlockHash, int] = {}
        self._hashes: list[BlockHash | None] = []
        self._free: list[int] = []
        self._written = 0

    def __len__(self) -> int:
        return len(self._rows)

    def row_of(self, block_hash: BlockHash) -> int:
        """The row of that hash in any state, or NO_ROW."""
        return self._rows.get(block_hash, NO_ROW)

    def hash_of(self, row: int) -> BlockHash:
        """The hash of a present row."""
        block_hash = self._hashes[row]
        assert block_hash is not None, f"row {row} is absent"
        return block_hash

    def hashes_of(self, rows: Rows) -> list[BlockHash]:
        """The same of many."""
        return list(map(self._hashes.__getitem__, rows.tolist()))  # type: ignore[arg-type]  # none is absent

    def hit_length(self, chain: Chain) -> int:
        """How many leading blocks of the chain are resident, in O(log n)."""
        low, high = 0, len(chain)
        rows, state_at, depth_at = self._rows, self.state.item, self.depth.item
        # Most calls are full hits or full misses: ask the end first.
        probe = high - 1
        while low < high:
            row = rows.get(chain.hash_at(probe), NO_ROW)
            if row != NO_ROW and state_at(row) == State.RESIDENT and depth_at(row) == probe:
                low = probe + 1
            else:
                high = probe
            probe = (low + high) // 2
        return low

    def dram_length(self, chain: Chain, hit: int) -> int:
        """How many of the `hit` resident leading blocks lead in DRAM, in O(log n).

        Blocks leave DRAM from the end of a chain and come back from its front, so this is nearly
        always monotonic. Where it is not (new blocks behind a demoted prefix), the answer is a
        hint like any lookup's.
        """
        low, high = 0, hit
        probe = high - 1
        while low < high:
            row = self._rows[chain.hash_at(probe)]
            source = int(self.source[row])
            if self.slot[row if source == NO_ROW else source] != NO_SLOT:
                low = probe + 1
            else:
                high = probe
            probe = (low + high) // 2
        return low

    def rows_of(self, hashes: Sequence[BlockHash], *, parent: int = NO_ROW) -> Rows:
        """The rows of the leading hashes that are present in any state.

        Args:
            hashes: a chain.
            parent: the row that the first hash must follow; NO_ROW: it must be a root.

        Raises:
            InvalidRequest: the hashes are not one chain as the index knows it.
        """
        if self._rows.keys().isdisjoint(hashes):
            return np.zeros(0, dtype=np.int32)
        rows = np.array(list(map(self._rows.get, hashes, repeat(NO_ROW))), dtype=np.int32)
        absent = np.flatnonzero(rows == NO_ROW)
        if len(absent):
            length = int(absent[0])
            if len(absent) < len(rows) - length:
                raise InvalidRequest(
                    f"hash {length} is not held but a later one is: the hashes are not one chain", field="hashes"
                )
            rows = rows[:length]
        parents = self.parent[rows]
        if len(rows) and (parents[0] != parent or (parents[1:] != rows[:-1]).any()):
            wrong = np.flatnonzero(parents != np.concatenate(([parent], rows[:-1])))
            raise InvalidRequest(
                f"hash {int(wrong[0])} is held behind another block: the hashes are not one chain", field="hashes"
            )
        return rows

    def hit_rows(self, chain: Chain, hit: int) -> Rows:
        """The rows of the `hit` leading blocks, which are resident (see `hit_length`).

        Raises:
            InvalidRequest: see `rows_of`.
        """
        last = self.row_of(chain.hash_at(hit - 1)) if hit else NO_ROW
        first = last - hit + 1
        if last != NO_ROW and first >= 0 and self.parent[first] == NO_ROW:
            # Blocks that were stored one after the other have neighbouring rows: no look-up of each hash.
            rows: Rows = np.arange(first, last + 1, dtype=np.int32)
            if (self.parent[first + 1 : last + 1] == rows[:-1]).all():
                # None is absent: each is in front of the last one.
                hashes = b"".join(self._hashes[first : last + 1])  # type: ignore[arg-type]
                if chain.packed.startswith(hashes):
                    return rows
        return self.rows_of(chain.hashes(count=hit))

    def roots(self) -> Rows:
        """Every row without a block before it."""
        present = np.flatnonzero(self.state != State.ABSENT)
        roots: Rows = present[self.parent[present] == NO_ROW].astype(np.int32)
        return roots

    def insert(self, parent: int, hashes: Sequence[BlockHash], slots: Slots) -> Rows:
        """Reserve rows for a chain of absent, distinct hashes behind `parent` (NO_ROW: a root)."""
        rows = self._add_chain(parent, hashes)
        self.slot[rows] = slots
        self.state[rows] = State.RESERVED
        self.dram_children[rows[:-1]] = 1
        if parent != NO_ROW:
            self.dram_children[parent] += 1
        return rows

    def insert_aliases(self, parent: int, hashes: Sequence[BlockHash], sources: Rows, owner: int) -> Rows:
        """Name the bytes of `sources` (rows with bytes of their own) a second time, behind `parent`.

        Args:
            owner: the only session that may use them, and what is put behind them.
        """
        rows = self._add_chain(parent, hashes)
        self.slot[rows] = NO_SLOT
        self.source[rows] = sources
        self.owner[rows] = owner
        self.state[rows] = State.RESIDENT
        return rows

    def bytes_rows(self, rows: Rows) -> Rows:
        """The rows that have the bytes: an alias's source, else the row itself; `rows` where none is an alias."""
        sources = self.source[rows]
        is_own = sources == NO_ROW
        return rows if is_own.all() else np.where(is_own, rows, sources)

    def unwritten(self, rows: Rows) -> Rows:
        """Those whose bytes are in DRAM only, and do not wait to be written."""
        in_dram_only = (self.slot[rows] != NO_SLOT) & (self.extent[rows] == NO_EXTENT)
        unwritten: Rows = rows[in_dram_only & ~self.dirty[rows]]
        return unwritten

    def shift_blocks(self, rows: Rows) -> np.ndarray:
        """How many blocks each row stands behind the position that its bytes were computed at; int32, mostly <= 0."""
        shifts: np.ndarray = self.depth[rows] - self.depth[self.bytes_rows(rows)]
        return shifts

    def publish(self, rows: Rows, now_s: float) -> Rows:
        """Mark reserved rows (in chain order) as written; make resident what now can be.

        Returns:
            The rows that became resident, a block before what follows it; may include rows of
            other writers that were waiting for these.
        """
        self.last_used_s[rows] = self.committed_at_s[rows] = now_s
        parents = self.parent[rows]
        front = int(parents[0])
        is_one_chain = bool((parents[1:] == rows[:-1]).all())
        if is_one_chain and not self._written and (front == NO_ROW or self.state[front] == State.RESIDENT):
            self.state[rows] = State.RESIDENT
            return rows
        self.state[rows] = State.WRITTEN
        self._written += len(rows)
        resident: list[int] = []
        for row in rows.tolist():
            self._settle(row, resident)
        return np.array(resident, dtype=np.int32)

    def attach_slots(self, rows: Rows, slots: Slots) -> None:
        """Blocks without DRAM get slots that their bytes are about to be read into."""
        self.slot[rows] = slots
        self.arriving[rows] = True
        parents = self.parent[rows]
        np.add.at(self.dram_children, parents[parents != NO_ROW], 1)

    def detach_slot(self, row: int) -> None:
        """The block's bytes are not in DRAM any more."""
        if self.slot[row] != NO_SLOT:
            self.slot[row] = NO_SLOT
            self.arriving[row] = self.dirty[row] = False
            if self.parent[row] != NO_ROW:
                self.dram_children[self.parent[row]] -= 1

    def attach_extent(self, row: int, extent: int) -> None:
        """The block's bytes are on NVMe now."""
        assert self.extent[row] == NO_EXTENT, "the block is on NVMe already"
        self.extent[row] = extent
        if self.parent[row] != NO_ROW:
            self.nvme_children[self.parent[row]] += 1

    def detach_extent(self, row: int) -> None:
        """The block's bytes are not on NVMe any more."""
        if self.extent[row] != NO_EXTENT:
            self.extent[row] = NO_EXTENT
            if self.parent[row] != NO_ROW:
                self.nvme_children[self.parent[row]] -= 1

    def remove(self, row: int) -> None:
        """Take out a row that has nothing behind it."""
        if self.state[row] != State.UNNAMED:
            self._leave(row)
        self.detach_slot(row)
        self.detach_extent(row)
        self.state[row] = State.ABSENT
        self.source[row] = NO_ROW
        self._hashes[row] = None
        self._free.append(row)

    def unname(self, row: int) -> None:
        """A resident row with nothing behind it leaves the tree; its bytes stay, under the same row."""
        assert self.state[row] == State.RESIDENT, f"row {row} is not resident"
        self._leave(row)
        self.state[row] = State.UNNAMED

    def restore(
        self,
        hashes: Sequence[BlockHash],
        parents: np.ndarray,
        extents: np.ndarray,
        checksums: np.ndarray,
        uses: np.ndarray,
        last_used_s: np.ndarray,
        *,
        unnamed_depths: Sequence[int] = (),
    ) -> None:
        """Fill an empty index with resident blocks that are on NVMe only.

        Args:
            hashes: n distinct hashes, every block after the block before it, then those of unnamed ones.
            parents: int32, position of the block before; NO_ROW: a root.
            extents, checksums, uses, last_used_s: their columns; NO_EXTENT for what `restore_aliases` will name.
            unnamed_depths: where the blocks that only aliases reach stood, the last of `hashes`.
        """
        assert not self._rows, "only an empty index can be restored"
        count, named = len(hashes), len(hashes) - len(unnamed_depths)
        self._grow_to(max(1024, count))
        self._hashes = list(hashes)
        self._free = []
        self._rows = dict(zip(hashes[:named], range(named), strict=True))
        span = slice(0, count)
        self.extent[span], self.checksum[span] = extents, checksums
        self.uses[span], self.last_used_s[span] = uses, last_used_s
        self.committed_at_s[span] = last_used_s  # no record says when: at the latest then
        self.checksummed[span] = True
        self.state[:named] = State.RESIDENT
        self.state[named:count] = State.UNNAMED
        self._link_all(parents)
        on_nvme_behind = parents[(parents != NO_ROW) & (extents != NO_EXTENT)]
        self.nvme_children[span] = np.bincount(on_nvme_behind, minlength=count)
        depths: list[int] = []
        for parent in parents[:named].tolist():
            depths.append(0 if parent == NO_ROW else depths[parent] + 1)
        self.depth[span] = [*depths, *unnamed_depths]

    def restore_aliases(self, rows: Rows, sources: Rows, owners: np.ndarray) -> None:
        """Rows that `restore` left without bytes are aliases; what is behind them has their owner (uint64)."""
        self.source[rows], self.owner[rows] = sources, owners
        self.checksummed[rows] = False
        for row in np.flatnonzero(self.parent != NO_ROW).tolist() if len(rows) else ():  # fronts have smaller numbers
            if self.owner[self.parent[row]] != NO_OWNER:
                self.owner[row] = self.owner[self.parent[row]]

    def check(self) -> None:
        """Assert the room's invariants. For tests; O(n)."""
        named = np.flatnonzero((self.state != State.ABSENT) & (self.state != State.UNNAMED))
        assert len(named) == len(self._rows), f"{len(named)} rows named, {len(self._rows)} hashes known"
        assert self._written == int(np.count_nonzero(self.state == State.WRITTEN)), "count of WRITTEN rows is off"
        for row in np.flatnonzero(self.state == State.UNNAMED).tolist():
            assert self.parent[row] == self.first_child[row] == NO_ROW, f"row {row}: in the tree without a name"
            assert self.source[row] == NO_ROW, f"row {row}: an alias without a name"
        for row in named.tolist():
            assert self._rows[self.hash_of(row)] == row, f"row {row}: its hash names another row"
            in_dram = sum(self.slot[child] != NO_SLOT for child in self.children(row))
            assert self.dram_children[row] == in_dram, f"row {row}: count of children in DRAM is off"
            on_nvme = sum(self.extent[child] != NO_EXTENT for child in self.children(row))
            assert self.nvme_children[row] == on_nvme, f"row {row}: count of children on NVMe is off"
            self._check_bytes(row)
            parent = int(self.parent[row])
            if parent == NO_ROW:
                assert self.depth[row] == 0, f"row {row}: a root at depth {self.depth[row]}"
                continue
            assert self.state[parent] not in (State.ABSENT, State.UNNAMED), f"row {row}: the block before it is absent"
            assert self.depth[row] == self.depth[parent] + 1, f"row {row}: depth does not follow"
            assert row in set(self.children(parent)), f"row {row}: not among the blocks behind {parent}"
            assert self.owner[parent] in (NO_OWNER, self.owner[row]), f"row {row}: behind another session's block"
            if self.state[row] == State.RESIDENT:
                assert self.state[parent] == State.RESIDENT, f"row {row}: resident behind one that is not"

    def _check_bytes(self, row: int) -> None:
        has_bytes = self.slot[row] != NO_SLOT or self.extent[row] != NO_EXTENT
        source = int(self.source[row])
        if source == NO_ROW:
            assert has_bytes, f"row {row}: its bytes are nowhere"
            return
        assert not has_bytes, f"row {row}: an alias with bytes of its own"
        assert self.state[source] >= State.RESIDENT, f"row {row}: the block it is an alias of is gone"
        assert self.source[source] == NO_ROW, f"row {row}: an alias of an alias"
        assert self.owner[row] != NO_OWNER, f"row {row}: an alias of nobody's"

    def _settle(self, row: int, resident: list[int]) -> None:
        """Make a written row resident if its parent is, then what waits behind it."""
        waiting = [row]
        while waiting:
            at = waiting.pop()
            parent = int(self.parent[at])
            if self.state[at] != State.WRITTEN or (parent != NO_ROW and self.state[parent] != State.RESIDENT):
                continue
            self.state[at] = State.RESIDENT
            self._written -= 1
            resident.append(at)
            waiting.extend(self.children(at))

    def _add_chain(self, parent: int, hashes: Sequence[BlockHash]) -> Rows:
        """Blank rows for a chain of absent hashes behind `parent`; the caller says what they are."""
        count = len(hashes)
        rows = self._take_rows(count)
        first, last = int(rows[0]), int(rows[-1])
        are_neighbours = last - first + 1 == count  # nearly always, and much faster
        for name, (_, blank) in COLUMNS.items():
            getattr(self, name)[slice(first, last + 1) if are_neighbours else rows] = blank
        self.parent[rows[1:]] = rows[:-1]
        self.first_child[rows[:-1]] = rows[1:]
        first_depth = 0 if parent == NO_ROW else int(self.depth[parent]) + 1
        self.depth[rows] = np.arange(first_depth, first_depth + count, dtype=np.int32)
        if parent != NO_ROW:
            self.owner[rows] = self.owner[parent]
        self._link(int(rows[0]), parent)
        numbers = rows.tolist()
        self._rows.update(zip(hashes, numbers, strict=True))
        if are_neighbours:
            self._hashes[first : last + 1] = hashes
        else:
            for row, block_hash in zip(numbers, hashes, strict=True):
                self._hashes[row] = block_hash
        return rows

    def _leave(self, row: int) -> None:
        """Take a row without children out of the tree and its hash out of use."""
        assert self.first_child[row] == NO_ROW, f"row {row} still has blocks behind it"
        self._written -= int(self.state[row] == State.WRITTEN)
        parent = int(self.parent[row])
        if parent != NO_ROW:
            self.dram_children[parent] -= int(self.slot[row] != NO_SLOT)
            self.nvme_children[parent] -= int(self.extent[row] != NO_EXTENT)
        self._cut(row)
        del self._rows[self.hash_of(row)]

    def _take_rows(self, count: int) -> Rows:
        """Absent rows, upwards."""
        kept = max(0, len(self._free) - count)
        reused = np.array(self._free[kept:], dtype=np.int32)
        del self._free[kept:]
        begin, end = len(self._hashes), len(self._hashes) + count - len(reused)
        self._hashes.extend([None] * (end - begin))
        if end > self._capacity:
            self._grow_to(max(end, self._capacity + self._capacity // 2))
        return np.concatenate((np.sort(reused), np.arange(begin, end, dtype=np.int32)))
