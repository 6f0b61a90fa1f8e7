"""Leases and reservations: blocks of the daemon's memory that this process may touch, and until when."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from kvservice_client.errors import InvalidRequest
from kvservice_client.link import Link
from kvservice_client.memory import Segment
from kvservice_client.outcomes import Committed, Reason
from kvservice_proto.v1 import kvservice_pb2 as pb

_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block in the daemon's memory."""

    address: int
    size_bytes: int
    segment: Segment
    slot: int
    generation: int

    @property
    def memory(self) -> memoryview:
        """The bytes in place: uint8, writable; not to be touched after the hold ended."""
        return memoryview((ctypes.c_ubyte * self.size_bytes).from_address(self.address)).cast("B")

    @property
    def is_current(self) -> bool:
        """Whether the slot is still this block's: what was read before asking was its bytes."""
        return self.segment.generation(self.slot) == self.generation


class _Hold:
    """What leases and reservations share: views, expiry, and one end."""

    def __init__(self, link: Link, *, lease_s: float) -> None:
        self._link = link
        self._segment_ids: list[int] = []
        self._is_ended = False
        self.expires_at_s = time.monotonic() + lease_s
        link.enter()

    def _views(self, handles: pb.Handles, size_bytes: int) -> Iterable[BlockView]:
        if handles.WhichOneof("plane") != "shared_memory":
            raise InvalidRequest("the daemon answered with a plane that this client does not know")
        shared = handles.shared_memory
        segment = self._link.use_segment(shared.segment_id)
        self._segment_ids.append(shared.segment_id)
        for slot, generation in zip(shared.slots, shared.generations, strict=True):
            yield BlockView(segment.slot_address(slot), size_bytes, segment, slot, generation)

    def _leave(self) -> None:
        for segment_id in self._segment_ids:
            self._link.unuse_segment(segment_id)
        self._segment_ids.clear()
        self._link.leave()


class Lease(_Hold):
    """The longest held prefix, readable in place until released. A context manager.

    Attributes:
        blocks: one view per leading held block.
        shifts: by how many tokens each block's keys must be rotated.
        miss: why the next block was not handed out; UNSPECIFIED when all were.
    """

    def __init__(self, link: Link, responses: Iterable[pb.GetResponse], *, block_size_bytes: int) -> None:
        super().__init__(link, lease_s=0.0)
        self.blocks: list[BlockView] = []
        self.shifts: list[int] = []
        self.miss: int = pb.MISS_REASON_UNSPECIFIED
        self._lease_id = 0
        try:
            for response in responses:
                self._lease_id = response.lease_id or self._lease_id
                self.expires_at_s = time.monotonic() + response.lease_ms / 1000
                for run in response.runs:
                    if run.WhichOneof("outcome") == "handles" and not self.miss:
                        self.blocks.extend(self._views(run.handles, block_size_bytes))
                        self.shifts.extend([run.shift_tokens] * (len(self.blocks) - len(self.shifts)))
                    else:
                        self.miss = self.miss or run.miss
        except BaseException:
            self.release()
            raise

    def valid(self, position: int) -> bool:
        """Whether what was read from that block so far was its bytes. Ask after reading."""
        return self.blocks[position].is_current

    def valid_prefix(self) -> int:
        """How many leading blocks are valid. Ask after reading."""
        for position, block in enumerate(self.blocks):
            if not block.is_current:
                return position
        return len(self.blocks)

    def renew(self, *, timeout_s: float = _CALL_TIMEOUT_S) -> None:
        """Start the lease's time anew.

        Raises:
            LeaseExpired, LeaseUnknown: too late. DaemonUnreachable.
        """
        if self._lease_id:
            renewed = self._link.call("Renew", pb.RenewRequest(lease_ids=[self._lease_id]), timeout_s)
            self.expires_at_s = time.monotonic() + renewed.lease_ms / 1000

    def release(self) -> None:
        """End the lease: the views must not be touched any more. Never raises; may be called twice."""
        if not self._is_ended:
            self._is_ended = True
            if self._lease_id:
                self._link.end_hold(lease_id=self._lease_id)
            self._leave()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Reservation(_Hold):
    """Space to write blocks into, published by `commit`. A context manager that aborts what is left.

    Attributes:
        reserved: (position in the call's hashes, view) of each block to write.
        held, being_written, refused: how many blocks need no writing, and how many may not be.
        refused_reason: why those may not be written.
    """

    def __init__(self, link: Link, response: pb.PutResponse, *, block_size_bytes: int) -> None:
        super().__init__(link, lease_s=response.lease_ms / 1000)
        self._reservation_id = response.reservation_id
        self.reserved: list[tuple[int, BlockView]] = []
        self.held = self.being_written = self.refused = 0
        self.refused_reason = Reason.OK
        position = 0
        try:
            for run in response.runs:
                outcome = run.WhichOneof("outcome")
                if outcome == "reserved":
                    views = self._views(run.reserved, block_size_bytes)
                    self.reserved.extend(enumerate(views, start=position))
                elif outcome == "held":
                    self.held += run.blocks
                elif outcome == "being_written":
                    self.being_written += run.blocks
                else:
                    self.refused += run.blocks
                    is_foreign = run.refused.reason == pb.REFUSED_REASON_OTHER_SESSION
                    self.refused_reason = Reason.OTHER_SESSION if is_foreign else Reason.PARENT_MISSING
                position += run.blocks
        except BaseException:
            self.abort()
            raise
        self._uncommitted = len(self.reserved)

    def commit(self, positions: Sequence[int] = (), *, timeout_s: float = _CALL_TIMEOUT_S) -> list[Committed]:
        """Publish written blocks: readable when this returns.

        Args:
            positions: places in `reserved`; empty: all that are not committed yet.

        Returns:
            One outcome per committed block, in chain order.

        Raises:
            ReservationLost: it expired; nothing was published. DaemonUnreachable: unknown whether
            anything was.
        """
        if self._is_ended or not self._reservation_id:
            return []
        request = pb.CommitRequest(reservation_id=self._reservation_id, positions=positions)
        response = self._link.call("Commit", request, timeout_s)
        outcomes = [_COMMITTED[str(run.WhichOneof("outcome"))] for run in response.runs for _ in range(run.blocks)]
        self._uncommitted -= len(outcomes)
        if self._uncommitted == 0:
            self._is_ended = True
            self._leave()
        return outcomes

    def abort(self) -> None:
        """Give back what was not committed. Never raises; may be called twice."""
        if not self._is_ended:
            self._is_ended = True
            if self._reservation_id:
                self._link.end_hold(reservation_id=self._reservation_id)
            self._leave()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()


_COMMITTED = {
    "published": Committed.PUBLISHED,
    "awaiting_parent": Committed.AWAITING_PARENT,
    "dropped": Committed.DROPPED,
}
