"""plan: what must be copied to move some blocks of a geometry, as few large moves as their places allow.

Pure: arithmetic on whole arrays. A copy engine moves many equally spaced rows in one command, and the driver takes
one call for them: 512 rows of 64 KiB cost 4 us to queue and run at the speed of the bus, where as many single pieces
cost 0.5 ms and leave gaps. So blocks that are equally spaced on both sides go as rows, and the rest as pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvservice_cuda.geometry import Geometry

ROWS_MIN = 16
"""Fewer rows are faster as single pieces on several streams."""
PITCH_MAX_BYTES = (1 << 31) - 1
"""From one row to the next, CU_DEVICE_ATTRIBUTE_MAX_PITCH."""
_PIECE_BYTES = 256 << 10  # pieces that may be as long as one likes are made this long


@dataclass(frozen=True, slots=True)
class Rows:
    """Equally spaced runs of bytes: row r is at `device + r * device_pitch_bytes`, and so on the host's side."""

    device: int
    device_pitch_bytes: int
    host: int
    host_pitch_bytes: int
    width_bytes: int
    rows: int

    @property
    def is_contiguous(self) -> bool:
        """Whether each row follows the one before on both sides: one run of bytes."""
        return self.device_pitch_bytes == self.host_pitch_bytes == self.width_bytes


@dataclass(frozen=True, slots=True)
class Pieces:
    """Single runs of bytes: three uint64 arrays of one length."""

    device: np.ndarray
    host: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def size_bytes(self) -> int:
        """All of them together."""
        return int(self.sizes.sum())

    def __getitem__(self, part: slice) -> Pieces:
        return Pieces(self.device[part], self.host[part], self.sizes[part])


_NO_PIECES = Pieces(*[np.zeros(0, dtype=np.uint64)] * 3)


@dataclass(frozen=True, slots=True)
class Moves:
    """All that has to be copied for some consecutive layers.

    Attributes:
        layers_done: how many layers are there when they are.
    """

    layers_done: int
    rows: tuple[Rows, ...]
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class _Columns:
    """The same parts of every block, those that are adjacent joined: arrays of one length, int64."""

    firsts: np.ndarray  # address of block 0's
    starts: np.ndarray  # place in the block
    strides: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True, slots=True)
class _Run:
    """Blocks, by their place in the call, that are equally spaced on both sides."""

    first: int
    count: int


class Plan:
    """A geometry in its place."""

    def __init__(self, geometry: Geometry, region_addresses: np.ndarray) -> None:
        """`region_addresses`: uint64, where each region starts."""
        self.geometry = geometry
        ordered = [found for of_layer in geometry.by_layer for found in of_layer]
        pieces = [piece for _, piece in ordered]
        offsets = np.array([piece.offset_bytes for piece in pieces], dtype=np.int64)
        self._parts = _Columns(
            firsts=region_addresses.astype(np.int64)[[piece.region for piece in pieces]] + offsets,
            starts=np.array([start for start, _ in ordered], dtype=np.int64),
            strides=np.array([piece.block_stride_bytes for piece in pieces], dtype=np.int64),
            sizes=np.array([piece.size_bytes for piece in pieces], dtype=np.int64),
        )
        self._layer_bytes = [sum(piece.size_bytes for _, piece in of_layer) for of_layer in geometry.by_layer]
        self._layer_ends = np.cumsum([len(of_layer) for of_layer in geometry.by_layer]).tolist()
        self._joins = len(_joined(self._parts, slice(None)).sizes) < len(pieces)
        self._block_step_max = PITCH_MAX_BYTES // max(1, int(self._parts.strides.max()))

    def moves(self, blocks: np.ndarray, host: np.ndarray, *, group_bytes: int) -> Iterator[Moves]:
        """Consecutive layers together, in order, as soon as they have that many bytes.

        Args:
            blocks: the engine's block numbers, each below `geometry.blocks`.
            host: uint64, where each block's bytes start in host memory; no two overlap.
        """
        assert len(blocks) == len(host), "a place in host memory for each block"
        blocks, host = blocks.astype(np.int64), host.astype(np.int64)
        runs = _runs(blocks, host, block_step_max=self._block_step_max)
        single = np.ones(len(blocks), dtype=bool)
        for run in runs:
            single[run.first : run.first + run.count] = False
        single_blocks, single_host = blocks[single], host[single]
        if self._joins:
            group_bytes = max(group_bytes, _PIECE_BYTES * len(single_blocks))
        for layers_done, part in self._groups(len(blocks), group_bytes):
            columns = _joined(self._parts, part)
            rows = tuple(rows for run in runs for rows in _rows(columns, run, blocks, host))
            pieces = _pieces(columns, single_blocks, single_host) if len(single_blocks) else _NO_PIECES
            yield Moves(layers_done, rows, pieces)

    def _groups(self, blocks: int, group_bytes: int) -> Iterator[tuple[int, slice]]:
        first = waiting_bytes = 0
        for layer, size_bytes in enumerate(self._layer_bytes, start=1):
            waiting_bytes += size_bytes * blocks
            if waiting_bytes >= group_bytes or layer == len(self._layer_bytes):
                yield layer, slice(first, self._layer_ends[layer - 1])
                first, waiting_bytes = self._layer_ends[layer - 1], 0


def _joined(parts: _Columns, part: slice) -> _Columns:
    firsts, starts, strides, sizes = parts.firsts[part], parts.starts[part], parts.strides[part], parts.sizes[part]
    if len(sizes) == 1:
        return _Columns(firsts, starts, strides, sizes)
    continues = (
        (firsts[:-1] + sizes[:-1] == firsts[1:])
        & (starts[:-1] + sizes[:-1] == starts[1:])
        & (strides[:-1] == strides[1:])
    )
    heads = np.flatnonzero(np.concatenate(([True], ~continues))[: len(sizes)])
    if len(heads) == len(sizes):
        return _Columns(firsts, starts, strides, sizes)
    return _Columns(firsts[heads], starts[heads], strides[heads], np.add.reduceat(sizes, heads))


def _runs(blocks: np.ndarray, host: np.ndarray, *, block_step_max: int) -> list[_Run]:
    """Where at least ROWS_MIN blocks follow each other in equal steps, upwards on both sides."""
    if len(blocks) < ROWS_MIN:
        return []
    block_steps, host_steps = blocks[1:] - blocks[:-1], host[1:] - host[:-1]
    usable = (block_steps > 0) & (block_steps <= block_step_max) & (host_steps > 0) & (host_steps <= PITCH_MAX_BYTES)
    same = (block_steps[1:] == block_steps[:-1]) & (host_steps[1:] == host_steps[:-1])
    if same.all():  # the case of a whole chain in a buffer
        return [_Run(0, len(blocks))] if usable[0] else []
    edges = np.concatenate(([0], np.flatnonzero(~same) + 1, [len(block_steps)]))
    runs: list[_Run] = []
    end = 0
    # Steps first..last are equal: the blocks from `first` to the one behind `last`, of which the run before may have
    # taken the first.
    for place in np.flatnonzero((edges[1:] - edges[:-1] >= ROWS_MIN - 1) & usable[edges[:-1]]):
        first, count = int(edges[place]), int(edges[place + 1] - edges[place]) + 1
        taken = max(0, end - first)
        if count - taken >= ROWS_MIN:
            runs.append(_Run(first + taken, count - taken))
            end = first + count
    return runs


def _rows(columns: _Columns, run: _Run, blocks: np.ndarray, host: np.ndarray) -> Iterator[Rows]:
    first = int(blocks[run.first])
    block_step = int(blocks[run.first + 1]) - first
    place = int(host[run.first])
    host_pitch_bytes = int(host[run.first + 1]) - place
    for address, start, stride, size in zip(
        columns.firsts.tolist(), columns.starts.tolist(), columns.strides.tolist(), columns.sizes.tolist(), strict=True
    ):
        yield Rows(address + first * stride, block_step * stride, place + start, host_pitch_bytes, size, run.count)


def _pieces(columns: _Columns, blocks: np.ndarray, host: np.ndarray) -> Pieces:
    # Part by part, so that the same part of neighbouring blocks stands side by side.
    device = columns.firsts[:, None] + blocks * columns.strides[:, None]
    places = columns.starts[:, None] + host
    return merged(
        device.ravel().astype(np.uint64),
        places.ravel().astype(np.uint64),
        np.repeat(columns.sizes, len(blocks)).astype(np.uint64),
    )


def merged(device: np.ndarray, host: np.ndarray, sizes: np.ndarray) -> Pieces:
    """Pieces in order, neighbours that are adjacent on both sides joined into one."""
    if len(sizes) < 2:
        return Pieces(device, host, sizes)
    continues = (device[:-1] + sizes[:-1] == device[1:]) & (host[:-1] + sizes[:-1] == host[1:])
    starts = np.flatnonzero(np.concatenate(([True], ~continues)))
    return Pieces(device[starts], host[starts], np.add.reduceat(sizes, starts))
