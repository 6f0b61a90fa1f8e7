"""RegisterDevice, Load, and Get and Put whose bytes the daemon copies to and from GPU memory itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from kvservice.errors import InvalidRequest
from kvservice.service import getting, messages
from kvservice.service.calls import Context
from kvservice.store import LANES, DevicePlaces, Peer, Region, Store
from kvservice.store.outcomes import Granted, Reserved
from kvservice_cuda.api import IPC_HANDLE_BYTES
from kvservice_cuda.geometry import PIECES_MAX, Geometry, Piece
from kvservice_proto.v1 import kvservice_pb2 as pb

_UUID_BYTES = 16
_BEGUN_WAIT_S = 0.003
_REVISION = 3
"""What clients may ask for: see RegisterDeviceResponse."""


class Devices:
    """The device plane's part of the contract. On the event loop."""

    def __init__(self, store: Store, instance_of: Callable[[Context], Peer]) -> None:
        self._store = store
        self._instance_of = instance_of

    async def register(self, request: pb.RegisterDeviceRequest, context: Context) -> pb.RegisterDeviceResponse:
        """Open an engine's KV cache, or note why it offers none."""
        instance = self._instance_of(context)
        namespace = self._store.namespace(instance, request.namespace_id)
        if request.unavailable:
            why = messages.require_text(request.unavailable, "unavailable")
            self._store.device_copies.note_unavailable(instance, why)
            return pb.RegisterDeviceResponse()
        if len(request.device_uuid) != _UUID_BYTES:
            raise InvalidRequest(f"device_uuid has {len(request.device_uuid)} bytes, not 16", field="device_uuid")
        messages.require_between(len(request.pieces), 1, PIECES_MAX, "pieces")
        registration = await self._store.device_copies.register(
            instance, namespace, request.device_uuid, _regions(request), _geometry(request)
        )
        return pb.RegisterDeviceResponse(registration_id=registration.registration_id, lanes=LANES, revision=_REVISION)

    async def unregister(self, request: pb.UnregisterDeviceRequest, context: Context) -> pb.UnregisterDeviceResponse:
        """Answered when nothing touches that memory any more."""
        await self._store.device_copies.unregister(self._instance_of(context), request.registration_id)
        return pb.UnregisterDeviceResponse()

    def places(self, request: pb.GetRequest | pb.PutRequest, context: Context) -> DevicePlaces | None:
        """What the call names, checked; None where it is not for this plane.

        Raises:
            InvalidRequest, LeaseUnknown, Overloaded.
        """
        return self.require_places(request, self._instance_of(context)) if request.HasField("device") else None

    def require_places(self, request: pb.GetRequest | pb.LoadRequest | pb.PutRequest, instance: Peer) -> DevicePlaces:
        """What the call names, checked.

        Raises:
            InvalidRequest, LeaseUnknown, Overloaded.
        """
        if request.device.first and isinstance(request, pb.PutRequest):
            raise InvalidRequest("a Put copies all that it reserves: `first` is a Get's", field="first")
        namespace = self._store.namespace(instance, request.namespace_id)
        return self._store.device_copies.require_places(
            instance,
            namespace,
            registration_id=request.device.registration_id,
            first=request.device.first,
            block_ids=_block_ids(request.device),
            lane=request.device.lane,
            sequence=request.device.sequence,
            attempt_id=request.attempt_id,
            hashes=len(request.hashes) // namespace.spec.hash_size_bytes,
        )

    async def put_response(
        self, instance: Peer, namespace_id: int, reserved: Reserved, places: DevicePlaces
    ) -> pb.PutResponse:
        """Begin to copy what was reserved. Nothing waited since it was."""
        namespace = self._store.namespace(instance, namespace_id)
        copy = self._store.device_copies.save(instance, namespace, reserved, places)
        if copy is not None:
            await _until(copy.begun)
        return messages.put_response(reserved, is_copied_here=True)

    async def begin_load(
        self, instance: Peer, granted: Granted, places: DevicePlaces, *, wait_s: float | None
    ) -> getting.Landed:
        """Begin to copy what leads in DRAM, and end the lease; how far the copies are is told in their lane.

        Args:
            wait_s: how long to wait for blocks that are being read from NVMe; None: as long as the call lasts.
        """
        copies = self._store.device_copies
        try:
            landed = await getting.landed_prefix(granted, wait_s=wait_s)
            copy = copies.load(instance, granted, places, landed.blocks)
        except BaseException:
            copies.end_lease(instance, granted)
            raise
        if copy is None:
            return getting.Landed(0, landed.miss)
        await _until(copy.begun)
        return landed

    async def get_responses(
        self, instance: Peer, granted: Granted, places: DevicePlaces, *, wait_s: float | None
    ) -> AsyncIterator[pb.GetResponse]:
        """The one message of a Get; see `begin_load`."""
        landed = await self.begin_load(instance, granted, places, wait_s=wait_s)
        response = pb.GetResponse()
        for blocks, shift in messages.shift_runs(granted.shifts, 0, landed.blocks):
            response.runs.add(blocks=blocks, handles=pb.Handles(device=pb.DeviceHandles()), shift_tokens=shift)
        messages.add_misses(response, granted.asked - landed.blocks, landed.miss)
        yield response


async def _until(begun: asyncio.Event) -> None:
    """Leave the interpreter to the thread that queues the copy; not for longer than that is worth.

    Before it may come another engine's registration, or a new segment that is pinned.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_BEGUN_WAIT_S):
            await begun.wait()


def _block_ids(device: pb.DeviceBlocks) -> NDArray[np.uint32]:
    packed = device.packed_block_ids
    if not packed:
        return np.array(device.block_ids[:], dtype=np.uint32)  # what older clients send
    if len(packed) % 4:
        raise InvalidRequest(f"{len(packed)} bytes are not 32-bit block ids", field="packed_block_ids")
    return np.frombuffer(packed, dtype="<u4")


def _regions(request: pb.RegisterDeviceRequest) -> list[Region]:
    for position, region in enumerate(request.regions):
        if len(region.ipc_handle) != IPC_HANDLE_BYTES:
            raise InvalidRequest(
                f"the handle of region {position} has {len(region.ipc_handle)} bytes, not {IPC_HANDLE_BYTES}",
                field="ipc_handle",
            )
    return [Region(each.ipc_handle, each.offset_bytes, each.size_bytes) for each in request.regions]


def _geometry(request: pb.RegisterDeviceRequest) -> Geometry:
    return Geometry(
        request.blocks,
        tuple(
            Piece(each.region, each.offset_bytes, each.block_stride_bytes, each.size_bytes, each.layer)
            for each in request.pieces
        ),
    )
