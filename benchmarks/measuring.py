"""measuring: how a figure is made: ours and the reference take turns, medians of seven, one record per result.

Covers: buffers, turns, medians, records. Does not cover: what is measured (one file per subject) and the bounds
(`figures`). Nothing here knows the daemon.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

REPETITIONS = 7
PAGE_SIZE_BYTES = 4096

_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_LIBC.memcmp.restype = ctypes.c_int


class Skipped(Exception):
    """The subject cannot be measured here, and the message says why (a program that is not installed, say)."""


class WrongBytes(Exception):
    """What came back is not what was stored: no figure may be reported."""


@dataclass(frozen=True, slots=True)
class Record:
    """One result, as it is printed.

    Attributes:
        name: which figure.
        value: ours, in `unit`.
        unit: "GB/s" (10^9 bytes), "us" (microseconds), "bytes".
        reference: what it is compared with, in `unit`; None where the bound is absolute.
        ratio: value over reference, or the value itself where there is no reference.
    """

    name: str
    value: float
    unit: str
    reference: float | None
    ratio: float

    @classmethod
    def compared(cls, name: str, value: float, unit: str, reference: float) -> Self:
        """A result whose ratio is `value` over `reference`."""
        return cls(name, value, unit, reference, value / reference)

    @classmethod
    def absolute(cls, name: str, value: float, unit: str) -> Self:
        """A result that is judged by itself."""
        return cls(name, value, unit, None, value)

    def to_json(self) -> str:
        """One line: {"name", "value", "unit", "reference", "ratio"}, numbers to five significant digits."""
        return json.dumps(
            {
                "name": self.name,
                "value": _rounded(self.value),
                "unit": self.unit,
                "reference": None if self.reference is None else _rounded(self.reference),
                "ratio": _rounded(self.ratio),
            }
        )


Turn = Callable[[int], Mapping[str, float]]
"""One side's part of a repetition (its number is given): seconds by the name of what was timed."""


@dataclass(frozen=True, slots=True)
class Turns:
    """What both sides took, in seconds, by name; entry i of every series is repetition i."""

    reference: Mapping[str, Sequence[float]]
    ours: Mapping[str, Sequence[float]]

    def throughput(self, name: str, size_bytes: int, *, ours: str, reference: str) -> Record:
        """GB/s of moving `size_bytes`, by the median times of those two series; higher is better."""
        return Record.compared(
            name,
            size_bytes / statistics.median(self.ours[ours]) / 1e9,
            "GB/s",
            size_bytes / statistics.median(self.reference[reference]) / 1e9,
        )

    def latency(self, name: str, *, ours: str, reference: str) -> Record:
        """Microseconds, by the median times of those two series; lower is better."""
        return Record.compared(
            name,
            statistics.median(self.ours[ours]) * 1e6,
            "us",
            statistics.median(self.reference[reference]) * 1e6,
        )


def take_turns(*, reference: Turn, ours: Turn, repetitions: int, title: str) -> Turns:
    """Let both sides run `repetitions` times, next to each other in time, the order swapping every time.

    Whatever slows the machine down for a while then slows both, and neither always runs on the caches that the other
    one left. Each repetition's times go to stderr under `title`.
    """
    sides: dict[str, dict[str, list[float]]] = {"reference": {}, "ours": {}}
    for repetition in range(repetitions):
        order = [("reference", reference), ("ours", ours)]
        if repetition % 2:
            order.reverse()
        shown = []
        for side, turn in order:
            for name, elapsed_s in turn(repetition).items():
                sides[side].setdefault(name, []).append(elapsed_s)
                shown.append(f"{side} {name} {elapsed_s * 1e3:.3f} ms")
        progress(f"{title} {repetition + 1}/{repetitions}: {', '.join(shown)}")
    return Turns(reference=sides["reference"], ours=sides["ours"])


def progress(text: str) -> None:
    """One line on stderr; stdout is for records."""
    print(text, file=sys.stderr, flush=True)


class PrivateBuffer:
    """Private anonymous memory of this process, every page touched before anything is timed.

    Attributes:
        size_bytes: its size, a whole number of pages.
        address: where it starts.
        view: the same memory, uint8, writable.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = -(-size_bytes // PAGE_SIZE_BYTES) * PAGE_SIZE_BYTES
        self._memory = mmap.mmap(-1, self.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.wipe()

    def wipe(self) -> None:
        """Overwrite everything, so that bytes of an earlier repetition cannot pass for those of this one."""
        ctypes.memset(self.address, 0xA5, self.size_bytes)

    def fill_random(self, seed: int) -> None:
        """Bytes that repeat nowhere, the same for the same seed."""
        source = random.Random(seed)
        piece_bytes = 1 << 20
        for start in range(0, self.size_bytes, piece_bytes):
            end = min(start + piece_bytes, self.size_bytes)
            self.view[start:end] = source.randbytes(end - start)


class FreshContents:
    """A source buffer whose contents differ in every repetition, without writing gigabytes between two of them.

    The buffer is a window into random bytes; it moves by one page per repetition, so every page of it holds what its
    neighbour held before and stale bytes are found by comparing.
    """

    def __init__(self, size_bytes: int, *, repetitions: int, seed: int = 1) -> None:
        self.size_bytes = size_bytes
        self._buffer = PrivateBuffer(size_bytes + repetitions * PAGE_SIZE_BYTES)
        self._buffer.fill_random(seed)

    @property
    def capacity_bytes(self) -> int:
        """From address(0) to the end of the last repetition's bytes, for who must register the whole."""
        return self._buffer.size_bytes

    def address(self, repetition: int) -> int:
        """Where this repetition's `size_bytes` start."""
        return self._buffer.address + self._start(repetition)

    def view(self, repetition: int) -> memoryview:
        """The same bytes, uint8."""
        start = self._start(repetition)
        return self._buffer.view[start : start + self.size_bytes]

    def _start(self, repetition: int) -> int:
        start = repetition * PAGE_SIZE_BYTES
        assert start + self.size_bytes <= self._buffer.size_bytes, f"repetition {repetition} is past the buffer's end"
        return start


def require_same_bytes(expected_address: int, actual_address: int, size_bytes: int, what: str) -> None:
    """Compare every byte of two ranges of memory.

    Raises:
        WrongBytes: they differ; `what` was being measured.
    """
    if _LIBC.memcmp(expected_address, actual_address, size_bytes):
        raise WrongBytes(f"{what}: the {size_bytes} bytes that came back are not those that were stored")


def median(turn: Callable[[], float], repetitions: int = REPETITIONS) -> float:
    """The median of that many turns, after one that does not count."""
    turn()
    return statistics.median(turn() for _ in range(repetitions))


def publish(records: Iterable[Record], path: Path) -> list[Record]:
    """Print records as they come, one JSON line each, to stdout and into the file; all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    published = []
    with path.open("w", encoding="utf-8") as out:
        for record in records:
            for stream in (out, sys.stdout):
                print(record.to_json(), file=stream, flush=True)
            published.append(record)
    return published


def _rounded(number: float) -> float:
    return float(f"{number:.5g}")
