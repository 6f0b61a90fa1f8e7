"""buffer: blocks on their way between the service and an engine's cache, in the engine's GPU memory.

The daemon's copy engines move large contiguous pieces into and out of it, at the speed of the bus whatever the engine's
layout is; kernels of the engine's own process scatter and gather. See DESIGN.md.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate

import torch

from kvservice_adapters.gpu.ahead import LoadAhead
from kvservice_adapters.gpu.aiming import Aiming
from kvservice_adapters.gpu.loads import BufferedLoad, Mover, Piece, Run
from kvservice_adapters.gpu.room import Room
from kvservice_adapters.gpu.saves import Gathered
from kvservice_adapters.gpu.streams import Streams, TorchStreams
from kvservice_adapters.gpu.upload import uploaded
from kvservice_adapters.positions import Rope
from kvservice_client import Client, InvalidRequest, Reason, SaveResult
from kvservice_client.device import CachePart, DeviceCache, DeviceKV, PlaneInUse
from kvservice_cuda.api import CudaError
from kvservice_cuda.driver import Driver

__all__ = ["BufferedLoad", "Gathered", "HbmBuffer", "LoadAhead", "Mover", "default_buffer_bytes"]

_log = logging.getLogger(__name__)

_SHARE_OF_GPU = 0.03
_BLOCKS_MIN = 64
_CLOSE_WAIT_S = 10.0
_POLL_S = 100e-6

_kept: list[torch.Tensor] = []
"""Buffers that a daemon may still write into, though they were closed: nobody else may have that memory."""


def default_buffer_bytes(device: torch.device, *, block_size_bytes: int = 0) -> int:
    """3 % of the GPU's memory, or 64 blocks if that is more; at most half of what is free now."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return min(max(int(_SHARE_OF_GPU * total_bytes), _BLOCKS_MIN * block_size_bytes), free_bytes // 2)


class HbmBuffer:
    """The paper's HBM read and write buffer. Thread-safe. Fail-open: a failure of the service or the GPU is a miss.

    Attributes:
        blocks: how many it has room for.
    """

    def __init__(
        self,
        client: Client,
        *,
        layer_bytes: Sequence[int],
        size_bytes: int,
        device: torch.device,
        driver: Driver | None = None,
        memory: torch.Tensor | None = None,
        streams: Streams | None = None,
    ) -> None:
        """Take the memory and register it with the daemon, now and with every later one.

        Args:
            layer_bytes: of a block, how many bytes each layer has, in the order of the block's bytes.
            size_bytes: of the buffer; what is not a whole block is not used.
            memory: uint8, at least `size_bytes`, to use instead of memory of torch's.
            streams: instead of torch's.

        Raises:
            InvalidRequest: the buffer holds no block, or its blocks are not the namespace's. torch.OutOfMemoryError.
        """
        self.block_size_bytes = sum(layer_bytes)
        self.blocks = size_bytes // self.block_size_bytes if self.block_size_bytes else 0
        if not self.blocks:
            raise InvalidRequest(f"a buffer of {size_bytes} bytes for blocks of {self.block_size_bytes}")
        self._client = client
        self._layer_bytes = tuple(layer_bytes)
        if memory is None:
            memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
            # Kernels that were launched before may still use what torch gave out again; the daemon does not wait.
            torch.cuda.synchronize(device)
        self._memory = memory[: self.blocks * self.block_size_bytes].view(self.blocks, self.block_size_bytes)
        self._device = memory.device
        self._streams = streams or TorchStreams(self._device)
        driver = driver or Driver()
        starts = accumulate(layer_bytes, initial=0)
        parts = [
            CachePart(self._memory.data_ptr() + start, self.block_size_bytes, size, layer)
            for layer, (start, size) in enumerate(zip(starts, layer_bytes, strict=False))
        ]
        self._kv = DeviceKV(client, DeviceCache(self.blocks, tuple(parts)), driver=driver)
        try:
            self._context = driver.context(driver.ordinal_at(self._memory.data_ptr()))
            self._uploads = self._context.stream(urgent=True)  # never waits for anything
            self._scatters = self._context.stream(urgent=True)
        except CudaError as error:
            self._kv.close()
            raise InvalidRequest(f"the buffer cannot be used: {error}") from None
        tokens_per_block = client.namespace.tokens_per_block
        self._aiming = Aiming(
            self._context, self._streams, self._device, uploads=self._uploads, tokens_per_block=tokens_per_block
        )
        self._changed = threading.Condition()
        self._room = Room(self._memory)
        self._calls = 0
        self._is_closed = False

    @property
    def plane(self) -> PlaneInUse:
        """How bytes travel between daemon and buffer at present, and why not better."""
        return self._kv.plane

    @property
    def free_blocks(self) -> int:
        """How many nobody uses now; not all of them need be neighbours."""
        return self._room.free_blocks

    # -------------------------------------------------------------------- loads

    def load(
        self,
        hashes: Sequence[bytes],
        mover: Mover,
        block_ids: Sequence[int],
        *,
        session_id: str = "",
        request_id: str = "",
        wait_s: float = 0.0,
        deadline_s: float = 10.0,
        rope: Rope | None = None,
        first_place: int = 0,
    ) -> BufferedLoad:
        """Begin to load the longest held prefix into the engine's cache, behind this thread's stream.

        Returns when the copy into the buffer has begun. More than there is room for is loaded in turn: all but the last
        piece of it is in the engine's cache then; loads whose stream has not come to them are finished for their room.

        Args:
            hashes: the chain, root first.
            mover: of the engine's cache.
            block_ids: where the blocks from `first_place` on go, no two the same.
            wait_s: how long to wait for blocks from NVMe; what comes later is a miss. 0.0: deadline_s.
            deadline_s: a load that has not arrived by then has failed, and no stream waits for it any more.
            rope: blocks whose tokens moved are accepted, and their keys turned; None: they are misses.
            first_place: so many leading blocks are in the engine's cache already, and are not loaded.

        Raises:
            InvalidRequest: the arguments do not fit.
        """
        self._require_fits(mover)
        if not 0 <= first_place <= len(hashes) or len(block_ids) != len(hashes) - first_place:
            raise InvalidRequest(f"{len(block_ids)} block ids for {len(hashes)} hashes from place {first_place} on")
        ends_at_s = time.monotonic() + deadline_s
        call = {
            "session_id": session_id,
            "request_id": request_id,
            "wait_s": wait_s,
            "accepts_shifts": rope is not None,
        }
        pieces: list[Piece] = []
        shifts: list[int] = []
        reason = Reason.OK
        with self._in_use() as is_open:
            engine = self._aiming.engine_event() if is_open else None
            if engine is None:
                return BufferedLoad(Reason.INTERNAL if is_open else Reason.CLOSED)
            while len(shifts) < len(block_ids):
                start = len(shifts)
                run = self._room.wait(len(block_ids) - start, self._land, ends_at_s=ends_at_s)
                if run is None:
                    reason = Reason.OVERLOADED
                    break
                piece = self._begin(
                    run, hashes, first_place + start, deadline_s=max(0.1, ends_at_s - time.monotonic()), **call
                )
                reason = piece.load.reason
                if not piece.blocks:
                    break
                ids = block_ids[start : start + piece.blocks]
                if not self._aiming.aim(piece, mover, ids, engine, rope, first_place + start):
                    reason = Reason.INTERNAL
                    break
                pieces.append(piece)
                shifts.extend(piece.load.shifts)
                if reason is not Reason.OK:
                    break
            return self._load_of(pieces, shifts, reason, ends_at_s)

    def _load_of(self, pieces: list[Piece], shifts: list[int], reason: Reason, ends_at_s: float) -> BufferedLoad:
        """The last piece is for the engine's stream, all before it are waited for."""
        landed = 0
        for number, piece in enumerate(pieces[:-1]):
            outcome = self._land(piece, max(0.1, ends_at_s - time.monotonic()))
            if outcome is not Reason.OK:
                for later in pieces[number + 1 :]:
                    later.cancel()
                return BufferedLoad(outcome, shifts=shifts[:landed])
            landed += piece.blocks
        last = pieces[-1] if pieces else None
        return BufferedLoad(reason, last, shifts, landing_stream=self._scatters)

    def _land(self, piece: Piece, timeout_s: float = 0.0) -> Reason:
        return piece.land(timeout_s, self._scatters)

    def _begin(self, run: Run, hashes: Sequence[bytes], first: int, **call: object) -> Piece:
        """Let the daemon copy as many blocks from place `first` on as the run has room for. Raises InvalidRequest."""
        try:
            load = self._kv.load(
                hashes[: first + run.blocks],
                range(run.first, run.first + run.blocks),
                first=first,
                **call,  # type: ignore[arg-type]  # as `load` was given them
            )
        except InvalidRequest:
            run.abandon()
            raise
        if 0 < load.blocks < run.blocks:
            self._room.shorten(run, load.blocks)
        return Piece(run, load, context=self._context, streams=self._streams, layer_bytes=self._layer_bytes)

    def load_ahead(
        self,
        hashes: Sequence[bytes],
        *,
        session_id: str = "",
        request_id: str = "",
        wait_s: float = 0.0,
        deadline_s: float = 10.0,
        rope: Rope | None = None,
    ) -> LoadAhead | None:
        """Begin to load the longest held prefix before it is known where it goes. Returns when that has begun.

        Args: as of `load`; however long the blocks then stay in the buffer, no deadline ends that.

        Returns:
            None: there is no room for so many side by side now, or nothing to load.
        """
        with self._in_use() as is_open:
            run = self._room.take(len(hashes), least=len(hashes)) if is_open and hashes else None
            if run is None:
                return None
            call = {
                "session_id": session_id,
                "request_id": request_id,
                "wait_s": wait_s,
                "accepts_shifts": rope is not None,
            }
            piece = self._begin(run, hashes, 0, deadline_s=deadline_s, **call)
            return LoadAhead(piece, partial(self._go_on, piece, rope))

    def _go_on(self, piece: Piece, rope: Rope | None, mover: Mover, block_ids: Sequence[int]) -> BufferedLoad:
        """With what was loaded ahead, behind this thread's stream."""
        self._require_fits(mover)
        with self._in_use() as is_open:
            engine = self._aiming.engine_event() if is_open else None
            if engine is None or not self._aiming.aim(piece, mover, block_ids, engine, rope, 0):
                piece.cancel()
                return BufferedLoad(Reason.INTERNAL if is_open else Reason.CLOSED)
            return BufferedLoad(piece.load.reason, piece, piece.load.shifts, landing_stream=self._scatters)

    # -------------------------------------------------------------------- saves

    def gather(self, mover: Mover, block_ids: Sequence[int]) -> Gathered | None:
        """Copy blocks of the engine into the buffer, on this thread's stream, whose later work may overwrite them.

        Does not wait. What it returns must be saved or discarded.

        Args:
            block_ids: at least one.

        Returns:
            None where there is no room for all of them side by side now, or the GPU fails.

        Raises:
            InvalidRequest: the mover is of another layout, or there are no blocks.
        """
        self._require_fits(mover)
        if not block_ids:
            raise InvalidRequest("no blocks to gather")
        with self._in_use() as is_open:
            run = self._room.take(len(block_ids), least=len(block_ids)) if is_open else None
            if run is None:
                return None
            try:
                stream = self._streams.current()
                event, _ = run.event_on(self._context, stream)
                try:
                    mover.gather(run.memory, uploaded(block_ids, torch.int32, self._device))
                finally:
                    event.record(stream)
            except Exception:  # noqa: BLE001  # a kernel's compiler may raise anything
                _log.exception("blocks cannot be gathered, and are not saved")
                run.abandon()
                return None
            return Gathered(run, 0, run.blocks, event)

    def save(
        self,
        gathered: Gathered,
        hashes: Sequence[bytes],
        *,
        parent: bytes = b"",
        session_id: str = "",
        request_id: str = "",
        deadline_s: float = 10.0,
    ) -> SaveResult:
        """Store gathered blocks that are not held yet, and give their room back. Blocks: for a thread of its own.

        Args:
            hashes: one for each of them, behind `parent`.

        Raises:
            InvalidRequest: the hashes do not fit, or these blocks were saved or discarded before.
        """
        with gathered.spent(), self._in_use() as is_open:
            if not is_open:
                return SaveResult().with_rest_refused(len(hashes), Reason.CLOSED)
            # What is given up is still read, but published by nobody: its room can be another's.
            return self._kv.save(
                hashes,
                gathered.block_ids,
                parent=parent,
                session_id=session_id,
                request_id=request_id,
                deadline_s=deadline_s,
                after=gathered.after.handle,
            )

    def discard(self, gathered: Gathered) -> None:
        """Give their room back without saving them. Does nothing where they are being saved, or were."""
        with suppress(InvalidRequest), gathered.spent():
            pass

    # ---------------------------------------------------------------- the rest

    def close(self) -> None:
        """End it: nothing touches the buffer when this returns, and what is on its way has failed. Blocks.

        May be called twice.
        """
        with self._changed:
            is_first, self._is_closed = not self._is_closed, True
        if not is_first:
            return
        self._cancel_all()  # also those that a call waits for
        with self._changed:
            self._changed.wait_for(lambda: not self._calls)  # each has a deadline
        self._cancel_all()
        self._kv.close()
        ends_at_s = time.monotonic() + _CLOSE_WAIT_S
        while not (is_still := self._room.is_still) and time.monotonic() < ends_at_s:
            time.sleep(_POLL_S)
        if not is_still:
            _kept.append(self._memory)
        # The streams stay: torch remembers on which ones a tensor was used, and would meet one that is gone.
        self._context.close()

    def _cancel_all(self) -> None:
        for piece in self._room.pieces():
            piece.cancel()

    @contextmanager
    def _in_use(self) -> Iterator[bool]:
        """Keep `close` from ending it meanwhile; False where it is closed."""
        with self._changed:
            is_open = not self._is_closed
            self._calls += is_open
        try:
            yield is_open
        finally:
            with self._changed:
                self._calls -= is_open
                self._changed.notify_all()

    def _require_fits(self, mover: Mover) -> None:
        if (mover.layers, mover.block_size_bytes) != (len(self._layer_bytes), self.block_size_bytes):
            raise InvalidRequest(
                f"a cache of {mover.layers} layers and blocks of {mover.block_size_bytes} bytes, and a buffer of "
                f"{len(self._layer_bytes)} layers and {self.block_size_bytes} bytes"
            )
