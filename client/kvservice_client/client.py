"""What an engine holds: one client per namespace, attached for as long as a daemon is there.

The facade (lookup, load, save, prefetch) never raises for a failure of the service: that is a
miss with a reason. A thread of its own attaches, follows the daemon, and attaches again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any

from kvservice_client.ahead import MISS_REASONS, AheadOfNeed
from kvservice_client.attachment import Attachment
from kvservice_client.errors import CapacityExhausted, InvalidRequest, KVServiceError
from kvservice_client.holds import Lease, Reservation
from kvservice_client.link import Link
from kvservice_client.memory import Buffers, Copy, ThreadedCopier
from kvservice_client.namespace import Namespace, default_socket_dir
from kvservice_client.outcomes import (
    ForgetResult,
    LoadResult,
    Reason,
    SaveResult,
    Status,
)
from kvservice_client.truncation import shifted_blocks
from kvservice_proto.v1 import kvservice_pb2 as pb

_CALL_TIMEOUT_S = 10.0
# Large enough that memmove leaves the caches alone (glibc does so above 190 MB): twice as fast.
_SAVE_PIECE_BYTES = 1024 * 1024 * 1024
_SAVE_PIECE_SHRINK = 8  # a full arena still takes a prefix, in smaller pieces


def attach(
    namespace: Namespace,
    *,
    socket_dir: str | None = None,
    instance_name: str = "",
    attach_timeout_s: float = 5.0,
    copy_threads: int | None = None,
) -> Client:
    """A client for that namespace, attached if a daemon answered within the timeout.

    Args:
        socket_dir: the daemon's directory; None: `default_socket_dir()`.
        instance_name: for people, in `kvservice top`; default: the process id.
        attach_timeout_s: how long to wait for the first attachment. Without a daemon the client
            goes on trying in the background, and everything is a miss meanwhile.
        copy_threads: threads per copy; None: up to 4.

    Raises:
        InvalidRequest, LayoutMismatch, PermissionDenied, Unauthenticated: the daemon said no.
    """
    client = Client(
        namespace,
        socket_dir=socket_dir or default_socket_dir(),
        instance_name=instance_name or f"pid {os.getpid()}",
        copy_threads=copy_threads or min(4, os.cpu_count() or 1),
    )
    client.wait_attached(attach_timeout_s)
    refusal = client.refusal
    if refusal is not None:
        client.close()
        raise refusal
    return client


class Client(AheadOfNeed):
    """One namespace of one engine process. Thread-safe; made by `attach`."""

    def __init__(self, namespace: Namespace, *, socket_dir: str, instance_name: str, copy_threads: int) -> None:
        super().__init__(namespace, Attachment(namespace, socket_dir=socket_dir, instance_name=instance_name))
        self.socket_dir = socket_dir
        self._copier = ThreadedCopier(threads=copy_threads)

    # ------------------------------------------------------------------- status

    @property
    def status(self) -> Status:
        """How this client stands with its daemon."""
        return self._attachment.status

    @property
    def attached(self) -> bool:
        """Whether calls can reach a daemon now."""
        return self.status is Status.ATTACHED

    @property
    def refusal(self) -> KVServiceError | None:
        """Why the daemon said no, while it does."""
        return self._attachment.refusal

    def wait_attached(self, timeout_s: float) -> bool:
        """Wait for an attachment or a refusal; whether it is attached now."""
        self._attachment.wait(timeout_s)
        return self.attached

    def close(self) -> None:
        """Detach. Leases and reservations end; calls in progress finish. May be called twice."""
        self._attachment.close()
        self._close_feed()
        self._copier.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ------------------------------------------------------------------- facade

    def load(
        self,
        hashes: Sequence[bytes],
        destination: Any,
        *,
        session_id: str = "",
        request_id: str = "",
        wait_s: float = 0.0,
        deadline_s: float = _CALL_TIMEOUT_S,
        accepts_shifts: bool = False,
    ) -> LoadResult:
        """Copy the longest held prefix into the caller's memory. Blocks.

        Args:
            hashes: chain of n hashes, root first.
            destination: one writable C-contiguous buffer of n blocks, or n buffers of one block
                each: anything with the buffer protocol, a torch CPU tensor, or Memory.
            wait_s: how long to wait for blocks from NVMe, as a plan says; what comes later is a miss. 0.0: deadline_s.
            accepts_shifts: the caller rotates the keys of blocks that moved; without it they are misses.

        Returns:
            How many leading blocks are in the destination and verified to be theirs.

        Raises:
            InvalidRequest: the hashes or the destination do not fit.
        """
        if not hashes:
            return LoadResult()
        size = self.namespace.block_size_bytes
        with Buffers(destination, blocks=len(hashes), block_size_bytes=size, writable=True) as buffers:
            try:
                with self.get(
                    hashes,
                    session_id=session_id,
                    request_id=request_id,
                    wait_s=wait_s,
                    deadline_s=deadline_s,
                    accepts_shifts=accepts_shifts,
                ) as lease:
                    started_s = time.perf_counter()
                    self._copier.copy(
                        [
                            Copy(address, view.address, size)
                            for address, view in zip(buffers.addresses, lease.blocks, strict=False)
                        ]
                    )
                    self._copied(len(lease.blocks) * size, time.perf_counter() - started_s)
                    valid = lease.valid_prefix()
                    is_whole = valid == len(lease.blocks)
                    reason = MISS_REASONS.get(lease.miss, Reason.NOT_HELD) if is_whole else Reason.CHANGED
                    return LoadResult(valid, reason, shifted_blocks(lease.shifts, valid))
            except InvalidRequest:
                raise
            except KVServiceError as error:
                return LoadResult(reason=self.reason_of(error))

    def save(
        self,
        hashes: Sequence[bytes],
        source: Any,
        *,
        parent: bytes = b"",
        session_id: str = "",
        request_id: str = "",
        deadline_s: float = _CALL_TIMEOUT_S,
    ) -> SaveResult:
        """Store blocks that are not held yet; readable by others when this returns. Blocks.

        Args:
            hashes: chain of n hashes behind `parent`.
            source: like the destination of `load`; may be read-only.
            parent: hash of the block before the first; b"" where the chain starts.

        Raises:
            InvalidRequest: the hashes or the source do not fit.
        """
        size = self.namespace.block_size_bytes
        at_once = max(1, _SAVE_PIECE_BYTES // size)
        result = SaveResult()
        ends_at_s = time.monotonic() + deadline_s
        start = 0
        with Buffers(source, blocks=len(hashes), block_size_bytes=size, writable=False) as buffers:
            while start < len(hashes):
                try:
                    piece = hashes[start : start + min(at_once, self._hashes_per_call_max())]
                    with self.put(
                        piece,
                        parent=hashes[start - 1] if start else parent,
                        session_id=session_id,
                        request_id=request_id,
                        deadline_s=ends_at_s - time.monotonic(),
                    ) as reservation:
                        result = result.plus(self._fill(reservation, buffers.addresses[start:], ends_at_s))
                except InvalidRequest:
                    raise
                except CapacityExhausted:
                    if len(piece) == 1:
                        return result.with_rest_refused(len(hashes), Reason.CAPACITY)
                    at_once = max(1, len(piece) // _SAVE_PIECE_SHRINK)
                    continue
                except KVServiceError as error:
                    return result.with_rest_refused(len(hashes), self.reason_of(error))
                if reservation.refused:
                    return result.with_rest_refused(len(hashes), reservation.refused_reason)
                start += len(piece)
        return result

    def release(self, request_id: str) -> None:
        """End every lease and reservation of a request. Never raises for a service failure."""
        try:
            link = self._attachment.link()
            link.call("Release", pb.ReleaseRequest(request_id=request_id), _CALL_TIMEOUT_S)
        except InvalidRequest:
            raise
        except KVServiceError:
            return  # the attachment is gone, and with it what the request held

    @property
    def link(self) -> Link:
        """The attachment to use now. Raises DaemonUnreachable, ForkedClient."""
        return self._attachment.link()

    # -------------------------------------------------------------- lower level

    def get(
        self,
        hashes: Sequence[bytes],
        *,
        session_id: str = "",
        request_id: str = "",
        lease_s: float = 0.0,
        max_blocks: int = 0,
        wait_s: float = 0.0,
        deadline_s: float = _CALL_TIMEOUT_S,
        accepts_shifts: bool = False,
    ) -> Lease:
        """Lease the longest held prefix, to read it in place.

        Args:
            lease_s: how long; 0.0: the daemon's default.
            max_blocks: at most so many; 0: all.
            wait_s: how long to wait for blocks from NVMe; 0.0: deadline_s.
            accepts_shifts: see `load`; the lease has the shift of each block.

        Raises:
            KVServiceError: see the module `errors`.
        """
        link = self._attachment.link()
        request = pb.GetRequest(
            namespace_id=self._namespace_id(link),
            hashes=self.pack(hashes),
            session_id=session_id,
            request_id=request_id,
            lease_ms=int(lease_s * 1000),
            max_blocks=max_blocks,
            wait_ms=math.ceil(wait_s * 1000),
            accepts_shifts=accepts_shifts,
        )
        return Lease(link, link.get(request, deadline_s), block_size_bytes=self.namespace.block_size_bytes)

    def put(
        self,
        hashes: Sequence[bytes],
        *,
        parent: bytes = b"",
        session_id: str = "",
        request_id: str = "",
        lease_s: float = 0.0,
        deadline_s: float = _CALL_TIMEOUT_S,
    ) -> Reservation:
        """Reserve the blocks that are not held yet, to write them in place and commit.

        Raises:
            KVServiceError: see the module `errors`.
        """
        link = self._attachment.link()
        request = pb.PutRequest(
            namespace_id=self._namespace_id(link),
            parent=parent,
            hashes=self.pack(hashes),
            session_id=session_id,
            request_id=request_id,
            lease_ms=int(lease_s * 1000),
        )
        response = link.put(request, deadline_s)
        return Reservation(link, response, block_size_bytes=self.namespace.block_size_bytes)

    def forget_session(self, session_id: str) -> ForgetResult:
        """Drop the blocks that only this session needs. Raises KVServiceError."""
        return self._forget(pb.ForgetRequest(session_id=session_id))

    def forget_namespace(self) -> ForgetResult:
        """Drop every block of the namespace. Raises KVServiceError."""
        return self._forget(pb.ForgetRequest(whole_namespace=pb.WholeNamespace()))

    def explain(self, block_hash: bytes) -> list[pb.Explanation]:
        """Why a hash is a hit or a miss in this namespace. Raises KVServiceError."""
        link = self._attachment.link()
        request = pb.ExplainRequest(hash=block_hash, fingerprint=self.namespace.fingerprint)
        return list(link.call("Explain", request, _CALL_TIMEOUT_S).explanations)

    def stats(self) -> pb.StatsResponse:
        """The daemon's state and this tenant's namespaces. Raises KVServiceError."""
        link = self._attachment.link()
        response: pb.StatsResponse = link.call("Stats", pb.StatsRequest(), _CALL_TIMEOUT_S)
        return response

    # ---------------------------------------------------------------- privately

    def _fill(self, reservation: Reservation, addresses: Sequence[int], ends_at_s: float) -> SaveResult:
        size = self.namespace.block_size_bytes
        pieces = [Copy(view.address, addresses[position], size) for position, view in reservation.reserved]
        self._copier.copy(pieces)
        remaining_s = max(0.1, ends_at_s - time.monotonic())
        committed = reservation.commit(timeout_s=remaining_s) if pieces else []
        known = SaveResult(held=reservation.held, being_written=reservation.being_written, refused=reservation.refused)
        return known.plus(SaveResult.of_commit(committed))

    def _forget(self, request: pb.ForgetRequest) -> ForgetResult:
        link = self._attachment.link()
        request.namespace_id = self._namespace_id(link)
        response = link.call("Forget", request, _CALL_TIMEOUT_S)
        return ForgetResult(response.blocks_dropped, response.blocks_in_use)

    def _hashes_per_call_max(self) -> int:
        return int(self._attachment.link().welcome.limits.hashes_per_call_max)
