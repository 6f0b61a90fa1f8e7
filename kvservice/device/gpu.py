"""One GPU: its context, its copiers, and the threads that feed them and wait for them.

Two threads per direction: one builds and queues (the driver takes half a microsecond per piece, without the GIL), one
sleeps until what was queued is done. Streams are first in, first out, so one sleeper is enough.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from kvservice.device.registration import Copy, Region, Registration
from kvservice.dram import Segment
from kvservice.errors import InvalidRequest
from kvservice_cuda.api import CudaError
from kvservice_cuda.copier import Copier, Direction
from kvservice_cuda.driver import Context
from kvservice_cuda.plan import Plan

_ANSWER_S = 50e-6
"""For the loop to answer the call that asked for a copy, before its thread takes the interpreter for what is left to
queue: the first group of layers keeps the bus busy for longer."""

Result = TypeVar("Result")

Pin = Callable[[Segment], None]


class Gpu:
    """One GPU that engines registered memory of."""

    def __init__(self, context: Context, *, name: str, uuid: bytes, pin: Pin) -> None:
        """`pin` makes a segment usable by DMA, if it is not yet; called in this GPU's threads. Raises CudaError."""
        self.name = name
        self.uuid = uuid
        self.state = "online"
        self.context = context
        self._pin = pin
        self._copiers = {direction: Copier(context, direction) for direction in Direction}
        self._queuing = {each: ThreadPoolExecutor(1, thread_name_prefix=f"gpu-{each.value}") for each in Direction}
        self._waiting = {each: ThreadPoolExecutor(1, thread_name_prefix=f"gpu-{each.value}d") for each in Direction}
        for executor in (*self._queuing.values(), *self._waiting.values()):
            executor.submit(lambda: None)  # starts its thread: where there can be none, no engine registers

    @property
    def is_online(self) -> bool:
        """Whether copies can be made."""
        return self.state == "online"

    def lose(self, error: CudaError) -> None:
        """It fails: no copy from now on."""
        self.state = f"lost: {error}"

    # ------------------------------------------------- called on the event loop

    def queue(self, copy: Copy) -> asyncio.Future[int]:
        """Queue the copy; the result is the event that ends it, for `finish`. Does not wait.

        Raises:
            CudaError: (the result) it failed, and nothing of it runs any more.
        """
        loop = asyncio.get_running_loop()

        def has_begun() -> None:
            loop.call_soon_threadsafe(copy.begun.set)
            time.sleep(_ANSWER_S)

        return loop.run_in_executor(self._queuing[copy.direction], self._queue, copy, has_begun)

    async def finish(self, direction: Direction, event: int) -> None:
        """Wait until the event is over. Raises CudaError: a copy failed."""
        await self._run(self._waiting[direction], lambda: self._finish(event))

    async def open(self, registration: Registration, segments: Sequence[Segment]) -> None:
        """Open the regions, pin the progress words and the segments.

        Raises:
            InvalidRequest: a handle opens nothing here, or a region leaves its allocation. Nothing stays open.
        """
        await self._run(self._queuing[Direction.LOAD], lambda: self._open(registration, segments))

    async def close_registration(self, registration: Registration) -> None:
        """Close what `open` opened: the engine's memory can be freed now. No copy may be under way."""
        await self._run(self._queuing[Direction.LOAD], lambda: self._close(registration))

    def shut_down(self) -> None:
        """Wait for everything, end the threads, give the context back. Blocks."""
        for executor in (*self._queuing.values(), *self._waiting.values()):
            executor.shutdown(wait=True)
        if self.is_online:
            for copier in self._copiers.values():
                copier.drain()
                copier.close()
        self.context.close()

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    # --------------------------------------------------------------- in threads

    def _queue(self, copy: Copy, has_begun: Callable[[], None]) -> int:
        registration = copy.registration
        if not self.is_online:
            raise CudaError(self.state)
        if registration.is_closed:
            raise CudaError("the engine has left: nothing is written into its memory any more")
        for each in copy.places:
            self._pin(each.segment)
        host = np.concatenate(
            [
                np.uint64(each.segment.address) + each.slots.astype(np.uint64) * np.uint64(each.segment.stride_bytes)
                for each in copy.places
            ]
        )
        assert registration.plan is not None, "a copy for a registration that is not open"
        copier = self._copiers[copy.direction]
        try:
            copier.submit(
                registration.plan,
                copy.blocks,
                host,
                lane_address=registration.progress.lane_address(copy.lane),
                sequence=copy.sequence,
                has_begun=has_begun,
            )
            return copier.finish_event()
        except BaseException:
            copier.drain()  # what was queued before it failed must not move bytes after this returns
            raise

    def _finish(self, event: int) -> None:
        try:
            self.context.await_event(event)
        finally:
            self.context.end_event(event)

    def _open(self, registration: Registration, segments: Sequence[Segment]) -> None:
        opened: list[int] = []
        try:
            addresses = [self._open_region(position, region, opened) for position, region in
                         enumerate(registration.regions)]  # fmt: skip
            for segment in segments:
                self._pin(segment)
            progress = registration.progress
            progress.device_address = self.context.pin(progress.address, progress.size_bytes)
        except BaseException:
            for start in opened:
                self.context.close_allocation(start)
            raise
        registration.opened = opened
        registration.plan = Plan(registration.geometry, np.array(addresses, dtype=np.uint64))

    def _open_region(self, position: int, region: Region, opened: list[int]) -> int:
        try:
            start = self.context.open_allocation(region.ipc_handle)
            opened.append(start)
            _, size_bytes = self.context.allocation_of(start)
        except CudaError as error:
            raise InvalidRequest(
                f"region {position}: its handle opens nothing in this process ({error}); both must see the same GPU",
                field="ipc_handle",
            ) from None
        if region.offset_bytes + region.size_bytes > size_bytes:
            raise InvalidRequest(
                f"region {position} ends at byte {region.offset_bytes + region.size_bytes} of an allocation of "
                f"{size_bytes}",
                field="size_bytes",
            )
        return start + region.offset_bytes

    def _close(self, registration: Registration) -> None:
        if self.is_online:  # a lost one took it along
            for start in registration.opened:
                self.context.close_allocation(start)
            self.context.unpin(registration.progress.address)
        registration.progress.close()
