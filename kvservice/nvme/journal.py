"""The volume's memory of what is where: a log of records, folded into a checkpoint when it is long.

`index/log-N` are appended to and flushed; `index/checkpoint-N` says everything up to and including
log N, and replaces what is older by an atomic rename. Folding reads files only, so it runs in a
thread beside appends, which go to the next log meanwhile.
"""

from __future__ import annotations

import os
import re
import threading

import numpy as np

from kvservice.nvme.files import Files
from kvservice.nvme.format import PAGE_BYTES, RECORD, RecordKind, pack_pages, unpack_pages

_NAME = re.compile(r"(log|checkpoint)-(\d{8})")
_READ_BYTES = 16 * 1024 * 1024


class Journal:
    """The records of one volume. Blocking; safe to use from several threads."""

    def __init__(self, directory: str, files: Files) -> None:
        self._directory = directory
        self._files = files
        self._lock = threading.Lock()
        self._fold_lock = threading.Lock()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for name in os.listdir(directory):
            if name.endswith(".tmp"):
                files.remove(os.path.join(directory, name))  # a fold that did not finish
        numbers = [number for _, number in self._names()]
        self._number = max(numbers, default=0) + 1
        self._descriptor = files.open(self._path("log", self._number), direct=False, create=True)
        self._size_bytes = 0
        self._sequence = 0

    @property
    def log_bytes(self) -> int:
        """Bytes in logs that no checkpoint covers."""
        return sum(self._file_bytes(kind, number) for kind, number in self._names() if kind == "log")

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self._file_bytes(kind, number) for kind, number in self._names())

    def append(self, records: np.ndarray) -> None:
        """Write and flush records (dtype RECORD). Raises OSError: they may or may not be durable."""
        with self._lock:
            pages = pack_pages(records, self._sequence)
            self._files.write(self._descriptor, [pages], self._size_bytes)
            self._size_bytes += len(pages)
            self._sequence += len(pages) // PAGE_BYTES
            self._files.flush(self._descriptor)

    def read(self) -> tuple[np.ndarray, int]:
        """The live records (see `fold_records`) and how many pages were damaged."""
        return self._read_up_to(self._number)

    def fold(self) -> None:
        """Replace checkpoint and logs by a new checkpoint of what is live. Raises OSError: nothing changed."""
        with self._fold_lock:
            with self._lock:
                covered = self._number
                descriptor = self._files.open(self._path("log", covered + 1), direct=False, create=True)
                self._files.close(self._descriptor)
                self._number, self._descriptor, self._size_bytes = covered + 1, descriptor, 0
            live, _ = self._read_up_to(covered)
            target = self._path("checkpoint", covered)
            draft = self._files.open(f"{target}.tmp", direct=False, create=True)
            try:
                at_once = _READ_BYTES // RECORD.itemsize
                offset = 0
                for start in range(0, len(live), at_once):
                    pages = pack_pages(live[start : start + at_once], offset // PAGE_BYTES)
                    self._files.write(draft, [pages], offset)
                    offset += len(pages)
                self._files.flush(draft)
            finally:
                self._files.close(draft)
            self._files.rename(f"{target}.tmp", target)
            for kind, number in self._names():
                if number < covered or (kind == "log" and number == covered):
                    self._files.remove(self._path(kind, number))

    def close(self) -> None:
        """Give the descriptor back."""
        with self._fold_lock, self._lock:
            self._files.close(self._descriptor)

    def _read_up_to(self, covered: int) -> tuple[np.ndarray, int]:
        names = [(number, kind) for kind, number in self._names() if number <= covered]
        newest = max((number for number, kind in names if kind == "checkpoint"), default=0)
        paths = [self._path("checkpoint", newest)] if newest else []
        paths += [self._path("log", number) for number, kind in sorted(names) if kind == "log" and number > newest]
        parts, damaged = [np.zeros(0, dtype=RECORD)], 0
        for path in paths:
            records, bad = unpack_pages(self._content(path))
            parts.append(records)
            damaged += bad
        return fold_records(np.concatenate(parts)), damaged

    def _content(self, path: str) -> bytes:
        descriptor = self._files.open(path, direct=False, create=False)
        content = bytearray()
        try:
            piece = memoryview(bytearray(_READ_BYTES))
            while (count := self._files.read(descriptor, [piece], len(content))) > 0:
                content += piece[:count]
        finally:
            self._files.close(descriptor)
        return bytes(content)

    def _names(self) -> list[tuple[str, int]]:
        found = (_NAME.fullmatch(name) for name in os.listdir(self._directory))
        return [(match[1], int(match[2])) for match in found if match]

    def _path(self, kind: str, number: int) -> str:
        return os.path.join(self._directory, f"{kind}-{number:08}")

    def _file_bytes(self, kind: str, number: int) -> int:
        try:
            return os.stat(self._path(kind, number)).st_size
        except FileNotFoundError:
            return 0  # folded away meanwhile


def fold_records(records: np.ndarray) -> np.ndarray:
    """The records that still say something: one STORED per live extent, with its last touch, and sessions' ends.

    Args:
        records: dtype RECORD, in the order in which they were written.
    """
    kinds, extents = records["kind"], records["extent"]
    places = np.flatnonzero((kinds == RecordKind.STORED) | (kinds == RecordKind.DROPPED))
    last = _last_of_each(extents[places], places)
    stored = np.sort(last[kinds[last] == RecordKind.STORED])
    live = records[stored].copy()
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
    return np.concatenate((live, _last_sessions(records[kept])))


def _last_sessions(ends: np.ndarray) -> np.ndarray:
    """Each session's last end; earlier ends are in front of it, or were given up."""
    last: dict[bytes, int] = {}
    for position in range(len(ends)):
        last[ends["namespace"][position].tobytes() + ends["hash"][position].tobytes()] = position
    return ends[sorted(last.values())]


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
