"""The files of a journal: `log-N` are appended to, `checkpoint-N` says everything up to and including log N."""

from __future__ import annotations

import os
import re

import numpy as np

from kvservice.nvme.files import Files
from kvservice.nvme.folding import fold_records
from kvservice.nvme.format import RECORD, unpack_pages

_NAME = re.compile(r"(log|checkpoint)-(\d{8})")
_READ_BYTES = 16 * 1024 * 1024


class JournalFiles:
    """Reading a journal's directory. Blocking; changes nothing."""

    def __init__(self, directory: str, files: Files) -> None:
        self.directory = directory
        self._files = files

    def names(self) -> list[tuple[str, int]]:
        """("log" or "checkpoint", number) of every file."""
        found = (_NAME.fullmatch(name) for name in os.listdir(self.directory))
        return [(match[1], int(match[2])) for match in found if match]

    def path(self, kind: str, number: int) -> str:
        """Where that file is."""
        return os.path.join(self.directory, f"{kind}-{number:08}")

    def size_bytes(self, *kinds: str) -> int:
        """Bytes of all files of those kinds."""
        return sum(self.size_bytes_of(kind, number) for kind, number in self.names() if kind in kinds)

    def size_bytes_of(self, kind: str, number: int) -> int:
        """Bytes of one file; 0 where there is none (any more)."""
        try:
            return os.stat(self.path(kind, number)).st_size
        except FileNotFoundError:
            return 0  # folded away meanwhile

    def read(self, *, up_to: int | None = None) -> tuple[np.ndarray, int]:
        """The live records (see `fold_records`) and how many pages were damaged. Raises OSError.

        Args:
            up_to: number of the last log that counts; None: all.
        """
        names = [(number, kind) for kind, number in self.names() if up_to is None or number <= up_to]
        newest = max((number for number, kind in names if kind == "checkpoint"), default=0)
        parts, damaged = [np.zeros(0, dtype=RECORD)], 0
        for number, kind in sorted(names):
            if (kind == "log" and number > newest) or (kind == "checkpoint" and number == newest):
                records, bad = unpack_pages(self._content(self.path(kind, number)), file_number=number)
                parts.append(records)
                damaged += bad
        return fold_records(np.concatenate(parts)), damaged

    def _content(self, path: str) -> memoryview:
        descriptor = self._files.open(path, direct=False, create=False)
        try:
            content = bytearray(self._files.size_bytes(descriptor))
            done = 0
            while done < len(content):
                piece = memoryview(content)[done : done + _READ_BYTES]
                if not (count := self._files.read(descriptor, [piece], done)):
                    break
                done += count
        finally:
            self._files.close(descriptor)
        return memoryview(content)[:done]
