"""One attachment to one daemon: fd socket, token, gRPC channel, call connections, stream, mapped segments.

A link never heals: when anything breaks it is *over*, and the client makes another. Its memory
socket stays open until the last thread has stopped touching the mapped memory, because for the
daemon that socket's hang-up means that nobody does any more.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from kvservice_client.calls import LinkEnded, UnaryCalls, metadata_of, open_channel
from kvservice_client.errors import (
    DaemonUnreachable,
    ForkedClient,
    InternalError,
    KVServiceError,
    LeaseUnknown,
    NamespaceUnknown,
    Unauthenticated,
    from_rpc,
)
from kvservice_client.memory import Segment
from kvservice_client.memory_socket import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, MemorySocket
from kvservice_proto.v1 import kvservice_pb2 as pb
from kvservice_proto.v1 import kvservice_pb2_grpc

_PING_INTERVAL_S = 2.0
_UNRESPONSIVE_S = 3 * _PING_INTERVAL_S
_END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Debt:
    """A hold that this process let go of and the daemon does not know it yet."""

    lease_id: int = 0
    reservation_id: int = 0
    attempt_id: int = 0


class Link:
    """One attachment. Made by a handshake; serves calls until it is over."""

    def __init__(
        self, socket_dir: str, namespaces: Sequence[pb.Namespace], *, instance_name: str, timeout_s: float
    ) -> None:
        """Connect, attach and map every segment. Blocks.

        Raises:
            KVServiceError: of any kind; nothing is left open.
        """
        self._memory_socket = MemorySocket(socket_dir, timeout_s=timeout_s)
        self._metadata = metadata_of(self._memory_socket.token)
        self._channel = open_channel(socket_dir)
        self.stub = kvservice_pb2_grpc.KVCacheServiceStub(self._channel)
        self.unary = UnaryCalls(socket_dir, self._memory_socket.token, self._channel, self.stub)
        self._outgoing: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._segments_lock = threading.Lock()  # apart, because mapping a segment takes its time
        self._segments: dict[int, Segment] = {}
        self._segment_uses: dict[int, int] = {}
        self._retired: set[int] = set()
        self._uses = 0
        self._owed: list[_Debt] = []
        self._unsettled: set[int] = set()  # attempts that may still be granted something
        self._attempts = itertools.count(1)
        self._heard_at_s = time.monotonic()
        self.is_over = False
        self.is_draining = False
        self._is_forked = False
        try:
            self._stream = self.stub.Attach(self._requests(namespaces, instance_name), metadata=self._metadata)
            self.welcome = self._first_response(timeout_s)
            for segment_id in self.welcome.segment_ids:
                self._map_if_there(segment_id)
        except BaseException:
            self.end()
            raise

    # --------------------------------------------------------------- the stream

    def run(self) -> None:
        """Follow the daemon's notices until the link is over. Blocks; for a thread of its own."""
        try:
            for response in self._stream:
                self._heard_at_s = time.monotonic()
                # In use meanwhile, so that nobody unmaps and hangs up under a segment being mapped.
                with self.in_use():
                    self._follow(response)
                    self._pay_debts()
        except (grpc.RpcError, DaemonUnreachable):
            pass  # the link is over, whatever ended it
        finally:
            self.end()

    def _follow(self, response: pb.AttachResponse) -> None:
        match response.WhichOneof("message"):
            case "segments_changed":
                self._retire(response.segments_changed.retired_ids)
                for segment_id in response.segments_changed.added_ids:
                    self._map_if_there(segment_id)
            case "drain_notice":
                self.is_draining = True

    @property
    def is_responsive(self) -> bool:
        """Whether the daemon was heard of lately: a stopped one must not cost every call its deadline."""
        return time.monotonic() - self._heard_at_s < _UNRESPONSIVE_S

    def end(self) -> None:
        """The link is over; memory and sockets go when the last user has left. May be called twice."""
        with self._lock:
            if self.is_over:
                return
            self.is_over = True
            is_unused = self._uses == 0
        self._outgoing.put(None)
        if is_unused:
            self._close()

    def disown_after_fork(self) -> None:
        """In a forked child: the mapping is not there, and the socket must not keep the parent alive."""
        self._is_forked = self.is_over = True
        self._memory_socket.close()

    # -------------------------------------------------------------------- calls

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the mapped memory and the memory socket while this is open.

        Raises:
            DaemonUnreachable: the link is over.
        """
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """See `in_use`; for holders that outlive a block of code."""
        with self._lock:
            if self.is_over:
                raise DaemonUnreachable("the attachment has ended; the client attaches again by itself")
            self._uses += 1

    def leave(self) -> None:
        """End what `enter` began."""
        with self._lock:
            self._uses -= 1
            is_last = self.is_over and self._uses == 0 and not self._is_forked
        if is_last:
            self._close()

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """One unary RPC, named as in the contract; its response.

        Raises:
            KVServiceError.
        """
        if self._is_forked:
            raise ForkedClient("this client belongs to the parent process: attach again in the child")
        try:
            return self.unary.call(method, request, timeout_s)
        except KVServiceError as error:
            raise self._failed(error) from None

    def get(self, request: pb.GetRequest, timeout_s: float) -> Iterator[pb.GetResponse]:
        """The Get stream: messages as blocks arrive.

        Raises:
            KVServiceError.
        """
        request.attempt_id = next(self._attempts)
        try:
            yield from self.stub.Get(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._failed_attempt(from_rpc(error), request.attempt_id) from None
        except ValueError as error:
            raise LinkEnded(error) from None

    def load(self, request: pb.LoadRequest, timeout_s: float) -> pb.LoadResponse:
        """One Load.

        Raises:
            KVServiceError.
        """
        response: pb.LoadResponse = self._attempt("Load", request, timeout_s)
        return response

    def put(self, request: pb.PutRequest, timeout_s: float) -> pb.PutResponse:
        """One Put.

        Raises:
            KVServiceError.
        """
        response: pb.PutResponse = self._attempt("Put", request, timeout_s)
        return response

    def is_settled(self, attempt_id: int) -> bool:
        """Whether nothing that this attempt asked for will still happen: it was answered, or given up and heard."""
        return attempt_id not in self._unsettled

    @property
    def is_hung_up(self) -> bool:
        """Whether the daemon's process has ended, or has hung up on this one."""
        return self._memory_socket.is_hung_up

    def device_progress(self, registration_id: int) -> tuple[int, int]:
        """See `MemorySocket.device_progress`."""
        return self._memory_socket.device_progress(registration_id)

    def end_hold(self, *, lease_id: int = 0, reservation_id: int = 0) -> None:
        """Release or abort. Never raises: what fails is tried again later, as a debt.

        While the process lives, an expired hold keeps its slots until it is ended, so none may be
        forgotten.
        """
        self._pay(_Debt(lease_id=lease_id, reservation_id=reservation_id))

    def use_segment(self, segment_id: int) -> Segment:
        """The mapped segment, mapping it now if need be; it stays mapped until `unuse_segment`.

        Raises:
            DaemonUnreachable: it cannot be mapped.
        """
        with self._segments_lock:
            segment = self._segments.get(segment_id)
            if segment is None:
                try:
                    segment = self._segments[segment_id] = self._memory_socket.segment(segment_id)
                finally:
                    if self._memory_socket.is_broken:
                        self._stream.cancel()  # ends `run`, and the client attaches again
            self._segment_uses[segment_id] = self._segment_uses.get(segment_id, 0) + 1
            return segment

    def unuse_segment(self, segment_id: int) -> None:
        """End what `use_segment` began; a retired segment goes with its last user."""
        with self._segments_lock:
            self._segment_uses[segment_id] -= 1
            self._unmap_if_done(segment_id)

    # ---------------------------------------------------------------- privately

    def _requests(self, namespaces: Sequence[pb.Namespace], instance_name: str) -> Iterator[pb.AttachRequest]:
        yield pb.AttachRequest(
            hello=pb.Hello(
                protocol_version_min=PROTOCOL_VERSION_MIN,
                protocol_version_max=PROTOCOL_VERSION_MAX,
                instance_name=instance_name,
                namespaces=namespaces,
            )
        )
        while True:
            try:
                request = self._outgoing.get(timeout=_PING_INTERVAL_S)
            except queue.Empty:
                request = pb.AttachRequest(ping=pb.Ping())
            if request is None:
                return
            yield request

    def _first_response(self, timeout_s: float) -> pb.Welcome:
        # A stream has one deadline for its whole life; the handshake's is kept by cancelling.
        timer = threading.Timer(timeout_s, self._stream.cancel)
        timer.start()
        try:
            response = next(iter(self._stream))
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        except StopIteration:
            raise DaemonUnreachable("the daemon ended the attachment before it began") from None
        finally:
            timer.cancel()
        welcome: pb.Welcome = response.welcome
        return welcome

    def _failed(self, error: KVServiceError) -> KVServiceError:
        if isinstance(error, (NamespaceUnknown, Unauthenticated)):
            self._stream.cancel()  # ends `run`, and the client attaches again
        return error

    def _attempt(self, method: str, request: pb.LoadRequest | pb.PutRequest, timeout_s: float) -> Any:
        """One unary RPC that may grant something; its attempt's id is in the request from now on."""
        request.attempt_id = next(self._attempts)
        try:
            return self.unary.call(method, request, timeout_s)
        except KVServiceError as error:
            raise self._failed_attempt(error, request.attempt_id) from None

    def _failed_attempt(self, error: KVServiceError, attempt_id: int) -> KVServiceError:
        """The call may have granted something though its answer did not arrive: that is owed back."""
        if isinstance(error, (DaemonUnreachable, InternalError)) and not isinstance(error, LinkEnded):
            with self._lock:
                self._owed.append(_Debt(attempt_id=attempt_id))
                self._unsettled.add(attempt_id)
        return self._failed(error)

    def _pay(self, debt: _Debt) -> None:
        try:
            if debt.reservation_id:
                self.call("Abort", pb.AbortRequest(reservation_id=debt.reservation_id), _END_TIMEOUT_S)
            else:
                request = pb.ReleaseRequest(
                    lease_ids=[debt.lease_id] if debt.lease_id else [],
                    attempt_ids=[debt.attempt_id] if debt.attempt_id else [],
                )
                self.call("Release", request, _END_TIMEOUT_S)
                self._unsettled.discard(debt.attempt_id)
        except LeaseUnknown:
            pass  # ended already: an earlier try arrived though its answer did not
        except KVServiceError:
            with self._lock:
                self._owed.append(debt)

    def _pay_debts(self) -> None:
        with self._lock:
            owed, self._owed = self._owed, []
        for debt in owed:
            self._pay(debt)

    def _map_if_there(self, segment_id: int) -> None:
        try:
            self.use_segment(segment_id)
        except KVServiceError:
            return  # retired since it was announced
        self.unuse_segment(segment_id)

    def _retire(self, segment_ids: Sequence[int]) -> None:
        with self._segments_lock:
            for segment_id in segment_ids:
                self._retired.add(segment_id)
                self._unmap_if_done(segment_id)

    def _unmap_if_done(self, segment_id: int) -> None:
        if segment_id in self._retired and not self._segment_uses.get(segment_id):
            self._retired.discard(segment_id)
            self._segment_uses.pop(segment_id, None)
            segment = self._segments.pop(segment_id, None)
            if segment is not None:
                segment.unmap()

    def _close(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.cancel()
        self._channel.close()
        self.unary.close()
        for segment in self._segments.values():
            segment.unmap()
        self._segments.clear()
        self._memory_socket.close()
