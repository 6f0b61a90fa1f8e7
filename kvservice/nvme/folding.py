"""What a journal's records still say, once later ones are taken into account. Pure."""

from __future__ import annotations

import numpy as np

from kvservice.nvme.format import HASH_BYTES_MAX, RecordKind

_SESSIONS_MIN = 1024
_SESSION_SHARE = 4


def sessions_max(live: int) -> int:
    """How many sessions' ends, and how many aliases, are kept beside that many blocks: clients may invent any."""
    return max(_SESSIONS_MIN, live // _SESSION_SHARE)


def fold_records(records: np.ndarray) -> np.ndarray:
    """The records that still say something: one STORED per live extent, with its last touch, sessions' ends, aliases.

    An extent has the block that was stored there last, and a block is where it was stored last: where it
    was before is nobody's, also if the record that said so is lost or the block has left since.

    Args:
        records: dtype RECORD, in the order in which they were written.
    """
    kinds, extents = records["kind"], records["extent"]
    places = np.flatnonzero((kinds == RecordKind.STORED) | (kinds == RecordKind.DROPPED))
    last = _last_of_each(extents[places], places)
    counts = kinds == RecordKind.STORED
    counts[_superseded(records)] = False
    stored = np.sort(last[counts[last]])
    live: np.ndarray = records[stored]
    order = np.argsort(live["extent"], kind="stable")
    in_order = live["extent"][order]
    touches = np.flatnonzero(kinds == RecordKind.TOUCHED)
    touches = _last_of_each(extents[touches], touches)
    at, known = _find(in_order, extents[touches])
    rows, touches = order[at[known]], touches[known]
    newer = touches > stored[rows]
    live["last_used_s"][rows[newer]] = records["last_used_s"][touches[newer]]
    live["uses"][rows[newer]] = records["uses"][touches[newer]]
    sessions = np.flatnonzero(kinds == RecordKind.SESSION)
    at, known = _find(in_order, extents[sessions])
    kept = sessions[known][sessions[known] > stored[order[at[known]]]]
    kept = np.sort(np.append(kept, np.flatnonzero(kinds == RecordKind.FORGOTTEN)))
    aliases = np.flatnonzero((kinds == RecordKind.ALIASED) | (kinds == RecordKind.UNALIASED))
    at, known = _find(in_order, extents[aliases])
    named = _last_of_each_hash(records[aliases[known][aliases[known] > stored[order[at[known]]]]])
    named = named[named["kind"] == RecordKind.ALIASED]
    ends = _last_of_each_hash(records[kept])
    ends = ends[ends["kind"] == RecordKind.SESSION]
    bound = sessions_max(len(live))
    if not len(ends) and not len(named):
        return live  # a copy of a million records costs a tenth of a second
    folded: np.ndarray = np.concatenate((live, ends[-bound:], named[-bound:]))
    return folded


def _superseded(records: np.ndarray) -> np.ndarray:
    """Places of the STORED records whose block was stored once more later."""
    stored = np.flatnonzero(records["kind"] == RecordKind.STORED)
    keys = _block_keys(records["hash"][stored], records["namespace"][stored])
    order = np.argsort(keys, kind="stable")  # of equal keys, the latest comes last
    earlier, later = stored[order[:-1]], stored[order[1:]]
    is_same = keys[order[:-1]] == keys[order[1:]]
    earlier, later = earlier[is_same], later[is_same]
    # Equal keys are nearly always equal blocks; others keep both.
    for field in ("namespace", "hash_size", "hash"):
        is_same = records[field][earlier] == records[field][later]
        earlier, later = earlier[is_same], later[is_same]
    superseded: np.ndarray = earlier
    return superseded


def _block_keys(hashes: np.ndarray, namespaces: np.ndarray) -> np.ndarray:
    """A 64-bit key of each block: equal for equal blocks, rarely for others."""
    words = np.ascontiguousarray(hashes).view("<u8").reshape(len(hashes), HASH_BYTES_MAX // 8)
    odd = (np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    keys = np.asarray((words * odd).sum(axis=1, dtype=np.uint64))
    mixed: np.ndarray = np.bitwise_xor(keys, namespaces)
    return mixed


def _last_of_each_hash(records: np.ndarray) -> np.ndarray:
    """The last record of each hash of a namespace: a session's end (earlier ones are in front of it), an alias."""
    last: dict[bytes, int] = {}
    for position in range(len(records)):
        last[records["namespace"][position].tobytes() + records["hash"][position].tobytes()] = position
    return records[sorted(last.values())]


def _last_of_each(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The last place of each distinct key."""
    _, first_from_the_end = np.unique(keys[::-1], return_index=True)
    result: np.ndarray = places[len(places) - 1 - first_from_the_end]
    return result


def _find(in_order: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted value is in a sorted array, and whether it is there at all."""
    if not len(in_order):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(in_order, wanted), len(in_order) - 1)
    return at, in_order[at] == wanted
