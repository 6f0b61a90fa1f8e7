"""loads: blocks in runs of the buffer, and what has to happen until a run is somebody else's.

    taken -> the daemon copies into it -> kernels scatter it, layer by layer -> nobody touches it -> free
             quiet? the load says so      passed? an event per stream says so

Both must be true, whatever became of the load: a daemon that is late goes on writing into the run, never into the
engine's cache; and a kernel that was launched for a load that failed goes on reading it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kvservice_adapters.gpu.streams import Event, Streams
from kvservice_adapters.gpu.turning import Turned
from kvservice_client import LoadResult, Reason, ShiftedBlocks
from kvservice_client.device import DeviceLoad
from kvservice_client.truncation import shifted_blocks
from kvservice_cuda.api import CudaError
from kvservice_cuda.driver import Context, stream_handle

_log = logging.getLogger(__name__)

_SCATTER_BYTES_MIN, _SCATTER_BYTES_MAX = 64 << 20, 128 << 20
"""A scatter of so much at least, where there is so much: 1.2 ms of the bus. Several layers only up to so much: where
the bus is the limit, a layer that waits for another one is computed later."""
_LANDING_BYTES_MIN = 256 << 20
"""The same where no layer is waited for by itself: what is scattered behind the last byte takes 0.1 ms."""


def worth_bytes(done_bytes: int, left_bytes: int) -> int:
    """How much to scatter at once, of a load that a stream waits for layer by layer.

    Little at first, so that the stream can begin; then as much as came before, for each launch keeps the engine's
    thread from its own; and less again, so that little is left to compute when the last byte is there.

    Args:
        done_bytes, left_bytes: of the load, scattered and not.
    """
    return min(max(min(done_bytes, left_bytes // 2), _SCATTER_BYTES_MIN), _SCATTER_BYTES_MAX)


class Mover(Protocol):
    """What the buffer needs of a `kernels.BlockMover`. Launches on torch's current stream, and waits for nothing."""

    @property
    def layers(self) -> int: ...
    @property
    def block_size_bytes(self) -> int: ...
    def scatter(
        self,
        run: torch.Tensor,
        block_ids: torch.Tensor,
        *,
        first_layer: int,
        end_layer: int,
        turn: Turned | None = None,
    ) -> None: ...
    def gather(
        self, run: torch.Tensor, block_ids: torch.Tensor, *, first_layer: int = 0, end_layer: int | None = None
    ) -> None: ...


class Holder(Protocol):
    """Whose a run is."""

    @property
    def is_done(self) -> bool:
        """Whether it launches nothing more that touches the run."""
        ...


@dataclass(eq=False)
class Run:
    """Neighbouring blocks of the buffer that somebody uses.

    Attributes:
        memory: their bytes, uint8 [blocks, block_size_bytes].
        load: what the daemon writes into them.
        events: by stream, behind the last kernel there that touches them.
        holders: whose they are. One that is forgotten is done.
        is_begun: whether holders say whose it is; until then it is just being taken.
        kept: what those kernels read besides.
    """

    first: int
    blocks: int
    memory: torch.Tensor
    load: DeviceLoad | None = None
    events: dict[int, Event] = field(default_factory=dict)
    holders: list[weakref.ref[Holder]] = field(default_factory=list)
    is_begun: bool = False
    kept: object = None

    def hold(self, holder: Holder) -> None:
        """It is this one's, too."""
        self.holders.append(weakref.ref(holder))
        self.is_begun = True

    def abandon(self) -> None:
        """It is nobody's after all."""
        self.is_begun = True

    @property
    def is_over(self) -> bool:
        """Whether it may be somebody else's."""
        holders = [each() for each in self.holders]
        is_held = any(holder is not None and not holder.is_done for holder in holders)
        return self.is_begun and not is_held and self.is_still

    @property
    def is_still(self) -> bool:
        """Whether nothing that was begun touches it any more."""
        if self.load is not None and not self.load.is_quiet:
            return False
        return all(event.has_passed for event in self.events.values())

    def event_on(self, context: Context, stream: Any) -> tuple[Event, bool]:
        """The stream's event; whether it is new. Raises CudaError."""
        handle = stream_handle(stream)
        found = self.events.get(handle)
        if found is not None:
            return found, False
        made = self.events[handle] = Event(context)
        return made, True


@dataclass(frozen=True, slots=True)
class Target:
    """Where the blocks of a run go.

    Attributes:
        block_ids: of the engine, int32 [blocks], on the device.
        behind: when block ids and turn are there, and when the engine's earlier work has let go of its blocks.
    """

    mover: Mover
    block_ids: torch.Tensor
    turn: Turned | None
    behind: tuple[Event, ...]


class Piece:
    """Blocks of a load in one run, on their way into the engine's cache. Thread-safe.

    Attributes:
        blocks: how many.
        is_done: whether no scatter will be launched any more.
    """

    def __init__(
        self, run: Run, load: DeviceLoad, *, context: Context, streams: Streams, layer_bytes: Sequence[int]
    ) -> None:
        self.run = run
        self.load = load
        self.blocks = load.blocks
        self.is_done = not load.blocks
        self._context = context
        self._streams = streams
        self._layer_bytes = [size * load.blocks for size in layer_bytes]
        self._target: Target | None = None
        self._lock = threading.Lock()  # held while something is launched, never while anything is waited for
        self._next_layer = 0
        self._has_failed = False
        self._landing: Event | None = None  # behind the scatter that `land` launched, of all layers from ...
        self._landing_layer = len(layer_bytes)
        run.load = load
        run.hold(self)

    @property
    def has_failed(self) -> bool:
        """Whether it is known that the engine's blocks are not what they should be."""
        return self._has_failed or self.load.has_failed

    @property
    def can_land(self) -> bool:
        """Whether `land` would not wait for the daemon."""
        return not self.is_done and self._target is not None and self.load.is_quiet

    @property
    def waits_for_place(self) -> bool:
        """Whether it is still to be said where the blocks go."""
        return not self.is_done and self._target is None

    def aim(self, target: Target) -> None:
        """Say where they go; once."""
        with self._lock:
            assert self._target is None, "aimed twice"
            self._target = self.run.kept = target

    def wait_layer(self, layer: int, stream: Any) -> None:
        """Let the stream's work from now on find the layer in the engine's cache. Does not wait."""
        with self._lock:
            end_layer = min(layer + 1, len(self._layer_bytes))
            if self._landing is not None and end_layer > self._landing_layer:
                self._on(stream, self._landing.hold_up)
            elif end_layer > self._next_layer and not self.is_done:
                done, left = self._layer_bytes[: self._next_layer], self._layer_bytes[self._next_layer :]
                self._scatter(self._group_end(end_layer, worth_bytes(sum(done), sum(left))), stream)

    def land(self, timeout_s: float, stream: int) -> Reason:
        """Scatter on that stream what was not scattered yet, as it comes, and wait for all of it. Blocks.

        When this returns nothing of this load writes into the engine's blocks any more, but for what `wait_layer`
        launched for a load that failed.

        Returns:
            OK, or why the blocks are not in the engine's cache.
        """
        with self._lock:
            if not self.is_done:
                self._landing_layer = self._next_layer
                self._scatter_rest(stream)
                self._landing = self.run.events.get(stream)
        result = self.load.result(timeout_s)
        with self._lock:
            if not result.blocks:
                self._give_up()
            events = list(self.run.events.values()) if result.blocks else [event for event in [self._landing] if event]
        try:
            for event in events:
                event.wait()
        except CudaError:
            self._has_failed = True
        if not result.blocks:
            return result.reason
        return Reason.INTERNAL if self.has_failed else Reason.OK

    def cancel(self) -> None:
        """Launch nothing more, and let no stream wait. Blocks while a scatter of `land` runs."""
        with self._lock:
            if not self.is_done:
                self._give_up()
            landing = self._landing
        self.load.cancel()
        if landing is not None:
            with suppress(CudaError):  # a GPU that is lost runs nothing
                landing.wait()

    def _give_up(self) -> None:
        self._has_failed = self.is_done = True

    def _group_end(self, end_layer: int, least_bytes: int) -> int:
        """Up to which layer to scatter when `end_layer` of them are needed: not less than is worth a launch."""
        size_bytes = sum(self._layer_bytes[self._next_layer : end_layer])
        while size_bytes < least_bytes and end_layer < len(self._layer_bytes):
            size_bytes += self._layer_bytes[end_layer]
            end_layer += 1
        return end_layer

    def _scatter_rest(self, stream: Any) -> None:
        while not self.is_done:
            self._scatter(self._group_end(self._next_layer + 1, _LANDING_BYTES_MIN), stream)

    def _scatter(self, end_layer: int, stream: Any) -> None:
        target = self._target
        assert target is not None, "a load that was not aimed"
        self._on(stream, lambda each: self._launch(target, end_layer, each))
        self._next_layer = end_layer
        self.is_done = self.is_done or end_layer == len(self._layer_bytes)

    def _launch(self, target: Target, end_layer: int, stream: Any) -> None:
        event, is_new = self.run.event_on(self._context, stream)
        if is_new:
            for before in target.behind:
                before.hold_up(stream)
        self.load.wait_layer(end_layer - 1, stream)
        try:
            with self._streams.on(stream):
                target.mover.scatter(
                    self.run.memory[: self.blocks],
                    target.block_ids,
                    first_layer=self._next_layer,
                    end_layer=end_layer,
                    turn=target.turn,
                )
        finally:
            event.record(stream)

    def _on(self, stream: Any, launch: Any) -> None:
        """Launch something; where that fails the load has failed, and no request with it."""
        try:
            launch(stream)
        except Exception:  # noqa: BLE001  # a kernel's compiler may raise anything
            _log.exception("blocks cannot be put into the engine's cache: their load has failed")
            self._give_up()
            self.load.cancel()


class BufferedLoad:
    """Leading blocks on their way into an engine's cache, through the buffer. Thread-safe; one stream per load.

    The engine's blocks are the load's until the stream has passed the last layer's wait, or `finish` or `cancel` has
    returned. Forgetting a load cancels it.

    Attributes:
        blocks: how many leading blocks are coming; the rest: recompute.
        reason: why not more.
        shifts: by how many tokens each of them moved; their keys are turned on the way.
    """

    def __init__(
        self,
        reason: Reason,
        piece: Piece | None = None,
        shifts: Sequence[int] = (),
        *,
        landing_stream: int = 0,
    ) -> None:
        """`piece`: what is on its way; blocks that are there already come before it. `shifts`: of all of them."""
        self.reason = reason
        self.shifts = tuple(shifts)
        self.blocks = len(self.shifts)
        self._piece = piece
        self._landing_stream = landing_stream

    @property
    def shifted(self) -> tuple[ShiftedBlocks, ...]:
        """The same as runs of blocks that moved, the first loaded block being 0."""
        return shifted_blocks(self.shifts, self.blocks)

    @property
    def has_failed(self) -> bool:
        """Whether it is known that not all of it is in the engine's cache: recompute.

        Ask again when the stream has passed the waits: what was scattered then is not the blocks' bytes.
        """
        return self._piece is not None and self._piece.has_failed

    def wait_layer(self, layer: int, stream: Any) -> None:
        """Let the stream's work from now on find the layer in the engine's cache. The CPU waits for nothing.

        Layers are scattered a few at a time, on this stream, never later than asked for.

        Args:
            layer: of the mover's parts.
            stream: a torch stream, or a CUstream as an int: the same one for all layers.
        """
        if self._piece is not None:
            self._piece.wait_layer(layer, stream)

    def finish(self, timeout_s: float = 10.0) -> LoadResult:
        """Wait until it is all in the engine's cache; what no stream waited for is scattered now. Blocks.

        A load that is late has failed: `blocks` of the result is 0, and the engine's blocks hold anything.
        """
        if self._piece is None:
            return LoadResult(self.blocks, self.reason, self.shifted)
        reason = self._piece.land(timeout_s, self._landing_stream)
        return LoadResult(self.blocks, self.reason, self.shifted) if reason is Reason.OK else LoadResult(0, reason)

    def cancel(self) -> None:
        """Go on without it: nothing more is scattered, no stream waits. Blocks while a scatter of `finish` runs."""
        if self._piece is not None:
            self._piece.cancel()
