"""The device plane: which GPUs there are, what engines registered, and the copies under way.

Everything here runs on the event loop. A context is made with the first registration on its GPU, so that a daemon
whose engines do not use the plane takes no GPU memory.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.device.gpu import Gpu
from kvservice.device.progress import ProgressPage
from kvservice.device.registration import Copy, Places, Region, Registration
from kvservice.dram import Segment
from kvservice.errors import InvalidRequest, LeaseUnknown, Overloaded
from kvservice.logs import event_log
from kvservice_cuda.api import CudaError
from kvservice_cuda.copier import Direction
from kvservice_cuda.driver import Driver
from kvservice_cuda.geometry import Geometry

REGISTRATIONS_PER_INSTANCE_MAX = 16
REGIONS_MAX = 4096

_log = event_log(__name__)


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """One GPU as Stats shows it."""

    name: str
    uuid: bytes
    state: str
    registrations: int
    registered_bytes: int


class DevicePlane:
    """Every registration of every engine."""

    def __init__(self, driver: Driver | None, *, clock: Callable[[], float]) -> None:
        """`driver`: None where the plane is turned off."""
        self._driver = driver
        self._clock = clock
        self._gpus: dict[bytes, Gpu] = {}
        self._making = asyncio.Lock()
        self._registrations: dict[int, Registration] = {}
        # Random, so that an id of an earlier daemon is unknown to this one.
        self._ids = itertools.count(secrets.randbits(62) + 1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: set[int] = set()
        self._pinned: dict[int, Gpu] = {}
        self._pin_lock = threading.Lock()
        self.description = self._probe()
        """One line: whether the plane is offered, and why not."""
        self.on_copied: Callable[[Direction, int, float], None] = lambda direction, size_bytes, seconds: None
        self.on_failed: Callable[[Direction], None] = lambda direction: None

    def _probe(self) -> str:
        if self._driver is None:
            return "no cuda-ipc: turned off (device_plane)"
        try:
            names = self._driver.names()
        except CudaError as error:
            self._driver = None
            return f"no cuda-ipc: {error}"
        return f"cuda-ipc ({len(names)} x {names[0]})"

    @property
    def is_offered(self) -> bool:
        """Whether engines may register."""
        return self._driver is not None

    @property
    def copies_in_flight(self) -> int:
        """Loads and saves that are not done."""
        return sum(len(registration.copies) for registration in self._registrations.values())

    # ------------------------------------------------------------ registrations

    async def register(
        self,
        instance_id: int,
        device_uuid: bytes,
        regions: Sequence[Region],
        geometry: Geometry,
        *,
        block_size_bytes: int,
        segments: Sequence[Segment],
    ) -> Registration:
        """Open an engine's KV cache.

        Args:
            segments: of its namespace, to be pinned now rather than by the first copy.

        Raises:
            InvalidRequest: the plane is not offered, or something does not fit; nothing stays open.
            Overloaded: the instance has as many as it may.
        """
        self._require_room(instance_id, regions)
        try:
            geometry.require_fits([region.size_bytes for region in regions], block_size_bytes=block_size_bytes)
        except ValueError as error:
            raise InvalidRequest(str(error), field="pieces") from None
        gpu = await self._gpu(device_uuid)
        for segment in segments:
            self._watch(segment)
        registration = Registration(next(self._ids), instance_id, device_uuid, geometry, regions, ProgressPage())
        try:
            await gpu.open(registration, segments)
        except BaseException as error:
            registration.progress.close()
            if isinstance(error, CudaError):
                raise InvalidRequest(f"the GPU's driver refuses: {error}", field="regions") from None
            raise
        self._registrations[registration.registration_id] = registration
        _log.info(
            "device_registered",
            instance_id=instance_id,
            gpu=gpu.name,
            blocks=geometry.blocks,
            size_bytes=registration.size_bytes,
        )
        return registration

    def find(self, instance_id: int, registration_id: int) -> Registration:
        """The instance's registration. Raises LeaseUnknown: it is not its, or closed."""
        registration = self._registrations.get(registration_id)
        if registration is None or registration.instance_id != instance_id or registration.is_closed:
            raise LeaseUnknown(f"registration {registration_id} is not of this attachment: register again")
        return registration

    def of_instance(self, instance_id: int) -> list[Registration]:
        """What an instance registered."""
        return [each for each in self._registrations.values() if each.instance_id == instance_id]

    def forget(self, instance_id: int) -> None:
        """The instance is gone: nothing is copied for it any more, and its memory is closed as soon as may be."""
        for registration in self.of_instance(instance_id):
            registration.is_closed = True
            self._spawn(self.close_registration(registration))

    async def close_registration(self, registration: Registration) -> None:
        """No copy begins any more; wait for those under way; close the memory."""
        registration.is_closed = True
        await self.until_quiet(registration.copies)
        # Somebody else may have closed it while this waited.
        if self._registrations.pop(registration.registration_id, None) is not None:
            await self._gpus[registration.device_uuid].close_registration(registration)

    # ------------------------------------------------------------------- copies

    def start(
        self,
        registration: Registration,
        direction: Direction,
        blocks: np.ndarray,
        places: Sequence[Places],
        *,
        lane: int,
        sequence: int,
        attempt_id: int,
        on_done: Callable[[], None],
    ) -> Copy:
        """Begin a load or a save. Does not wait.

        Args:
            blocks: the engine's block ids, each in bounds.
            places: as many slots; they must stay as they are until `on_done`.
            on_done: called when no byte moves any more, whatever became of the copy.

        Returns:
            The copy. A call that answers only once it has `begun` leaves the interpreter to the thread that queues.
        """
        assert not registration.is_closed, "a copy for a registration that was closed"
        assert len(blocks) > 0, "a copy of nothing"
        done = asyncio.get_running_loop().create_future()
        copy = Copy(registration, direction, blocks, places, lane, sequence, attempt_id, asyncio.Event(), done)
        if any(other.direction is direction for other in registration.copies):
            copy.begun.set()  # the bus is busy until its turn comes
        gpu = self._gpus[registration.device_uuid]
        registration.copies.add(copy)
        for each in places:
            self._watch(each.segment)
        # Handed to its thread now rather than by the task: that has its turn when this call of the loop is over.
        self._spawn(self._follow(copy, gpu, gpu.queue(copy), self._clock(), on_done))
        return copy

    async def _follow(
        self, copy: Copy, gpu: Gpu, queued: asyncio.Future[int], started_s: float, on_done: Callable[[], None]
    ) -> None:
        registration = copy.registration
        has_arrived = False
        try:
            event = await queued
            copy.begun.set()
            await gpu.finish(copy.direction, event)
            has_arrived = True
            self.on_copied(copy.direction, copy.size_bytes, self._clock() - started_s)
        except CudaError as error:
            _log.warning("device_copy_failed", gpu=gpu.name, direction=copy.direction.value, why=str(error))
            if error.is_fatal:
                gpu.lose(error)
        finally:
            if not has_arrived:
                self.on_failed(copy.direction)
                registration.progress.fail(copy.lane, copy.sequence, layers=registration.geometry.layers)
            copy.begun.set()
            registration.copies.discard(copy)
            on_done()
            copy.done.set_result(has_arrived)

    async def until_quiet(self, copies: Sequence[Copy] | set[Copy]) -> None:
        """Wait until none of these moves a byte any more."""
        waiting = [copy.done for copy in copies]
        if waiting:
            await asyncio.wait(waiting)

    def of_attempts(self, instance_id: int, attempt_ids: Sequence[int]) -> list[Copy]:
        """The copies that these calls of the instance began."""
        wanted = set(attempt_ids) - {0}
        if not wanted:
            return []
        copies = (copy for registration in self.of_instance(instance_id) for copy in registration.copies)
        return [copy for copy in copies if copy.attempt_id in wanted]

    # ---------------------------------------------------------------- the rest

    def usage(self) -> list[DeviceUsage]:
        """Every GPU in use."""
        return [
            DeviceUsage(gpu.name, gpu.uuid, gpu.state, len(on_it), sum(each.size_bytes for each in on_it))
            for gpu in self._gpus.values()
            for on_it in [[each for each in self._registrations.values() if each.device_uuid == gpu.uuid]]
        ]

    def close(self) -> None:
        """Wait for copies under way, then give all GPUs back. Blocks; before the arena's memory goes."""
        for gpu in self._gpus.values():
            gpu.shut_down()
        self._gpus.clear()
        self._pinned.clear()

    async def _gpu(self, uuid: bytes) -> Gpu:
        if self._driver is None:
            raise InvalidRequest(f"this daemon has {self.description}", field="device_uuid")
        async with self._making:
            gpu = self._gpus.get(uuid)
            if gpu is None:
                gpu = self._gpus[uuid] = await asyncio.to_thread(self._make_gpu, self._driver, uuid)
        if not gpu.is_online:
            raise InvalidRequest(f"the GPU is {gpu.state}", field="device_uuid")
        return gpu

    def _make_gpu(self, driver: Driver, uuid: bytes) -> Gpu:
        try:
            ordinal = driver.ordinal_of(uuid)
            if ordinal is None:
                raise InvalidRequest(
                    f"this daemon does not see the GPU {uuid.hex()}; give its container the same GPUs as the engines'",
                    field="device_uuid",
                )
            return Gpu(driver.context(ordinal), name=driver.names()[ordinal], uuid=uuid, pin=self._pin)
        except (CudaError, RuntimeError) as error:  # no thread can be started
            raise InvalidRequest(f"the GPU cannot be used here: {error}", field="device_uuid") from None

    def _require_room(self, instance_id: int, regions: Sequence[Region]) -> None:
        if len(self.of_instance(instance_id)) >= REGISTRATIONS_PER_INSTANCE_MAX:
            raise Overloaded(f"{REGISTRATIONS_PER_INSTANCE_MAX} KV caches are registered by this instance")
        if not 1 <= len(regions) <= REGIONS_MAX:
            raise InvalidRequest(f"{len(regions)} regions, must be 1 to {REGIONS_MAX}", field="regions")

    def _watch(self, segment: Segment) -> None:
        """Before a thread may pin the segment: its end must undo that."""
        if segment.segment_id not in self._watched:
            self._watched.add(segment.segment_id)
            segment.on_close.append(lambda: self._unpin(segment))

    def _pin(self, segment: Segment) -> None:
        """In a thread: make a segment usable by DMA, once for all GPUs. Raises CudaError."""
        if segment.segment_id in self._pinned:
            return  # without the lock, which another direction's thread may hold while it pins one that is new
        with self._pin_lock:
            if segment.segment_id in self._pinned or segment.is_closed:
                return
            gpu = next(gpu for gpu in self._gpus.values() if gpu.is_online)
            gpu.context.pin(segment.address, segment.size_bytes)
            self._pinned[segment.segment_id] = gpu

    def _unpin(self, segment: Segment) -> None:
        self._watched.discard(segment.segment_id)
        with self._pin_lock:  # a thread may just be pinning it
            gpu = self._pinned.pop(segment.segment_id, None)
            if gpu is not None and gpu.is_online:
                gpu.context.unpin(segment.address)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
