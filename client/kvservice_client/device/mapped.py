"""The plane without the daemon's GPU: this process copies between the daemon's mapped memory and its own GPU by DMA."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvservice_client.ahead import MISS_REASONS
from kvservice_client.device.cache import DeviceCache
from kvservice_client.device.ipc import SourceGone
from kvservice_client.device.lanes import Lanes
from kvservice_client.device.load import DeviceLoad, Transfer, Watchdog
from kvservice_client.errors import DaemonUnreachable
from kvservice_client.holds import BlockView, Lease, Reservation
from kvservice_client.memory import Segment
from kvservice_client.outcomes import Reason, SaveResult
from kvservice_cuda.api import CudaError
from kvservice_cuda.copier import Copier, Direction
from kvservice_cuda.driver import Context
from kvservice_cuda.geometry import Geometry, Piece
from kvservice_cuda.plan import Plan

_LANES = 256


class MappedPlane:
    """The copiers of this process, for one cache. Outlives links."""

    name = "mapped"

    def __init__(self, cache: DeviceCache, context: Context, watchdog: Watchdog) -> None:
        """Raises CudaError."""
        self._context = context
        self._watchdog = watchdog
        geometry = Geometry(
            cache.blocks,
            tuple(
                Piece(number, 0, part.block_stride_bytes, part.size_bytes, part.layer)
                for number, part in enumerate(cache.parts)
            ),
        )
        self._plan = Plan(geometry, np.array([part.address for part in cache.parts], dtype=np.uint64))
        self._lanes = Lanes(context, lanes=_LANES)
        self._copiers = {direction: Copier(context, direction) for direction in Direction}
        self._locks = {direction: threading.Lock() for direction in Direction}
        self._pinned: set[Segment] = set()
        self._pin_lock = threading.Lock()

    def close(self) -> None:
        """Wait for what is queued, and give the streams back. Blocks."""
        for copier in self._copiers.values():
            copier.drain()
            copier.close()

    def load(self, lease: Lease, block_ids: NDArray[np.uint32], deadline_s: float, *, first: int = 0) -> DeviceLoad:
        """Queue copies of the leased blocks from place `first` on; the lease is the load's from now on.

        Raises:
            KVServiceError: nothing was begun. CudaError.
        """
        reason = MISS_REASONS.get(lease.miss, Reason.NOT_HELD)
        views, shifts = lease.blocks[first:], lease.shifts[first:]
        if not views:
            lease.release()
            return DeviceLoad(None, None, 0, reason)

        def let_go() -> bool:
            is_valid = lease.valid_prefix() == len(lease.blocks)
            lease.release()
            return is_valid

        transfer = self._begin(Direction.LOAD, views, block_ids[: len(views)], deadline_s, let_go)
        self._watchdog.watch(transfer)
        return DeviceLoad(self._context, transfer, len(views), reason, shifts)

    def save(
        self,
        reservation: Reservation,
        block_ids: NDArray[np.uint32],
        deadline_s: float,
        is_source_kept: Callable[[], bool],
    ) -> SaveResult:
        """Copy what was reserved, and publish it. Blocks until the source may be overwritten.

        Raises:
            KVServiceError, SourceGone: nothing was published. CudaError.
        """
        known = SaveResult(held=reservation.held, being_written=reservation.being_written, refused=reservation.refused)
        if not reservation.reserved:
            return known
        views = [view for _, view in reservation.reserved]
        ids = block_ids[[position for position, _ in reservation.reserved]]
        transfer = self._begin(Direction.SAVE, views, ids, deadline_s, lambda: True)
        if not transfer.wait(deadline_s) or not transfer.is_ok:
            # The reservation ends with this call, so nothing may write into its slots after it.
            self._copiers[Direction.SAVE].drain()
            transfer.fail()
            raise DaemonUnreachable("the GPU did not copy the blocks in time")
        if not is_source_kept():
            raise SourceGone
        return known.plus(SaveResult.of_commit(reservation.commit()))

    def _begin(
        self,
        direction: Direction,
        views: Sequence[BlockView],
        block_ids: NDArray[np.uint32],
        deadline_s: float,
        on_quiet: Callable[[], bool],
    ) -> Transfer:
        lane, sequence = self._lanes.take()
        try:
            for segment in {view.segment for view in views}:
                self._pin(segment)
            host = np.array([view.address for view in views], dtype=np.uint64)
            with self._locks[direction]:
                try:
                    self._copiers[direction].submit(
                        self._plan, block_ids, host, lane_address=self._lanes.device_address(lane), sequence=sequence
                    )
                except CudaError:
                    self._copiers[direction].drain()
                    raise
        except BaseException:
            self._lanes.give_back(lane)
            raise
        transfer = Transfer(
            self._lanes,
            lane,
            sequence,
            is_settled=lambda: False,
            is_hung_up=lambda: False,
            on_quiet=on_quiet,
            deadline_s=deadline_s,
        )
        transfer.has_begun = True
        return transfer

    def _pin(self, segment: Segment) -> None:
        """Make the daemon's memory usable by this process's GPU; it stays mapped while it is in use."""
        with self._pin_lock:
            if segment in self._pinned:
                return
            self._context.pin(segment.address, segment.size_bytes)
            self._pinned.add(segment)
            segment.on_unmap.append(lambda: self._unpin(segment))

    def _unpin(self, segment: Segment) -> None:
        with self._pin_lock:
            if segment in self._pinned:
                self._pinned.discard(segment)
                self._context.unpin(segment.address)
