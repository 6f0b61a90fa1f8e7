"""Truncate: a part of a session's chain stands under new hashes, at new positions, without a copy.

The ranges are rounded inwards: a kept range is shrunk to the whole blocks inside it, so that never
more tokens stay than were asked for. A dropped part is rounded up, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.blocks import NO_ROW, BlockHash, Chain, DropReason, Rows
from kvservice.config import Config
from kvservice.errors import InvalidRequest
from kvservice.index import NO_OWNER, State
from kvservice.sessions import owner_of, session_key
from kvservice.store import requests
from kvservice.store.journal import Journal
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.outcomes import KeptRun, Miss, Truncated

RANGES_MAX = 64


@dataclass(frozen=True, slots=True)
class KeepRanges:
    """Token positions [start, end) that stay; ascending, not overlapping."""

    ranges: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class DropOldest:
    """A part of the blocks goes, the oldest behind the first `sink_blocks`."""

    ratio: float
    sink_blocks: int


def plan(keep: KeepRanges | DropOldest, chain_blocks: int, tokens_per_block: int) -> list[KeptRun]:
    """Which blocks stay, after rounding.

    Raises:
        InvalidRequest: ranges that are out of order, beyond the chain or too many; a ratio outside (0, 1);
            nothing stays.
    """
    if isinstance(keep, DropOldest):
        ranges = _ranges_after_drop(keep, chain_blocks)
    else:
        ranges = _whole_blocks(keep.ranges, chain_blocks, tokens_per_block)
    runs, new_first = [], 0
    for first, end in ranges:
        if end > first:
            runs.append(KeptRun(first, end - first, new_first))
            new_first += end - first
    if not runs:
        raise InvalidRequest(f"no whole block of the chain's {chain_blocks} would stay: keep more", field="keep")
    return runs


def _ranges_after_drop(keep: DropOldest, chain_blocks: int) -> list[tuple[int, int]]:
    if not 0.0 < keep.ratio < 1.0:
        raise InvalidRequest(f"drop_ratio is {keep.ratio}, must be between 0 and 1", field="drop_ratio")
    sinks = min(keep.sink_blocks, chain_blocks)
    # The product may be a hair above a whole number: 0.1 * 30 is not 3.0000000000000004 blocks.
    resume = sinks + math.ceil(round(keep.ratio * chain_blocks, 6))
    return [(0, sinks), (resume, chain_blocks)]


def _whole_blocks(ranges: Sequence[tuple[int, int]], chain_blocks: int, tokens_per_block: int) -> list[tuple[int, int]]:
    if len(ranges) > RANGES_MAX:
        raise InvalidRequest(f"{len(ranges)} ranges, at most {RANGES_MAX}", field="ranges")
    length, before = chain_blocks * tokens_per_block, 0
    for start, end in ranges:
        if not before <= start < end <= length:
            raise InvalidRequest(
                f"range [{start}, {end}) does not follow {before} inside the chain's {length} tokens", field="ranges"
            )
        before = end
    return [(-(-start // tokens_per_block), end // tokens_per_block) for start, end in ranges]


class Truncating:
    """The truncating call of the store."""

    def __init__(self, config: Config, journal: Journal, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._journal = journal
        self._clock = clock

    def truncate(
        self,
        instance: Peer,
        namespace: Namespace,
        packed_source: bytes,
        keep: KeepRanges | DropOldest,
        packed: bytes,
        *,
        session_id: str,
    ) -> Truncated:
        """Make aliases for the kept blocks as far as these are held. Repeating it changes nothing.

        Raises:
            InvalidRequest: no session, bad ranges, hashes that do not match the plan or are not salted.
        """
        if not session_id:
            raise InvalidRequest("a truncation belongs to a session: name it", field="session_id")
        session = session_key(session_id)
        source_hashes = self._source(namespace, packed_source, session)
        if not source_hashes:
            return Truncated(0, [], 0, Miss.NOT_HELD)
        kept = plan(keep, len(source_hashes), namespace.spec.tokens_per_block)
        if not packed:
            return Truncated(len(source_hashes), kept, 0, Miss.NOT_HELD)
        hashes = self._new_hashes(namespace, packed, kept, source_hashes)
        owner = owner_of(session)
        # Room first: what leaves for it may be what would have been kept.
        self._make_room(namespace, owner, instance.instance_id, hashes)
        rows = namespace.index.rows_of(hashes)
        self._require_own(namespace, rows, owner)
        sources, miss = self._kept_rows(namespace, kept, source_hashes, owner)
        resident = int(np.count_nonzero(namespace.index.state[rows] == State.RESIDENT))
        if resident < len(rows):
            rows, miss = rows[:resident], Miss.BEING_WRITTEN
        elif len(sources) > len(rows):
            rows = self._add_aliases(namespace, hashes[: len(sources)], rows, sources, owner, instance.instance_id)
        if len(rows):
            namespace.touch(rows, self._clock())
            namespace.sessions.extend(session, rows, int(rows[-1]))
        return Truncated(len(source_hashes), kept, len(rows), miss)

    def _add_aliases(
        self,
        namespace: Namespace,
        hashes: Sequence[BlockHash],
        present: Rows,
        sources: Rows,
        owner: int,
        instance_id: int,
    ) -> Rows:
        """Aliases behind the rows that are present; all rows of the chain."""
        behind = int(present[-1]) if len(present) else NO_ROW
        sources = sources[len(present) :]
        added = namespace.index.insert_aliases(behind, hashes[len(present) :], sources, owner)
        namespace.aliases.add(added.tolist(), sources.tolist(), owner, instance_id)
        self._journal.aliased(namespace, added)
        rows: Rows = np.append(present, added)
        return rows

    def _require_own(self, namespace: Namespace, rows: Rows, owner: int) -> None:
        if len(rows) and namespace.index.owner[rows[-1]] not in (NO_OWNER, owner):
            raise InvalidRequest("the new hashes are another session's: salt them with the session", field="hashes")

    def _source(self, namespace: Namespace, packed: bytes, session: bytes) -> list[BlockHash]:
        if packed:
            return requests.chain(namespace, packed, hashes_max=self._config.hashes_per_call_max).hashes()
        tip = next(reversed(namespace.sessions.tips(session)), NO_ROW)
        return [namespace.index.hash_of(row) for row in namespace.index.ancestors(tip)][::-1]

    def _new_hashes(
        self, namespace: Namespace, packed: bytes, kept: Sequence[KeptRun], source_hashes: Sequence[BlockHash]
    ) -> list[BlockHash]:
        hashes = requests.chain(namespace, packed, hashes_max=self._config.hashes_per_call_max).hashes()
        requests.require_distinct(hashes)
        blocks = sum(run.blocks for run in kept)
        if len(hashes) != blocks:
            raise InvalidRequest(f"{len(hashes)} hashes for {blocks} kept blocks; see the plan", field="hashes")
        if len(hashes) > namespace.aliases.addable:
            raise InvalidRequest(f"{len(hashes)} kept blocks, at most {namespace.aliases.addable}", field="hashes")
        if not set(hashes).isdisjoint(source_hashes):
            raise InvalidRequest("the new hashes name blocks of the old chain: salt them per session", field="hashes")
        return hashes

    def _make_room(self, namespace: Namespace, owner: int, instance_id: int, hashes: Sequence[BlockHash]) -> None:
        def adding() -> int:
            return len(hashes) - len(namespace.index.rows_of(hashes))

        while (row := namespace.aliases.row_over_bounds(owner, instance_id, adding())) != NO_ROW:
            namespace.drop_subtrees([row], DropReason.ALIAS_LIMIT, self._clock())

    def _kept_rows(
        self, namespace: Namespace, kept: Sequence[KeptRun], source_hashes: Sequence[BlockHash], owner: int
    ) -> tuple[Rows, Miss]:
        """Rows with the bytes of the leading kept blocks that are held, and why they end."""
        index = namespace.index
        chain = Chain(b"".join(source_hashes), namespace.spec.hash_size_bytes)
        hit = index.hit_length(chain)
        rows = index.rows_of(source_hashes[:hit])
        if len(rows) and index.owner[rows[-1]] not in (NO_OWNER, owner):
            return rows[:0], Miss.OTHER_SESSION
        leading: list[int] = []
        for run in kept:
            part = rows[run.first_block : run.first_block + run.blocks].tolist()
            leading += part
            if len(part) < run.blocks:
                break
        return index.bytes_rows(np.array(leading, dtype=np.int32)), requests.miss_after(namespace, chain, hit)
