"""aiming: where the blocks of a load go, told to the kernels that put them there."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from kvservice_adapters.gpu.loads import Mover, Piece, Target
from kvservice_adapters.gpu.streams import Event, Streams
from kvservice_adapters.gpu.turning import turned
from kvservice_adapters.gpu.upload import uploaded
from kvservice_adapters.positions import Rope
from kvservice_cuda.api import CudaError
from kvservice_cuda.driver import Context

_log = logging.getLogger(__name__)


class Aiming:
    """Puts onto the GPU what the kernels of a load read besides its blocks. Thread-safe."""

    def __init__(
        self, context: Context, streams: Streams, device: torch.device, *, uploads: int, tokens_per_block: int
    ) -> None:
        """`uploads`: a stream that never waits for anything."""
        self._context = context
        self._streams = streams
        self._device = device
        self._uploads = uploads
        self._tokens_per_block = tokens_per_block

    def engine_event(self) -> Event | None:
        """Behind what this thread's stream has to do; None: the GPU fails."""
        try:
            event = Event(self._context)
            event.record(self._streams.current())
        except CudaError:
            return None
        return event

    def aim(
        self, piece: Piece, mover: Mover, block_ids: Sequence[int], engine: Event, rope: Rope | None, first_place: int
    ) -> bool:
        """Whether it was possible to say where the blocks go; if not, the piece is cancelled."""
        try:
            with self._streams.on(self._uploads):
                ids = uploaded(block_ids, torch.int32, self._device)
                turn = None
                if rope is not None:
                    tokens = self._tokens_per_block
                    shifts = piece.load.shifts
                    turn = turned(rope, shifts, first_place=first_place, tokens=tokens, device=self._device)
            there = Event(self._context)
            there.record(self._uploads)
        except (CudaError, RuntimeError):  # torch's
            _log.exception("a load has failed: block ids do not get onto the GPU")
            piece.cancel()
            return False
        piece.aim(Target(mover, ids, turn, (there, engine)))
        return True
