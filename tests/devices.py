"""devices: a GPU made of host memory and one thread, behind the driver's interface, for machines without one.

Streams, events, flags and copies have the driver's order and nothing more: whatever may run, runs in any order. Every
copy is checked: both ends inside an allocation, or inside pinned memory. A test can hold the copy engines still, let
them fail, and ask what is open, pinned and allocated.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np

from kvservice_cuda.api import IPC_HANDLE_BYTES, CudaError
from kvservice_cuda.driver import Batch, Context, Driver
from kvservice_cuda.plan import Rows

UUID = bytes(range(16))
ILLEGAL_ADDRESS = 700
INVALID_VALUE = 1

Step = Callable[[], bool]
"""Part of a stream's work: does it and says True, or says False where it must wait."""


class FakeGpu:
    """The state that all processes see. A context manager: leaving it ends the thread."""

    def __init__(self) -> None:
        self.allocations: dict[int, mmap.mmap] = {}
        self.unexportable: set[int] = set()
        self.is_honest = True
        """Whether the attribute says what cannot be exported: expandable segments have it and fail."""
        self.opened: list[int] = []
        self.pinned: dict[int, int] = {}
        self.pins_left = 1 << 30
        self.is_held = False
        self.are_copies_held = False
        self._let_through: Collection[int] = ()
        self.failure: CudaError | None = None
        self.copied_bytes = 0
        self.queued_copies = 0
        self.passed: dict[int, int] = {}
        self.recorded: dict[int, int] = {}
        self.changed = threading.Condition(threading.RLock())
        self._streams: dict[int, deque[Step]] = {}
        self._next = 1
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="fake gpu", daemon=True)

    def __enter__(self) -> FakeGpu:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self.changed:
            self._is_over = True
            self.changed.notify_all()
        self._thread.join()

    @property
    def driver(self) -> FakeDriver:
        return FakeDriver(self)

    # ------------------------------------------------------------------- memory

    def allocate(self, size_bytes: int, *, exportable: bool = True) -> int:
        memory = mmap.mmap(-1, size_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.allocations[address] = memory
        if not exportable:
            self.unexportable.add(address)
        return address

    def array(self, address: int) -> np.ndarray:
        """The bytes of an allocation, by its start."""
        return np.frombuffer(self.allocations[address], dtype=np.uint8)

    def allocation_of(self, address: int) -> tuple[int, int]:
        for start, memory in self.allocations.items():
            if start <= address < start + len(memory):
                return start, len(memory)
        raise CudaError(f"{address:#x} is in no allocation", INVALID_VALUE)

    @contextmanager
    def held(self, *, but: Collection[int] = ()) -> Iterator[None]:
        """Nothing that is queued runs meanwhile, but on these streams."""
        with self.changed:
            self.is_held, self._let_through = True, frozenset(but)
        try:
            yield
        finally:
            with self.changed:
                self.is_held, self._let_through = False, frozenset()
                self.changed.notify_all()

    @contextmanager
    def copies_held(self) -> Iterator[None]:
        """The copy engines stand still meanwhile; what does not wait for them runs."""
        self.are_copies_held = True
        try:
            yield
        finally:
            with self.changed:
                self.are_copies_held = False
                self.changed.notify_all()

    # ------------------------------------------------------------------ streams

    def number(self) -> int:
        with self.changed:
            self._next += 1
            return self._next

    def new_stream(self) -> int:
        stream = self.number()
        self._streams[stream] = deque()
        return stream

    def queue(self, stream: int, step: Step) -> None:
        with self.changed:
            if self.failure is not None and self.failure.is_fatal:
                raise self.failure
            self._streams.setdefault(stream, deque()).append(step)
            self.changed.notify_all()

    def fail(self, error: CudaError) -> None:
        """The GPU is lost: nothing that is queued runs."""
        with self.changed:
            self.failure = error
            for each in self._streams.values():
                each.clear()
            self.changed.notify_all()

    def is_idle(self, stream: int) -> bool:
        return not self._streams.get(stream)

    def copy(self, batch: Batch) -> None:
        for array in zip(*_arrays(batch), strict=True):
            destination, source, size = (int(number) for number in array)
            self._copy(destination, source, size)

    def copy_rows(self, rows: Rows, *, to_device: bool) -> None:
        if rows.device_pitch_bytes < rows.width_bytes or rows.host_pitch_bytes < rows.width_bytes:
            raise CudaError("a pitch smaller than the width", INVALID_VALUE)
        for row in range(rows.rows):
            device, host = rows.device + row * rows.device_pitch_bytes, rows.host + row * rows.host_pitch_bytes
            self._copy(*((device, host) if to_device else (host, device)), rows.width_bytes)

    def _copy(self, destination: int, source: int, size_bytes: int) -> None:
        self._require_usable(destination, size_bytes)
        self._require_usable(source, size_bytes)
        ctypes.memmove(destination, source, size_bytes)
        self.copied_bytes += size_bytes

    def _require_usable(self, address: int, size_bytes: int) -> None:
        ranges = [(start, len(memory)) for start, memory in self.allocations.items()] + list(self.pinned.items())
        if not any(start <= address and address + size_bytes <= start + length for start, length in ranges):
            raise CudaError(f"a copy at {address:#x} leaves what it may touch", ILLEGAL_ADDRESS)

    def _run(self) -> None:
        while True:
            with self.changed:
                if self._is_over:
                    return
                has_moved = self._advance()
                self.changed.notify_all()
                if not has_moved:
                    # A flag may be stored by a CPU, which tells nobody.
                    self.changed.wait(0.001)

    def _advance(self) -> bool:
        has_moved = False
        for stream, steps in list(self._streams.items()):
            while steps and (not self.is_held or stream in self._let_through):
                try:
                    if not steps[0]():
                        break
                except CudaError as error:
                    self.fail(error)
                    return True
                steps.popleft()
                has_moved = True
        return has_moved


def _arrays(batch: Batch) -> list[np.ndarray]:
    addresses = (batch.destinations_address, batch.sources_address, batch.sizes_address)
    return [np.frombuffer(ctypes.string_at(address, 8 * batch.pieces), dtype=np.uint64) for address in addresses]


class _Copied:
    """A batch whose arrays the caller may free once it is queued, as the driver promises."""

    def __init__(self, batch: Batch) -> None:
        self.arrays = _arrays(batch)
        self.pieces = batch.pieces
        self.destinations_address, self.sources_address, self.sizes_address = (
            int(array.ctypes.data) for array in self.arrays
        )


class FakeContext(Context):
    """One process's way to the GPU."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.ordinal = 0
        self.gpu = gpu

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        pass

    def allocation_of(self, address: int) -> tuple[int, int]:
        return self.gpu.allocation_of(address)

    def pin(self, address: int, size_bytes: int) -> int:
        if not self.gpu.pins_left:
            raise CudaError("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (2)", 2)
        self.gpu.pins_left -= 1
        self.gpu.pinned[address] = size_bytes
        return address

    def unpin(self, address: int) -> None:
        del self.gpu.pinned[address]

    def export_allocation(self, address: int) -> bytes:
        start, _ = self.gpu.allocation_of(address)
        if start in self.gpu.unexportable:
            raise CudaError("cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE (1)", INVALID_VALUE)
        return start.to_bytes(IPC_HANDLE_BYTES, "little")

    def open_allocation(self, handle: bytes) -> int:
        start = int.from_bytes(handle, "little")
        if start not in self.gpu.allocations:
            raise CudaError("cuIpcOpenMemHandle: no such allocation", INVALID_VALUE)
        self.gpu.opened.append(start)
        return start

    def close_allocation(self, address: int) -> None:
        self.gpu.opened.remove(address)

    def stream(self, *, urgent: bool = False) -> int:
        return self.gpu.new_stream()

    def end_stream(self, stream: int) -> None:
        pass

    def synchronize(self, stream: int) -> None:
        self._until(lambda: self.gpu.is_idle(stream))

    def event(self) -> int:
        return self.gpu.number()

    def end_event(self, event: int) -> None:
        pass

    def record(self, event: int, stream: int) -> None:
        number = self.gpu.recorded[event] = self.gpu.recorded.get(event, 0) + 1

        def step() -> bool:
            self.gpu.passed[event] = max(number, self.gpu.passed.get(event, 0))
            return True

        self.gpu.queue(stream, step)

    def has_passed(self, event: int) -> bool:
        if self.gpu.failure is not None:
            raise self.gpu.failure
        return self.gpu.passed.get(event, 0) >= self.gpu.recorded.get(event, 0)

    def await_event(self, event: int) -> None:
        number = self.gpu.recorded.get(event, 0)
        self._until(lambda: self.gpu.passed.get(event, 0) >= number)

    def order_after(self, stream: int, event: int) -> None:
        number = self.gpu.recorded.get(event, 0)
        self.gpu.queue(stream, lambda: self.gpu.passed.get(event, 0) >= number)

    def write_flag(self, stream: int, address: int, value: int) -> None:
        def step() -> bool:
            ctypes.c_uint64.from_address(address).value = value
            return True

        self.gpu.queue(stream, step)

    def await_flag(self, stream: int, address: int, value: int) -> None:
        self.gpu.queue(stream, lambda: ctypes.c_uint64.from_address(address).value >= value)

    def copy_rows(self, stream: int, rows: Rows, *, to_device: bool) -> None:
        self.gpu.queued_copies += 1

        def step() -> bool:
            if self.gpu.are_copies_held:
                return False
            self.gpu.copy_rows(rows, to_device=to_device)
            return True

        self.gpu.queue(stream, step)

    def copy_batch(self, stream: int, batch: Batch) -> None:
        copied = _Copied(batch)
        self.gpu.queued_copies += 1

        def step() -> bool:
            if self.gpu.are_copies_held:
                return False
            self.gpu.copy(copied)
            return True

        self.gpu.queue(stream, step)

    def _until(self, is_done: Callable[[], bool]) -> None:
        with self.gpu.changed:
            self.gpu.changed.wait_for(lambda: is_done() or self.gpu.failure is not None)
            if not is_done() and self.gpu.failure is not None:
                raise self.gpu.failure


class FakeDriver(Driver):
    """A machine with that one GPU."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def ordinal_of(self, uuid: bytes) -> int | None:
        return 0 if uuid == UUID else None

    def names(self) -> list[str]:
        return ["fake GPU"]

    def uuid(self, ordinal: int) -> bytes:
        return UUID

    def ordinal_at(self, address: int) -> int:
        self.gpu.allocation_of(address)
        return 0

    def is_exportable(self, address: int) -> bool:
        return address not in self.gpu.unexportable or not self.gpu.is_honest

    def context(self, ordinal: int) -> FakeContext:
        return FakeContext(self.gpu)
