"""kernels: blocks between a run of the buffer and the parts of an engine's cache, keys turned on the way.

    run of the buffer    | block 0: part 0, part 1, ... | block 1: part 0, part 1, ... | ...      contiguous
                              |        |        one program each: (block, part, chunk of the part)
    engine's cache       part p of block b is at address[p] + b * stride[p]

A chunk in which nothing turns is copied as wide words, whatever the bytes mean. Of a chunk with keys of a block that
moved each element is computed from itself and its partner in the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from math import gcd
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kvservice_adapters.gpu.parts import PART_BYTES_MAX, PARTS_MAX, KeyRows, PartGroup, grouped
from kvservice_adapters.gpu.turning import Turned, turned
from kvservice_adapters.gpu.upload import uploaded
from kvservice_adapters.positions import Rope, RopeForm
from kvservice_client.device import CachePart

__all__ = ["BlockMover", "KeyRows"]

_WORD_BYTES_MAX = 16
_CHUNK_BYTES_MAX = 16 << 10
_STEP_ELEMENTS_MAX = 1024
# Products and sums are not fused: the result is bit for bit that of positions.moved.
_OPTIONS = {"enable_fp_fusion": False}
_KEY_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class CopyShape:
    """What a kernel that copies is compiled for. Sizes in bytes.

    Attributes:
        scatters: from the run into the cache; else the other way.
        word_bytes: what every address and size is a multiple of, 16 at most; a power of two.
        chunk_bytes: what a program moves, a power of two.
    """

    scatters: bool
    block_bytes: int
    part_bytes: int
    word_bytes: int
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class TurnShape:
    """How keys lie in a part, see KeyRows, and how they turn.

    Attributes:
        dtype: of Triton.
        step_elements: how many elements a program takes at once.
        table_elements: of one block's cosines.
    """

    dtype: Any
    item_bytes: int
    step_elements: int
    row_elements: int
    tokens: int
    group_rows: int
    row_divisor: int
    pairs: int
    table_elements: int
    is_interleaved: bool


@triton.jit
def _copy_chunk(source, destination, first_byte, shape: tl.constexpr):  # type: ignore[no-untyped-def]
    """A chunk of a part from `first_byte`, as far as the part has one; both addresses are the part's start."""
    if shape.word_bytes >= 8:
        word = tl.int64
    elif shape.word_bytes == 4:
        word = tl.int32
    elif shape.word_bytes == 2:
        word = tl.int16
    else:
        word = tl.int8
    size: tl.constexpr = min(shape.word_bytes, 8)
    aligned: tl.constexpr = shape.word_bytes
    # Two neighbours of eight bytes become one access of sixteen where the compiler knows that they are aligned.
    source = tl.multiple_of(source.to(tl.pointer_type(word)), aligned)
    destination = tl.multiple_of(destination.to(tl.pointer_type(word)), aligned)
    at = first_byte // size + tl.arange(0, shape.chunk_bytes // size)
    if shape.part_bytes % shape.chunk_bytes == 0:
        tl.store(destination + at, tl.load(source + at))
    else:
        is_inside = at < shape.part_bytes // size
        tl.store(destination + at, tl.load(source + at, mask=is_inside), mask=is_inside)


@triton.jit
def _turn_chunk(source, destination, first_byte, key_rows, cosine, sine, shape: tl.constexpr, turn: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of a block that moved: `cosine` and `sine` are its rows of the tables."""
    source = source.to(tl.pointer_type(turn.dtype))
    destination = destination.to(tl.pointer_type(turn.dtype))
    first = first_byte // turn.item_bytes
    for start in range(0, shape.chunk_bytes // turn.item_bytes, turn.step_elements):
        element = first + start + tl.arange(0, turn.step_elements)
        row = element // turn.row_elements
        dim = element % turn.row_elements
        is_inside = element < shape.part_bytes // turn.item_bytes
        turns = is_inside & (row < key_rows) & (dim < 2 * turn.pairs)
        if turn.is_interleaved:
            pair = dim // 2
            is_first = dim % 2 == 0
            partner = tl.where(is_first, element + 1, element - 1)
        else:
            pair = dim % turn.pairs
            is_first = dim < turn.pairs
            partner = tl.where(is_first, element + turn.pairs, element - turn.pairs)
        token = row // turn.group_rows * turn.tokens + row % turn.group_rows // turn.row_divisor % turn.tokens
        at = token * turn.pairs + pair
        one = tl.load(source + element, mask=is_inside)
        other = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
        cos = tl.load(cosine + at, mask=turns, other=1.0)
        sin = tl.load(sine + at, mask=turns, other=0.0)
        result = one.to(tl.float32) * cos + tl.where(is_first, -other, other) * sin
        # What does not turn keeps its bits: values beside the keys, dimensions that carry no position.
        tl.store(destination + element, tl.where(turns, result.to(turn.dtype), one), mask=is_inside)


# Not compiled anew for an address that is aligned otherwise: what copies need to know of that is in `shape`.
@triton.jit(do_not_specialize=["run", "parts", "first_part", "block_ids", "turn_rows", "cosine", "sine"])
def move_chunks(  # type: ignore[no-untyped-def]
    run, parts, first_part, block_ids, turn_rows, cosine, sine, shape: tl.constexpr, turn: tl.constexpr
):
    """Program (i, p, c): chunk c of part `first_part + p` of block `block_ids[i]`, block i of the run.

    Args:
        run: uint8 [blocks, block_bytes].
        parts: int64 [parts, 4], see PartRow.
        block_ids: int32 [blocks].
        turn_rows, cosine, sine: a Turned's; None where turn is.
    """
    block = tl.program_id(0).to(tl.int64)  # caches and buffers exceed 4 GiB
    part = parts + (first_part + tl.program_id(1)) * 4
    there = tl.load(part) + tl.load(block_ids + block).to(tl.int64) * tl.load(part + 1)
    here = run.to(tl.int64) + block * shape.block_bytes + tl.load(part + 2)
    first_byte = tl.program_id(2) * shape.chunk_bytes
    if shape.scatters:
        source = here
        destination = there
    else:
        source = there
        destination = here
    if turn is None:
        _copy_chunk(source, destination, first_byte, shape)
    else:
        key_rows = tl.load(part + 3).to(tl.int32)
        turn_row = tl.load(turn_rows + block).to(tl.int64)
        if (turn_row >= 0) & (first_byte < key_rows * (turn.row_elements * turn.item_bytes)):
            cosine += turn_row * turn.table_elements
            sine += turn_row * turn.table_elements
            _turn_chunk(source, destination, first_byte, key_rows, cosine, sine, shape, turn)
        else:
            _copy_chunk(source, destination, first_byte, shape)


class BlockMover:
    """Moves blocks between a run of the buffer and the parts of an engine's cache, by one kernel per call.

    One more where parts have different sizes: one per size. A call launches and returns. Any thread, and any stream of
    the device; a run, its block ids and its turn must be there for the stream that is current, and stay until its work
    has passed. Nothing can check block ids: they must be the cache's, no two the same.

    Attributes:
        layers: how many the parts tell apart.
        block_size_bytes: of a block, all parts together.
    """

    def __init__(
        self,
        parts: Sequence[CachePart],
        *,
        dtype: torch.dtype,
        device: torch.device,
        keys: Mapping[int, KeyRows] | KeyRows | None = None,
    ) -> None:
        """Of that cache, which must outlive the mover.

        Args:
            parts: in the order of a block's bytes.
            dtype: of keys and values; matters only where keys turn.
            keys: which parts have keys, by their place in `parts`, and where; one for all; None: nothing turns.

        Raises:
            ValueError: no parts, a part too large, or not what `keys` says; keys of a dtype that is not turned.
        """
        if not 1 <= len(parts) <= PARTS_MAX or not all(1 <= part.size_bytes <= PART_BYTES_MAX for part in parts):
            raise ValueError(f"{len(parts)} parts, must be 1 to {PARTS_MAX}, each of 1 to {PART_BYTES_MAX} bytes")
        of_part = dict.fromkeys(range(len(parts)), keys) if isinstance(keys, KeyRows) else dict(keys or {})
        if of_part and dtype not in _KEY_DTYPES:
            raise ValueError(f"keys in {dtype} are not turned: they would be rounded twice")
        for rows, part_bytes in {(rows, parts[at].size_bytes) for at, rows in of_part.items()}:
            rows.require_fits(part_bytes, dtype.itemsize)
        self.layers = max(part.layer for part in parts) + 1
        self.block_size_bytes = sum(part.size_bytes for part in parts)
        self._dtype = dtype
        self._keys = frozenset(of_part.values())
        self._groups, table = grouped(parts, of_part, layers=self.layers)
        place_of = {offset: at for at, offset in enumerate(accumulate((part.size_bytes for part in parts), initial=0))}
        self._places = np.array([place_of[row[2]] for row in table])
        self._rows = torch.tensor(table, dtype=torch.int64)
        self._spacing_bytes = gcd(
            _WORD_BYTES_MAX, self.block_size_bytes, *(number for row in table for number in row[1:3])
        )
        self._device = device
        self._put(np.array([part.address for part in parts], dtype=np.int64))

    def at(self, addresses: np.ndarray) -> BlockMover:
        """A mover of the same parts elsewhere: for an engine whose every sequence has a cache of its own.

        Takes a small part of the time that a new one takes.

        Args:
            addresses: where each part of block 0 is now, int64 [parts].

        Raises:
            ValueError: another number of addresses, or keys that are not aligned there.
        """
        made = copy(self)
        made._put(addresses)  # noqa: SLF001  # of this class
        return made

    def _put(self, addresses: np.ndarray) -> None:
        if len(addresses) != len(self._places):
            raise ValueError(f"{len(addresses)} addresses for {len(self._places)} parts")
        # The largest power of two that divides all.
        self._word_bytes = gcd(self._spacing_bytes, int(np.bitwise_or.reduce(addresses)))
        if self._keys and self._word_bytes < self._dtype.itemsize:
            raise ValueError(f"parts are aligned to {self._word_bytes} bytes, keys have {self._dtype.itemsize}")
        rows = self._rows.clone()
        rows[:, 0] = torch.from_numpy(addresses[self._places])
        self._table = uploaded(rows.flatten(), torch.int64, self._device)
        self._device = self._table.device  # with its number
        is_cuda = self._device.type == "cuda"
        self._uploaded = torch.cuda.current_stream(self._device).record_event() if is_cuda else None

    def prepare(self, rope: Rope | None = None) -> None:
        """Compile what calls need, turns by this rope too. Blocks: a second or two, where it was never done before.

        Without it the first call of each kind does that.
        """
        turn = None
        if rope is not None and self._keys:
            tokens = next(iter(self._keys)).block_tokens
            turn = turned(rope, [1], first_place=0, tokens=tokens, device=self._device)
        run = torch.empty(0, dtype=torch.uint8, device=self._device)
        block_ids = torch.empty(0, dtype=torch.int32, device=self._device)
        with self._on_device():
            for group, scatters in product(self._groups, (False, True)):
                for of_call in (None, turn) if scatters and turn else (None,):
                    shape, how = self._shapes(group, self._word_bytes, of_call, scatters=scatters)
                    arguments = (run, self._table, 0, block_ids, *_tables(of_call, how), shape, how)
                    # A grid of nothing: Triton's own warm-up leaves building the launcher to the first launch.
                    move_chunks[(0, 1, 1)](*arguments, **_OPTIONS)

    def scatter(
        self,
        run: torch.Tensor,
        block_ids: torch.Tensor,
        *,
        first_layer: int,
        end_layer: int,
        turn: Turned | None = None,
    ) -> None:
        """Copy these layers of a run into the engine's cache, on torch's current stream; keys turn on the way.

        Args:
            run: uint8 [blocks, block_size_bytes], contiguous.
            block_ids: int32 [blocks], on the device: where each of its blocks goes.
            turn: of the same blocks; None: nothing moved.

        Raises:
            ValueError: arguments that do not fit together or this mover; nothing was launched.
        """
        if turn is not None:
            self._require_turns(run, turn)
        self._launch(run, block_ids, first_layer, end_layer, turn, scatters=True)

    def gather(
        self, run: torch.Tensor, block_ids: torch.Tensor, *, first_layer: int = 0, end_layer: int | None = None
    ) -> None:
        """Copy these layers of the engine's blocks into a run; as `scatter`, the other way, and nothing turns."""
        self._launch(run, block_ids, first_layer, self.layers if end_layer is None else end_layer, None, scatters=False)

    def _launch(
        self,
        run: torch.Tensor,
        block_ids: torch.Tensor,
        first_layer: int,
        end_layer: int,
        turn: Turned | None,
        *,
        scatters: bool,
    ) -> None:
        blocks = block_ids.numel()
        if run.shape != (blocks, self.block_size_bytes) or run.dtype != torch.uint8 or not run.is_contiguous():
            raise ValueError(f"a run {run.dtype} {tuple(run.shape)} for {blocks} blocks of {self.block_size_bytes}")
        if block_ids.dtype != torch.int32 or not block_ids.is_contiguous():
            raise ValueError(f"block ids of {block_ids.dtype}, must be int32 and contiguous")
        if {run.device, block_ids.device} != {self._device}:
            raise ValueError(f"a run on {run.device}, block ids on {block_ids.device}, must be on {self._device}")
        if not 0 <= first_layer <= end_layer <= self.layers:
            raise ValueError(f"layers {first_layer} to {end_layer} of {self.layers}")
        if not blocks:
            return
        word_bytes = gcd(self._word_bytes, run.data_ptr())
        with self._on_device():
            self._keep_table()
            for group in self._groups:
                first, end = group.first_of_layer[first_layer], group.first_of_layer[end_layer]
                if first == end:
                    continue
                shape, how = self._shapes(group, word_bytes, turn, scatters=scatters)
                grid = (blocks, end - first, -(-group.size_bytes // shape.chunk_bytes))
                move_chunks[grid](run, self._table, first, block_ids, *_tables(turn, how), shape, how, **_OPTIONS)

    def _shapes(
        self, group: PartGroup, word_bytes: int, turn: Turned | None, *, scatters: bool
    ) -> tuple[CopyShape, TurnShape | None]:
        """What the group's kernel is compiled for."""
        shape = _copy_shape(scatters, self.block_size_bytes, group.size_bytes, word_bytes)
        if turn is None or group.keys is None:
            return shape, None
        pairs = turn.rotary_dims // 2
        return shape, _turn_shape(group.keys, self._dtype, shape.chunk_bytes, turn.tokens, pairs, turn.form)

    def _require_turns(self, run: torch.Tensor, turn: Turned) -> None:
        if not self._keys:
            raise ValueError("a turn for parts without keys")
        for rows in self._keys:
            if rows.block_tokens != turn.tokens or rows.head_dim < turn.rotary_dims:
                raise ValueError(f"{turn.tokens} tokens of {turn.rotary_dims} dimensions turn, keys are {rows}")
        if turn.row.numel() != run.shape[0] or turn.row.device != self._device:
            raise ValueError(f"a turn of {turn.row.numel()} blocks on {turn.row.device} for {run.shape[0]} blocks")
        if run.data_ptr() % self._dtype.itemsize:
            raise ValueError(f"a run at {run.data_ptr():#x}: keys are not aligned")

    def _on_device(self) -> AbstractContextManager[object]:
        # Triton launches on the device that is current, which is another one's in a thread that nobody told.
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _keep_table(self) -> None:
        """The current stream's work finds the table, also after the mover is gone."""
        if self._uploaded is not None:
            stream = torch.cuda.current_stream(self._device)
            if not self._uploaded.query():
                stream.wait_event(self._uploaded)
            self._table.record_stream(stream)


def _tables(turn: Turned | None, how: TurnShape | None) -> tuple[torch.Tensor | None, ...]:
    return (None, None, None) if turn is None or how is None else (turn.row, turn.cosine, turn.sine)


@cache
def _copy_shape(scatters: bool, block_bytes: int, part_bytes: int, word_bytes: int) -> CopyShape:  # noqa: FBT001
    chunk_bytes = min(_CHUNK_BYTES_MAX, max(_WORD_BYTES_MAX, triton.next_power_of_2(part_bytes)))
    return CopyShape(scatters, block_bytes, part_bytes, word_bytes, chunk_bytes)


@cache
def _turn_shape(
    rows: KeyRows, dtype: torch.dtype, chunk_bytes: int, block_tokens: int, pairs: int, form: RopeForm
) -> TurnShape:
    return TurnShape(
        dtype=_KEY_DTYPES[dtype],
        item_bytes=dtype.itemsize,
        step_elements=min(_STEP_ELEMENTS_MAX, chunk_bytes // dtype.itemsize),
        row_elements=rows.row_elements,
        tokens=rows.tokens,
        group_rows=rows.group_rows,
        row_divisor=rows.row_divisor,
        pairs=pairs,
        table_elements=block_tokens * pairs,
        is_interleaved=form is RopeForm.INTERLEAVED,
    )
