"""The volume's memory of what is where: a log of records, folded into a checkpoint when it is long.

A fold replaces checkpoint and logs by a new checkpoint through an atomic rename. It reads files only,
so it runs in a thread beside appends, which go to the next log meanwhile. After a failed write or
flush nothing is appended to that log any more: what the disk has of its end is anybody's guess.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import numpy as np

from kvservice.nvme.files import Files
from kvservice.nvme.format import PAGE_BYTES, RECORDS_PER_PAGE, pack_pages
from kvservice.nvme.journal_files import JournalFiles

_PAGES_AT_ONCE = 4096


class Journal:
    """The records of one volume. Blocking; safe to use from several threads."""

    def __init__(self, directory: str, files: Files) -> None:
        """Raises OSError."""
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._on_disk = JournalFiles(directory, files)
        self._files = files
        self._lock = threading.Lock()
        self._fold_lock = threading.Lock()
        for name in os.listdir(directory):
            if name.endswith(".tmp"):
                files.remove(os.path.join(directory, name))  # a fold that did not finish
        self._number = max((number for _, number in self._on_disk.names()), default=0)
        self._descriptor = -1
        self._pages = 0
        self._log_sizes_bytes = {number: self._on_disk.size_bytes_of("log", number) for number in self._logs()}
        self.log_bytes = sum(self._log_sizes_bytes.values())
        """In logs that no checkpoint covers; a write that failed counts as a whole. Nothing to ask the disk for."""
        self._is_spoilt = True
        with self._lock:
            self._next_log()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return self._on_disk.size_bytes("log", "checkpoint")

    def append(self, records: np.ndarray) -> None:
        """Write and flush records (dtype RECORD). Raises OSError: they may or may not be durable."""
        with self._lock:
            if self._is_spoilt:
                self._next_log()
            self._is_spoilt = True
            pages = pack_pages(records, file_number=self._number, first_page=self._pages)
            self._log_sizes_bytes[self._number] = self._pages * PAGE_BYTES + len(pages)
            self._count()
            self._files.write(self._descriptor, [pages], self._pages * PAGE_BYTES)
            self._files.flush(self._descriptor)
            self._pages += len(pages) // PAGE_BYTES
            self._is_spoilt = False

    def read(self) -> tuple[np.ndarray, int]:
        """The live records and how many pages were damaged. Raises OSError."""
        return self._on_disk.read()

    def fold(self) -> None:
        """Replace checkpoint and logs by a new checkpoint of what is live. Raises OSError: nothing is lost."""
        with self._fold_lock:
            with self._lock:
                covered = self._number
                self._next_log()
            live, _ = self._on_disk.read(up_to=covered)
            target = self._on_disk.path("checkpoint", covered)
            try:
                self._write_checkpoint(f"{target}.tmp", covered, live)
                self._files.rename(f"{target}.tmp", target)
            except OSError:
                with suppress(OSError):  # it takes space until the next start; the first failure is what matters
                    self._files.remove(f"{target}.tmp")
                raise
            for kind, number in self._on_disk.names():
                if number < covered or (kind == "log" and number == covered):
                    self._files.remove(self._on_disk.path(kind, number))
            with self._lock:
                for number in [number for number in self._log_sizes_bytes if number <= covered]:
                    del self._log_sizes_bytes[number]
                self._count()

    def close(self) -> None:
        """Give the descriptor back."""
        with self._fold_lock, self._lock:
            self._files.close(self._descriptor)

    def _logs(self) -> list[int]:
        return [number for kind, number in self._on_disk.names() if kind == "log"]

    def _count(self) -> None:
        self.log_bytes = sum(self._log_sizes_bytes.values())

    def _next_log(self) -> None:
        path = self._on_disk.path("log", self._number + 1)
        descriptor = self._files.open(path, direct=False, create=True)
        if self._descriptor >= 0:
            self._files.close(self._descriptor)
        self._number, self._descriptor, self._pages, self._is_spoilt = self._number + 1, descriptor, 0, False

    def _write_checkpoint(self, path: str, number: int, live: np.ndarray) -> None:
        draft = self._files.open(path, direct=False, create=True)
        try:
            at_once = _PAGES_AT_ONCE * RECORDS_PER_PAGE
            for start in range(0, len(live), at_once):
                first_page = start // RECORDS_PER_PAGE
                pages = pack_pages(live[start : start + at_once], file_number=number, first_page=first_page)
                self._files.write(draft, [pages], first_page * PAGE_BYTES)
            self._files.flush(draft)
        finally:
            self._files.close(draft)
