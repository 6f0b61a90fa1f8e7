"""What a caller sent, checked against every bound before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvservice.blocks import NO_ROW, BlockHash, Chain, Rows
from kvservice.errors import InvalidRequest
from kvservice.index import NO_OWNER, State
from kvservice.leases import Hold
from kvservice.sessions import owner_of, session_key
from kvservice.store.namespace import Namespace
from kvservice.store.outcomes import Miss, Written


def chain(namespace: Namespace, packed: bytes, *, hashes_max: int) -> Chain:
    """The hashes of a call, root first.

    Raises:
        InvalidRequest: none, too many, or not a multiple of the namespace's hash size.
    """
    size = namespace.spec.hash_size_bytes
    if not packed:
        raise InvalidRequest("no hashes: send at least one", field="hashes")
    if len(packed) % size:
        raise InvalidRequest(f"{len(packed)} bytes are not a multiple of the {size}-byte hash", field="hashes")
    if len(packed) > size * hashes_max:
        raise InvalidRequest(f"{len(packed) // size} hashes, at most {hashes_max} per call", field="hashes")
    return Chain(packed, size)


def parent_row(namespace: Namespace, parent: bytes) -> int:
    """The row of the block that a chain's tail follows; NO_ROW for a root or an absent block.

    Raises:
        InvalidRequest: not one hash.
    """
    size = namespace.spec.hash_size_bytes
    if parent and len(parent) != size:
        raise InvalidRequest(f"{len(parent)} bytes are not one {size}-byte hash", field="parent")
    return namespace.index.row_of(BlockHash(parent)) if parent else NO_ROW


def require_distinct(hashes: Sequence[BlockHash]) -> None:
    """Raise InvalidRequest if a hash is named twice: no chain has the same prefix twice."""
    if len(set(hashes)) != len(hashes):
        raise InvalidRequest("a hash is named twice: the hashes are not one chain", field="hashes")


def chosen_positions(hold: Hold, positions: Sequence[int]) -> np.ndarray:
    """Which of the hold's slots a Commit names, as a mask; no positions: all.

    Raises:
        InvalidRequest: not reserved by the Put, committed before, or named twice.
    """
    if not positions:
        return np.ones(len(hold.slots), dtype=bool)
    chosen: np.ndarray = np.isin(hold.positions, positions)
    if np.count_nonzero(chosen) != len(positions):
        raise InvalidRequest(
            "positions must be distinct, and reserved by the Put and not committed yet", field="positions"
        )
    return chosen


def miss_after(namespace: Namespace, chain: Chain, hit: int) -> Miss:
    """Why the block after the first `hit` is not handed out."""
    if hit < len(chain) and namespace.index.row_of(chain.hash_at(hit)) != NO_ROW:
        return Miss.BEING_WRITTEN
    return Miss.NOT_HELD


def own_length(namespace: Namespace, rows: Rows, session_id: str) -> int:
    """How many leading rows of a chain the session may use: nobody's, and its own."""
    if not len(rows) or namespace.index.owner.item(int(rows[-1])) == NO_OWNER:
        return len(rows)  # what is behind an owned block is owned as well
    owners = namespace.index.owner[rows]
    if session_id and owners[-1] == owner_of(session_key(session_id)):
        return len(rows)
    return int(np.argmax(owners != NO_OWNER))


def shift_tokens(namespace: Namespace, rows: Rows) -> tuple[int, ...]:
    """By how many tokens the keys of each block of a chain must be rotated; empty: none of them."""
    index = namespace.index
    # Aliases have an owner, and so has what is behind them: where the last block has none, no block is one.
    if not len(rows) or index.owner.item(int(rows[-1])) == NO_OWNER or (index.source[rows] == NO_ROW).all():
        return ()
    return tuple((index.shift_blocks(rows) * namespace.spec.tokens_per_block).tolist())


def held_shift_tokens(namespace: Namespace, chain: Chain, hit: int) -> tuple[int, ...]:
    """The same for the `hit` leading blocks of a chain, which are held; O(1) where none is an alias."""
    index = namespace.index
    if not hit or index.owner.item(index.row_of(chain.hash_at(hit - 1))) == NO_OWNER:
        return ()
    return shift_tokens(namespace, index.hit_rows(chain, hit))


def known_runs(namespace: Namespace, rows: Rows) -> list[tuple[int, Written]]:
    """Why there is nothing to write for the leading blocks of a Put that the index knows, as runs."""
    resident = int(np.count_nonzero(namespace.index.state[rows] == State.RESIDENT))
    runs = [(resident, Written.HELD), (len(rows) - resident, Written.BEING_WRITTEN)]
    return [run for run in runs if run[0]]
