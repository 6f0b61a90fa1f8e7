"""Counts every byte that a volume writes, whatever for: extents, headers, log, checkpoints, names, probes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvservice.nvme.files import Buffer, Files


class CountedFiles(Files):
    """Other files, counted. Safe to use from several threads."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._mutex = threading.Lock()
        self.written_bytes = 0
        """Bytes that writes were asked for since the start; what failed half way counts as a whole."""

    def open(self, path: str, *, direct: bool, create: bool) -> int:
        return self._files.open(path, direct=direct, create=create)

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        size_bytes = sum(len(buffer) for buffer in buffers)
        with self._mutex:
            self.written_bytes += size_bytes
        self._files.write(descriptor, buffers, offset)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return self._files.read(descriptor, buffers, offset)

    def size_bytes(self, descriptor: int) -> int:
        return self._files.size_bytes(descriptor)

    def flush(self, descriptor: int) -> None:
        self._files.flush(descriptor)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        self._files.allocate(descriptor, size_bytes)

    def rename(self, source: str, target: str) -> None:
        self._files.rename(source, target)

    def remove(self, path: str) -> None:
        self._files.remove(path)

    def close(self, descriptor: int) -> None:
        self._files.close(descriptor)
