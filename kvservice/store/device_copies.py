"""Load and Put on the device plane: the daemon's own copies between slots and engines' GPU memory.

A copy holds its slots by itself, beside any reservation, from before it is queued until no byte of it moves: slots of
an engine that died, or whose reservation ran out, are not reused under it. A load needs no lease of the client's for
that reason: its copy takes over what the lease held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Slots
from kvservice.device import LANES, Copy, DevicePlane, Region, Registration
from kvservice.device.registration import Places
from kvservice.dram import SlotPool
from kvservice.errors import InvalidRequest, LeaseUnknown, Overloaded
from kvservice.leases import HoldKind
from kvservice.metrics import Metrics
from kvservice.store.holds import Holds
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.outcomes import Granted, Reserved
from kvservice_cuda.copier import Direction
from kvservice_cuda.driver import Driver
from kvservice_cuda.geometry import Geometry

SEQUENCE_MAX = (1 << 47) - 1

_WAYS = {Direction.LOAD: "dram_to_gpu", Direction.SAVE: "gpu_to_dram"}


@dataclass(frozen=True, slots=True)
class DevicePlaces:
    """What a Load or Put names: the engine's blocks, and where to tell the progress.

    Attributes:
        first: of a Get: the place in its chain of the first block that is copied.
        block_ids: one per hash from there on.
    """

    registration: Registration
    first: int
    block_ids: NDArray[np.uint32]
    lane: int
    sequence: int
    attempt_id: int


class DeviceCopies:
    """The store's side of the device plane."""

    def __init__(self, driver: Driver | None, holds: Holds, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        """`driver`: of the GPUs; None: there is no device plane."""
        self.plane = plane = DevicePlane(driver, clock=clock)
        self._holds = holds
        self._namespaces: dict[int, Namespace] = {}  # by registration
        self._refusals: dict[int, str] = {}  # by instance
        plane.on_copied = lambda direction, size_bytes, seconds: metrics.gpu_copies.copied(
            _WAYS[direction], size_bytes, seconds
        )
        plane.on_failed = lambda direction: metrics.gpu_copies.failed(_WAYS[direction])

    @property
    def planes(self) -> str:
        """One line: which planes are offered, and why not more."""
        description = self.plane.description
        return f"shared-memory, {description}" if self.plane.is_offered else f"shared-memory ({description})"

    # ------------------------------------------------------------ registrations

    async def register(
        self, instance: Peer, namespace: Namespace, device_uuid: bytes, regions: Sequence[Region], geometry: Geometry
    ) -> Registration:
        """Open an engine's KV cache. Raises InvalidRequest, Overloaded."""
        try:
            registration = await self.plane.register(
                instance.instance_id,
                device_uuid,
                regions,
                geometry,
                block_size_bytes=namespace.spec.block_size_bytes,
                segments=[segment for _, segment in namespace.pool.live_segments()],
            )
        except InvalidRequest as error:
            self._refusals[instance.instance_id] = str(error)
            raise
        if not instance.is_attached:
            await self.plane.close_registration(registration)
            raise LeaseUnknown("the attachment ended while its memory was being opened")
        self._namespaces[registration.registration_id] = namespace
        self._refusals.pop(instance.instance_id, None)
        return registration

    def note_unavailable(self, instance: Peer, why: str) -> None:
        """The engine cannot offer its memory."""
        self._refusals[instance.instance_id] = why

    async def unregister(self, instance: Peer, registration_id: int) -> None:
        """Close it; returns when nothing touches that memory any more. Raises LeaseUnknown."""
        await self.plane.close_registration(self.plane.find(instance.instance_id, registration_id))
        self._namespaces.pop(registration_id, None)

    def forget(self, instance: Peer) -> None:
        """The instance's attachment ended."""
        for registration in self.plane.of_instance(instance.instance_id):
            self._namespaces.pop(registration.registration_id, None)
        self._refusals.pop(instance.instance_id, None)
        self.plane.forget(instance.instance_id)

    def plane_of(self, instance: Peer) -> str:
        """How the instance's bytes travel, and why not otherwise, in a few words."""
        if self.plane.of_instance(instance.instance_id):
            return "cuda-ipc"
        why = self._refusals.get(instance.instance_id)
        return f"shared-memory ({why})" if why else "shared-memory"

    # ------------------------------------------------------------------- copies

    def require_places(
        self,
        instance: Peer,
        namespace: Namespace,
        *,
        registration_id: int,
        first: int,
        block_ids: NDArray[np.uint32],
        lane: int,
        sequence: int,
        attempt_id: int,
        hashes: int,
    ) -> DevicePlaces:
        """Check what a call names before anything is granted. Raises InvalidRequest, LeaseUnknown, Overloaded."""
        registration = self.plane.find(instance.instance_id, registration_id)
        if self._namespaces.get(registration_id) is not namespace:
            raise InvalidRequest("the registration is of another namespace", field="registration_id")
        if len(block_ids) != hashes - first:
            raise InvalidRequest(f"{len(block_ids)} block ids for {hashes - first} hashes", field="block_ids")
        if len(block_ids) and int(block_ids.max()) >= registration.geometry.blocks:
            raise InvalidRequest(
                f"block id {block_ids.max()}, and {registration.geometry.blocks} blocks are registered",
                field="block_ids",
            )
        if not 0 <= lane < LANES:
            raise InvalidRequest(f"lane is {lane}, must be 0 to {LANES - 1}", field="lane")
        if not 1 <= sequence <= SEQUENCE_MAX:
            raise InvalidRequest(f"sequence is {sequence}, must be 1 to {SEQUENCE_MAX}", field="sequence")
        if len(registration.copies) >= LANES:
            raise Overloaded(f"{LANES} copies are under way for this registration")
        return DevicePlaces(registration, first, block_ids, lane, sequence, attempt_id)

    def load(self, instance: Peer, granted: Granted, places: DevicePlaces, blocks: int) -> Copy | None:
        """Begin to copy the leading `blocks` of a Load, all in DRAM now, as far as it wants them; and end its lease.

        Returns:
            None where there is nothing to copy, or nothing may be copied any more: the attachment, the lease or the
            registration has ended.
        """
        try:
            hold = self._holds.find(instance, HoldKind.READ, [granted.hold_id])[0]
        except LeaseUnknown:
            return None  # released meanwhile: the client was told that nothing would begin
        first, slots = places.first, granted.slots
        if hold.expired or not instance.is_attached or places.registration.is_closed or blocks <= first:
            self._holds.end(hold)
            return None
        namespace = self._holds.namespace(hold)
        copy = self._start(Direction.LOAD, namespace, places, places.block_ids[: blocks - first], slots[first:blocks])
        self._holds.hand_over(hold)
        if blocks - first < len(slots):
            namespace.end_hold(np.concatenate((slots[:first], slots[blocks:])))
        return copy

    def end_lease(self, instance: Peer, granted: Granted) -> None:
        """Nothing of the Load will be copied. Does nothing where the lease has ended."""
        try:
            self._holds.end(self._holds.find(instance, HoldKind.READ, [granted.hold_id])[0])
        except LeaseUnknown:
            return

    def save(self, instance: Peer, namespace: Namespace, reserved: Reserved, places: DevicePlaces) -> Copy | None:
        """Begin to copy what a Put reserved: the last blocks of its chain; None where that is nothing.

        Raises:
            LeaseUnknown: the registration was closed while the Put waited for room; nothing is reserved.
        """
        if places.registration.is_closed and reserved.hold_id:
            self._holds.end(self._holds.find(instance, HoldKind.WRITE, [reserved.hold_id])[0])
            raise LeaseUnknown("the registration was closed meanwhile: register again")
        if not len(reserved.slots):
            return None
        slots = reserved.slots.copy()  # the reservation's own array shrinks with every Commit
        namespace.pool.hold(slots)
        return self._start(Direction.SAVE, namespace, places, places.block_ids[-len(slots) :], slots)

    async def until_quiet(self, instance: Peer, attempt_ids: Sequence[int]) -> None:
        """Wait until no copy that these calls began moves a byte any more."""
        await self.plane.until_quiet(self.plane.of_attempts(instance.instance_id, attempt_ids))

    def _start(
        self, direction: Direction, namespace: Namespace, places: DevicePlaces, block_ids: np.ndarray, slots: Slots
    ) -> Copy:
        """Begin to copy; what holds the slots is the copy's from now on."""
        return self.plane.start(
            places.registration,
            direction,
            block_ids,
            _places(namespace.pool, slots),
            lane=places.lane,
            sequence=places.sequence,
            attempt_id=places.attempt_id,
            on_done=lambda: namespace.end_hold(slots),
        )


def _places(pool: SlotPool, slots: Slots) -> list[Places]:
    return [Places(segment, of_segment) for segment, of_segment, _ in pool.locate(slots)]
