"""faulty_files: real files under a store whose calls fail, take long or hang when the test says so."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from kvservice.nvme import RealFiles
from kvservice.nvme.files import Buffer

DATA, INDEX = "/segments/", "/index/"


class FaultyFiles(RealFiles):
    """The operating system's files. What is set here is of one kind of file, `kind`; threads may use it meanwhile."""

    def __init__(self) -> None:
        self.kind = DATA
        self.errors: dict[str, int] = {}
        """The errno that a call ends with, by its name: read, write, flush, allocate."""
        self.delay_s = 0.0
        """What a read takes longer."""
        self.gate = threading.Event()
        """Reads and writes wait until it is set."""
        self.gate.set()
        self.until_gate: dict[str, int] = {}
        """After so many more calls of a name the gate closes by itself."""
        self.waiting = 0
        """How many calls stand before the gate."""
        self.calls: list[str] = []
        """Names of the reads and writes that passed the gate, in that order."""
        self._mutex = threading.Lock()

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._meet("write", descriptor)
        super().write(descriptor, buffers, offset)

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._meet("read", descriptor)
        return super().read(descriptor, buffers, offset)

    def flush(self, descriptor: int) -> None:
        self._fail("flush", descriptor)
        super().flush(descriptor)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        self._fail("allocate", descriptor)
        super().allocate(descriptor, size_bytes)

    def _meet(self, call: str, descriptor: int) -> None:
        if not self._is_meant(descriptor):
            return
        with self._mutex:
            self.waiting += 1
        while not self._passes(call):
            assert self.gate.wait(30), "nobody opened the gate"
        if call == "read" and self.delay_s:
            time.sleep(self.delay_s)
        self._fail(call, descriptor)

    def _passes(self, call: str) -> bool:
        with self._mutex:
            if not self.gate.is_set():
                return False  # closed by another one that stood before it
            self.waiting -= 1
            self.calls.append(call)
            if call in self.until_gate:
                self.until_gate[call] -= 1
                if not self.until_gate[call]:
                    del self.until_gate[call]
                    self.gate.clear()
            return True

    def _fail(self, call: str, descriptor: int) -> None:
        if call in self.errors and self._is_meant(descriptor):
            raise OSError(self.errors[call], os.strerror(self.errors[call]))

    def _is_meant(self, descriptor: int) -> bool:
        return self.kind in os.readlink(f"/proc/self/fd/{descriptor}")
