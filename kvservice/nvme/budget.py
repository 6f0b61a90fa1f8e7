"""budget: what a volume's journal and the file system's own bookkeeping may take of the byte cap.

Everything is counted before it exists: a segment is promised only if the journal of all places, the new ones included,
still fits the cap at its largest, which is while a new checkpoint is written beside the old one.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvservice.nvme.files import PAGE_BYTES

RECORDS_PER_PAGE = 24
KIB, MIB = 1 << 10, 1 << 20

PLACE_BYTES = 1024
"""Taken for each place: two checkpoints (228 each) and the log (twice 228) of its records and its share of sessions,
and the file system's map of where its extent is (32)."""

NAMESPACE_BYTES = 2 * PAGE_BYTES
"""For each namespace: its page in two checkpoints."""

SEGMENT_BYTES = PAGE_BYTES + 16 * KIB
"""For each segment: its header page, the file system's map of the file, its entry in the directory."""

_SESSION_BYTES_PER_PLACE = 57
_LOG_FLOOR_BYTES = (256 * KIB, 64 * MIB)
_LOG_THRESHOLD_BYTES_MAX = 256 * MIB
_LOG_FILE_BYTES = (64 * KIB, 64 * MIB)
_FIXED_BYTES = 128 * KIB
"""Superblock, lock, probe, and the directories themselves."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the journal may take, for so many places and namespaces.

    Attributes:
        checkpoint_bytes: one checkpoint.
        session_bytes: what sessions may take of it.
        log_threshold_bytes: from here on the log asks for a checkpoint.
        log_bytes: all log files together, while a checkpoint is written too.
        log_file_bytes: one log file.
    """

    checkpoint_bytes: int
    session_bytes: int
    log_threshold_bytes: int
    log_bytes: int
    log_file_bytes: int


def budget_for(*, capacity_bytes: int, places: int, namespaces: int) -> Budget:
    """The journal's budget. It grows by at most PLACE_BYTES with a place, NAMESPACE_BYTES with a namespace."""
    session_bytes = (_SESSION_BYTES_PER_PLACE * places // PAGE_BYTES + 1) * PAGE_BYTES
    # One page each for the last pages that are not full, and for the end.
    pages = places // RECORDS_PER_PAGE + 3 * namespaces + 2
    per_places = places // RECORDS_PER_PAGE * PAGE_BYTES + session_bytes
    threshold = max(_log_floor_bytes(capacity_bytes), min(per_places, _LOG_THRESHOLD_BYTES_MAX))
    file_bytes = _within(threshold // 4 // PAGE_BYTES * PAGE_BYTES, _LOG_FILE_BYTES)
    return Budget(pages * PAGE_BYTES + session_bytes, session_bytes, threshold, 2 * threshold + file_bytes, file_bytes)


def fixed_bytes(capacity_bytes: int) -> int:
    """What a volume takes before it has a segment."""
    empty = budget_for(capacity_bytes=capacity_bytes, places=0, namespaces=0)
    return _FIXED_BYTES + 2 * empty.checkpoint_bytes + empty.log_bytes + _LOG_FILE_BYTES[1] // 64


def _log_floor_bytes(capacity_bytes: int) -> int:
    return _within(capacity_bytes // 256 // PAGE_BYTES * PAGE_BYTES, _LOG_FLOOR_BYTES)


def _within(value: int, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(value, bounds[1]))
