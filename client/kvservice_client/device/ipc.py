"""The CUDA IPC plane: the daemon's copies, asked for by Load and Put."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvservice_client.ahead import MISS_REASONS
from kvservice_client.device.cache import DeviceCache
from kvservice_client.device.lanes import Lanes
from kvservice_client.device.load import DeviceLoad, Transfer, Watchdog
from kvservice_client.errors import DaemonUnreachable, InvalidRequest, KVServiceError
from kvservice_client.link import Link
from kvservice_client.outcomes import Reason, SaveResult
from kvservice_cuda.api import CudaError
from kvservice_cuda.driver import Context, Driver
from kvservice_proto.v1 import kvservice_pb2 as pb

_REGISTER_TIMEOUT_S = 10.0
_COMMIT_TIMEOUT_S = 10.0
_REVISION = 3


@dataclass(frozen=True, slots=True)
class Call:
    """What every load and save names.

    Attributes:
        parent: of a save: see DeviceKV.save.
        first, wait_s, accepts_shifts: of a load: see DeviceKV.load.
    """

    hashes: bytes
    block_ids: NDArray[np.uint32]
    session_id: str
    request_id: str
    deadline_s: float
    parent: bytes = b""
    first: int = 0
    wait_s: float = 0.0
    accepts_shifts: bool = False


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A save whose bytes are being read.

    Attributes:
        known: what needed no copy.
        transfer: None where nothing did.
    """

    known: SaveResult
    reservation_id: int
    transfer: Transfer | None
    deadline_s: float


class SourceGone(Exception):
    """The caller's blocks were given away while they were read: nothing is published."""


class NotExportable(Exception):
    """Legacy CUDA IPC cannot export this memory; the message says why."""


class IpcPlane:
    """One registration with one daemon."""

    name = "cuda-ipc"

    def __init__(self, link: Link, cache: DeviceCache, driver: Driver, context: Context, watchdog: Watchdog) -> None:
        """Export the cache and register it. Blocks.

        Raises:
            NotExportable: use another plane. KVServiceError: the daemon does not take it. CudaError.
        """
        self._link = link
        self._namespace_id = link.welcome.namespace_ids[0]
        self._context = context
        self._watchdog = watchdog
        request = registration_request(cache, driver, context, namespace_id=self._namespace_id)
        response = link.call("RegisterDevice", request, _REGISTER_TIMEOUT_S)
        self._registration_id: int = response.registration_id
        if response.revision < _REVISION:
            self.close()
            raise NotExportable(f"no cuda-ipc: the daemon (version {link.welcome.daemon_version}) is too old")
        try:
            descriptor, size_bytes = link.device_progress(self._registration_id)
            self._lanes = Lanes(context, lanes=response.lanes, descriptor=descriptor, size_bytes=size_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the daemon forget the cache. Blocks until it touches it no more; a daemon that is gone does not."""
        request = pb.UnregisterDeviceRequest(registration_id=self._registration_id)
        try:
            with self._link.in_use():
                self._link.call("UnregisterDevice", request, _REGISTER_TIMEOUT_S)
        except KVServiceError:
            return  # it goes with the attachment

    def load(self, call: Call) -> DeviceLoad:
        """Ask for the longest prefix. Blocks until its copies are queued.

        A call that fails without an answer still gives a load: a failed one, whose `is_quiet` tells when the daemon
        cannot write any more.

        Raises:
            KVServiceError: nothing was begun.
        """
        request = pb.LoadRequest(
            namespace_id=self._namespace_id,
            hashes=call.hashes,
            session_id=call.session_id,
            request_id=call.request_id,
            wait_ms=math.ceil(call.wait_s * 1000),
            accepts_shifts=call.accepts_shifts,
        )
        transfer = self._transfer(call, request)
        try:
            response = self._link.load(request, call.deadline_s)
        except KVServiceError as error:
            if self._link.is_settled(request.attempt_id):
                self._never_began(transfer)
                raise
            transfer.fail()
            self._watchdog.watch(transfer)
            raise LoadUnanswered(DeviceLoad(self._context, transfer, 0, Reason.TIMEOUT)) from error
        reason = MISS_REASONS.get(response.miss, Reason.NOT_HELD)
        if not response.blocks:
            self._never_began(transfer)
            return DeviceLoad(None, None, 0, reason)
        transfer.has_begun = True
        self._watchdog.watch(transfer)
        shifts = response.shift_tokens or [0] * response.blocks
        return DeviceLoad(self._context, transfer, response.blocks, reason, shifts)

    def begin_save(self, call: Call) -> PendingSave:
        """Reserve, and let the daemon copy. Does not wait for bytes.

        Raises:
            KVServiceError: nothing was begun that matters.
        """
        request = pb.PutRequest(
            namespace_id=self._namespace_id,
            parent=call.parent,
            hashes=call.hashes,
            session_id=call.session_id,
            request_id=call.request_id,
        )
        transfer = self._transfer(call, request)
        try:
            response = self._link.put(request, call.deadline_s)
        except KVServiceError:
            # Bytes that are read late go into a reservation that nobody commits.
            self._give_up(transfer, request.attempt_id)
            raise
        counts = dict.fromkeys(("reserved", "held", "being_written", "refused"), 0)
        for run in response.runs:
            counts[str(run.WhichOneof("outcome"))] += run.blocks
        known = SaveResult(held=counts["held"], being_written=counts["being_written"], refused=counts["refused"])
        if not counts["reserved"]:
            self._never_began(transfer)
            return PendingSave(known, 0, None, call.deadline_s)
        transfer.has_begun = True
        return PendingSave(known, response.reservation_id, transfer, call.deadline_s)

    def finish_save(self, pending: PendingSave, is_source_kept: Callable[[], bool]) -> SaveResult:
        """Publish what was copied. Blocks until the source may be overwritten.

        Raises:
            KVServiceError, SourceGone: nothing of it was published.
        """
        transfer = pending.transfer
        if transfer is None:
            return pending.known
        # Committed only with the knowledge that all bytes were read while the source was still what it was.
        if not transfer.wait(pending.deadline_s) or not transfer.is_ok:
            self.drop_save(pending)
            raise DaemonUnreachable("the daemon did not copy the blocks in time, or its GPU failed")
        if not is_source_kept():
            self._link.end_hold(reservation_id=pending.reservation_id)
            raise SourceGone
        return pending.known.plus(self._commit(pending.reservation_id))

    def drop_save(self, pending: PendingSave) -> None:
        """Publish nothing of it. What is still read goes into slots that stay nobody's until then."""
        if pending.transfer is not None:
            pending.transfer.fail()
            self._watchdog.watch(pending.transfer)
            self._link.end_hold(reservation_id=pending.reservation_id)

    def _commit(self, reservation_id: int) -> SaveResult:
        try:
            response = self._link.call("Commit", pb.CommitRequest(reservation_id=reservation_id), _COMMIT_TIMEOUT_S)
        except KVServiceError:
            self._link.end_hold(reservation_id=reservation_id)
            raise
        dropped = sum(run.blocks for run in response.runs if run.WhichOneof("outcome") == "dropped")
        return SaveResult(saved=sum(run.blocks for run in response.runs) - dropped, refused=dropped)

    def _transfer(self, call: Call, request: pb.LoadRequest | pb.PutRequest) -> Transfer:
        """Follow the copy that the request will ask for; its places are put in."""
        lane, sequence = self._lanes.take()
        link = self._link
        try:
            link.enter()
        except DaemonUnreachable:
            self._lanes.give_back(lane)
            raise

        def left() -> bool:
            link.leave()
            return True

        device = request.device
        device.registration_id, device.lane, device.sequence = self._registration_id, lane, sequence
        device.first = call.first
        device.packed_block_ids = call.block_ids.astype("<u4").tobytes()
        return Transfer(
            self._lanes,
            lane,
            sequence,
            is_settled=lambda: link.is_settled(request.attempt_id),
            is_hung_up=lambda: link.is_hung_up,
            on_quiet=left,
            deadline_s=call.deadline_s,
        )

    def _give_up(self, transfer: Transfer, attempt_id: int) -> None:
        if self._link.is_settled(attempt_id):
            self._never_began(transfer)
        else:
            transfer.fail()
            self._watchdog.watch(transfer)

    @staticmethod
    def _never_began(transfer: Transfer) -> None:
        transfer.fail()  # settled, so that it is quiet at once


class LoadUnanswered(Exception):
    """It is not known whether a load was begun; `load` tells when its blocks may be reused."""

    def __init__(self, load: DeviceLoad) -> None:
        super().__init__("the daemon did not answer in time")
        self.load = load


def registration_request(
    cache: DeviceCache, driver: Driver, context: Context, *, namespace_id: int
) -> pb.RegisterDeviceRequest:
    """The cache as the contract describes it: one region per allocation.

    Raises:
        NotExportable, CudaError.
    """
    request = pb.RegisterDeviceRequest(
        namespace_id=namespace_id, device_uuid=driver.uuid(context.ordinal), blocks=cache.blocks
    )
    spans: dict[int, list[int]] = {}  # by start of the allocation: the first byte used, and the end
    starts = []
    for part in cache.parts:
        start, size_bytes = context.allocation_of(part.address)
        end = part.address + (cache.blocks - 1) * part.block_stride_bytes + part.size_bytes
        if end > start + size_bytes:
            raise InvalidRequest(f"a part of the cache ends {end - start - size_bytes} bytes behind its allocation")
        span = spans.setdefault(start, [part.address, end])
        span[:] = [min(span[0], part.address), max(span[1], end)]
        starts.append(start)
    for start, (first, end) in spans.items():
        request.regions.add(
            ipc_handle=_exported(driver, context, start), offset_bytes=first - start, size_bytes=end - first
        )
    order = list(spans)
    for part, start in zip(cache.parts, starts, strict=True):
        request.pieces.add(
            region=order.index(start),
            offset_bytes=part.address - spans[start][0],
            block_stride_bytes=part.block_stride_bytes,
            size_bytes=part.size_bytes,
            layer=part.layer,
        )
    return request


def _exported(driver: Driver, context: Context, start: int) -> bytes:
    """The handle of an allocation. The attribute alone does not tell: expandable segments have it and fail."""
    why = ""
    try:
        if driver.is_exportable(start):
            return context.export_allocation(start)
    except CudaError as error:
        if error.is_fatal:
            raise
        why = f"; {error}"
    raise NotExportable(
        "the KV cache is in memory that legacy CUDA IPC cannot export (cuMemCreate or a memory pool: expandable "
        f"segments, sleep mode){why}"
    )
