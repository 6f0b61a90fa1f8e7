"""device_path: blocks through the buffer in GPU memory: the daemon copies, a kernel scatters or gathers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

import kvservice_client
from kvservice_adapters.gpu.buffer import BufferedLoad, Gathered, HbmBuffer, LoadAhead, Mover, default_buffer_bytes
from kvservice_adapters.gpu.kernels import BlockMover
from kvservice_adapters.gpu.parts import KeyRows
from kvservice_adapters.positions import Rope
from kvservice_adapters.transformers.layout import BlockLayout, KVRows
from kvservice_adapters.transformers.paths import Ahead, Arrival, Arrived, Joined, Outgoing, RowsFor
from kvservice_adapters.transformers.sequence import TrackedSequence
from kvservice_adapters.transformers.support import ServedModel
from kvservice_client.device import CachePart, PlaneInUse

_MOVERS_MAX = 64
_FINISH_TIMEOUT_S = 10.0


class PreparedMover(Mover, Protocol):
    """A mover that is compiled before it is used, and serves other caches of the same layout."""

    def prepare(self, rope: Rope | None) -> None:
        """Compile what its calls need, and turns by this rope. Blocks."""
        ...

    def at(self, addresses: np.ndarray) -> PreparedMover:
        """The same for parts at these addresses, int64 [parts]."""
        ...


Geometry: TypeAlias = tuple[tuple[int, int], ...]
"""Where each layer's keys and values start, and from head to head in elements."""


def made_for(client: kvservice_client.Client, served: ServedModel, *, rope: Rope | None, size_bytes: int) -> DevicePath:
    """The path of this model's caches, with a buffer of that size; 0: the default size.

    Raises:
        InvalidRequest, CudaError: there is no plane for it. torch.OutOfMemoryError.
    """
    layout = served.layout
    buffer = HbmBuffer(
        client,
        layer_bytes=[layout.block_size_bytes // layout.layers] * layout.layers,
        size_bytes=size_bytes or default_buffer_bytes(served.device, block_size_bytes=layout.block_size_bytes),
        device=served.device,
    )
    return DevicePath(buffer, layout, served.device, rope=rope)


class DevicePath:
    """The GPU's path. Its blocks are numbered by their place in the sequence: a mover belongs to one cache."""

    def __init__(
        self,
        buffer: HbmBuffer,
        layout: BlockLayout,
        device: torch.device,
        *,
        rope: Rope | None,
        make_mover: Callable[..., PreparedMover] = BlockMover,
        current_stream: Callable[[], Any] | None = None,
    ) -> None:
        """Args:
        rope: of the model whose saved keys may move; None: blocks that moved are not asked for.
        make_mover, current_stream: instead of the kernels and torch's stream.
        """
        self._buffer = buffer
        self._layout = layout
        self._device = device
        self._rope = rope
        self._make_mover = make_mover
        self._current_stream = current_stream or partial(torch.cuda.current_stream, device)
        # A mover is nothing but where its cache is, so that it serves whatever cache is there now.
        self._movers: OrderedDict[Geometry, Mover] = OrderedDict()
        self._first_mover: PreparedMover | None = None

    @property
    def plane(self) -> PlaneInUse:
        """Between daemon and buffer."""
        return self._buffer.plane

    @property
    def outgoing_blocks_max(self) -> int:
        """As many as the buffer has."""
        return max(1, self._buffer.blocks)

    @property
    def ahead_blocks_max(self) -> int:
        """Half of the buffer; the rest stays for saves, and for loads that cannot wait."""
        return self._buffer.blocks // 2

    @property
    def ahead_blocks_now(self) -> int:
        """What is left of that."""
        return max(0, self._buffer.free_blocks - self._buffer.blocks // 2)

    def load(
        self, sequence: TrackedSequence, hashes: Sequence[bytes], rows_for: RowsFor, *, wait_s: float, deadline_s: float
    ) -> Arrival:
        """Begin to load into the buffer; see HbmBuffer for what has no room there."""
        load = self._begin(sequence, hashes, wait_s=wait_s, deadline_s=deadline_s)
        if load is None:
            mover = self._mover_of(rows_for(len(hashes)), len(hashes))
            return self._load_from(0, sequence, hashes, mover, wait_s=wait_s, deadline_s=deadline_s)
        if not load.blocks:
            return Arrived(kvservice_client.LoadResult(0, load.reason))
        # Bytes move while room is made for them.
        return self._go_on(load, sequence, hashes[: load.blocks], rows_for, wait_s=wait_s, deadline_s=deadline_s)

    def load_ahead(self, sequence: TrackedSequence, hashes: Sequence[bytes], *, deadline_s: float) -> Ahead | None:
        """Begin to load into the buffer, where the blocks stay until it is said where they go."""
        load = self._begin(sequence, hashes, wait_s=0.0, deadline_s=deadline_s)
        return None if load is None else _DeviceAhead(load, partial(self._go_on, load, sequence))

    def copy_out(self, rows: KVRows, first_block: int, count: int) -> Outgoing | None:
        """Gather into the buffer on the current stream, as many blocks as have a place there."""
        mover = self._mover_of(rows, first_block + count)
        while count:
            gathered = self._buffer.gather(mover, range(first_block, first_block + count))
            if gathered is not None:
                return _DeviceOutgoing(self._buffer, gathered, count)
            count //= 2
        return None

    def prepare(self, *, blocks: int) -> None:
        """Compile the kernels, for caches that are aligned as torch aligns its memory."""
        shape = (self._layout.kv_heads, self._layout.tokens_per_block, self._layout.head_dim)
        rows = torch.empty(shape, dtype=self._layout.dtype, device=self._device)
        self._made_for(((rows.data_ptr(), rows.stride(0)),) * (2 * self._layout.layers)).prepare(self._rope)

    def close(self) -> None:
        """Wait until nothing touches the buffer, and give it back."""
        self._buffer.close()

    def _begin(
        self, sequence: TrackedSequence, hashes: Sequence[bytes], *, wait_s: float, deadline_s: float
    ) -> LoadAhead | None:
        return self._buffer.load_ahead(
            hashes,
            session_id=sequence.session_id,
            request_id=sequence.request_id,
            deadline_s=deadline_s,
            wait_s=wait_s,
            rope=self._rope,
        )

    def _go_on(
        self,
        ahead: LoadAhead,
        sequence: TrackedSequence,
        hashes: Sequence[bytes],
        rows_for: RowsFor,
        *,
        wait_s: float,
        deadline_s: float,
    ) -> Arrival:
        mover = self._mover_of(rows_for(len(hashes)), len(hashes))
        leading = self._arrival_of(ahead.into(mover, range(ahead.blocks)))
        if ahead.blocks == len(hashes) or not leading.blocks:
            return leading
        try:
            rest = self._load_from(ahead.blocks, sequence, hashes, mover, wait_s=wait_s, deadline_s=deadline_s)
        except BaseException:
            leading.cancel()
            raise
        return Joined(leading, rest)

    def _load_from(
        self,
        first: int,
        sequence: TrackedSequence,
        hashes: Sequence[bytes],
        mover: Mover,
        *,
        wait_s: float,
        deadline_s: float,
    ) -> Arrival:
        load = self._buffer.load(
            hashes,
            mover,
            range(first, len(hashes)),
            session_id=sequence.session_id,
            request_id=sequence.request_id,
            deadline_s=deadline_s,
            wait_s=wait_s,
            rope=self._rope,
            first_place=first,
        )
        return self._arrival_of(load)

    def _arrival_of(self, load: BufferedLoad) -> Arrival:
        if not load.blocks:
            return Arrived(kvservice_client.LoadResult(0, load.reason))
        return _DeviceArrival(load, self._current_stream)

    def _mover_of(self, rows: KVRows, end_block: int) -> Mover:
        """Raises ValueError: the cache is not what the layout says, or shorter: nothing checks that on the GPU."""
        heads, tokens, head_dim = self._layout.block_shape[2:]
        parts = [part for pair in rows for part in pair]
        for dtype, shape, strides in {(part.dtype, part.shape, part.stride()) for part in parts}:
            is_shape = (shape[0], shape[2]) == (heads, head_dim) and shape[1] >= end_block * tokens
            if dtype != self._layout.dtype or not is_shape or strides[1:] != (head_dim, 1):
                raise ValueError(
                    f"the cache row is {dtype} {list(shape)} of strides {strides}; needed: "
                    f"{self._layout.dtype} [{heads}, at least {end_block * tokens}, {head_dim}], a head's contiguous"
                )
        if len(rows) != self._layout.layers:
            raise ValueError(f"the cache has {len(rows)} layers, not {self._layout.layers}")
        heads_of = tuple((part.data_ptr(), part.stride(0)) for part in parts)
        mover = self._movers.pop(heads_of, None) or self._made_for(heads_of)
        self._movers[heads_of] = mover
        if len(self._movers) > _MOVERS_MAX:
            self._movers.popitem(last=False)
        return mover

    def _made_for(self, heads_of: Geometry) -> PreparedMover:
        """Of one sequence's cache: a part is a block's tokens of one head's keys or values."""
        starts, steps = np.array(heads_of, dtype=np.int64).T[:, :, None]
        addresses = (starts + steps * self._layout.dtype.itemsize * np.arange(self._layout.kv_heads)).ravel()
        if self._first_mover is None:
            self._first_mover = self._first_made(addresses)
            return self._first_mover
        return self._first_mover.at(addresses)

    def _first_made(self, addresses: np.ndarray) -> PreparedMover:
        heads, tokens, head_dim = self._layout.block_shape[2:]
        size_bytes = tokens * head_dim * self._layout.dtype.itemsize
        parts = [
            CachePart(address, size_bytes, size_bytes, number // (2 * heads))
            for number, address in enumerate(addresses.tolist())
        ]
        keys = KeyRows(head_dim, head_dim, key_rows=tokens, tokens=tokens, group_rows=tokens, row_divisor=1)
        key_parts = [number for number in range(len(parts)) if number // heads % 2 == 0]
        turning = dict.fromkeys(key_parts, keys) if self._rope is not None else None
        return self._make_mover(parts, dtype=self._layout.dtype, device=self._device, keys=turning)


class _DeviceArrival:
    is_complete = False

    def __init__(self, load: BufferedLoad, current_stream: Callable[[], Any]) -> None:
        self._load = load
        self._current_stream = current_stream
        self.blocks = load.blocks

    def wait_layer(self, layer: int) -> None:
        self._load.wait_layer(layer, self._current_stream())

    def finish(self) -> kvservice_client.LoadResult:
        self._current_stream().synchronize()
        return self._load.finish(_FINISH_TIMEOUT_S)

    def cancel(self) -> None:
        self._load.cancel()


class _DeviceAhead:
    def __init__(self, load: LoadAhead, go_on: Callable[..., Arrival]) -> None:
        self._load = load
        self._go_on = go_on

    @property
    def blocks(self) -> int:
        return 0 if self._load.has_failed else self._load.blocks

    def into(self, rows_for: RowsFor, hashes: Sequence[bytes], *, wait_s: float, deadline_s: float) -> Arrival:
        return self._go_on(hashes, rows_for, wait_s=wait_s, deadline_s=deadline_s)

    def cancel(self) -> None:
        self._load.cancel()


class _DeviceOutgoing:
    def __init__(self, buffer: HbmBuffer, gathered: Gathered, blocks: int) -> None:
        self._buffer = buffer
        self._gathered = gathered
        self.blocks = blocks

    def save(
        self, hashes: Sequence[bytes], *, parent: bytes, session_id: str, request_id: str, deadline_s: float
    ) -> kvservice_client.SaveResult:
        return self._buffer.save(
            self._gathered,
            hashes,
            parent=parent,
            session_id=session_id,
            request_id=request_id,
            deadline_s=deadline_s,
        )
