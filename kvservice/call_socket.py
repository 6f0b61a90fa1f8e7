"""call_socket: unary calls over connections of the second Unix socket, by the very handlers that gRPC has.

gRPC in Python hands every call from thread to thread on both sides. Here the event loop reads a frame, calls the
handler and writes its answer, and the client's own thread waits for it: two wake-ups for a call.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import grpc
from google.protobuf.message import DecodeError

from kvservice.config import Config
from kvservice.errors import Draining, InvalidRequest, KVServiceError, Overloaded, Unauthenticated
from kvservice.instances import Identity
from kvservice.logs import event_log
from kvservice.metrics import Metrics
from kvservice.service import ControlService
from kvservice.service.calls import CALLS_MAX, ERROR_KEY, TOKEN_KEY, Malformed, Metadata, UnaryMethod, error_detail
from kvservice.store import Peer, Store
from kvservice_proto.v1 import kvservice_pb2 as pb

CONNECTIONS_PER_INSTANCE_MAX = 64
FRAME_S = 5.0
"""For a frame to be whole, once it began."""

LENGTH = struct.Struct(">I")
"""What a frame of memory.sock begins with: how many bytes its message has."""

_FRAME_BYTES_BESIDE_MESSAGE = 1024
_SERVICE = pb.DESCRIPTOR.services_by_name["KVCacheService"]

_log = event_log(__name__)


class CallConnections:
    """The call connections of every instance: who may have one, and their end. On the event loop."""

    def __init__(self, control: ControlService, store: Store, config: Config, metrics: Metrics) -> None:
        self.control = control
        self.store = store
        self.frame_bytes_max = config.message_bytes_max + _FRAME_BYTES_BESIDE_MESSAGE
        self.requests: dict[str, Any] = {
            method: getattr(pb, _SERVICE.methods_by_name[method].input_type.name) for method in control.unary
        }
        """The request of each method."""
        self.count = metrics.socket_calls.inc
        self.is_stopping = False
        self.waiting_calls = 0
        self._by_instance: dict[int, set[CallConnection]] = {}

    def __len__(self) -> int:
        return sum(len(of_one) for of_one in list(self._by_instance.values()))

    def __iter__(self) -> Iterator[CallConnection]:
        return iter([connection for of_one in self._by_instance.values() for connection in of_one])

    def admit(self, identity: Identity, token: bytes) -> CallConnection:
        """A place for another connection of the process that was issued the token.

        Raises:
            Unauthenticated: no process of this user was.
            Overloaded: it has as many as it may have. Draining: the daemon is about to end.
        """
        instance = self.store.instances.of_token(token)
        if instance.identity.name != identity.name:
            raise Unauthenticated("the token is another user's")
        if self.is_stopping:
            raise Draining("the daemon ends")
        connections = self._by_instance.setdefault(instance.instance_id, set())
        if len(connections) >= CONNECTIONS_PER_INSTANCE_MAX:
            raise Overloaded(f"{CONNECTIONS_PER_INSTANCE_MAX} call connections are open; use gRPC")
        connection = CallConnection(self, instance)
        connections.add(connection)
        return connection

    def left(self, connection: CallConnection) -> None:
        """It is closed. May be told twice."""
        connections = self._by_instance.get(connection.instance_id, set())
        connections.discard(connection)
        if not connections:
            self._by_instance.pop(connection.instance_id, None)

    def hang_up(self, instance: Peer) -> None:
        """Its process is gone, or has no business here any more."""
        for connection in self._by_instance.pop(instance.instance_id, ()):
            connection.hang_up()

    async def stop(self, grace_s: float) -> None:
        """Hang up on everybody. Calls under way may be answered within the time."""
        self.is_stopping = True
        for connection in self:
            connection.close_when_idle()
        running = [connection.running for connection in self if connection.running is not None]
        if running:
            await asyncio.wait(running, timeout=grace_s)
        for connection in self:
            if connection.running is not None:
                connection.hang_up()


class CallAborted(Exception):
    """The handler ended the call with this error."""

    def __init__(self, detail: pb.ErrorDetail) -> None:
        super().__init__(detail.message)
        self.detail = detail


class CallContext:
    """What a handler is told of the call, and how it refuses it."""

    def __init__(self, token: bytes) -> None:
        self._metadata = ((TOKEN_KEY, token),)

    def invocation_metadata(self) -> Metadata:
        """The token, as gRPC's metadata has it."""
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """End the call with the detail in the metadata."""
        ((key, detail),) = trailing_metadata
        assert key == ERROR_KEY
        raise CallAborted(pb.ErrorDetail.FromString(detail))


class CallConnection(asyncio.Protocol):
    """One connection: a frame comes in, its call runs, its answer goes out; the next frame only then."""

    def __init__(self, calls: CallConnections, instance: Peer) -> None:
        self.instance_id = instance.instance_id
        self.running: asyncio.Task[None] | None = None
        self._calls = calls
        self._context = CallContext(instance.token)
        self._received = bytearray()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._is_hung_up = False
        self._late: asyncio.TimerHandle | None = None  # runs while a frame is not whole

    async def take_over(self, peer: socket.socket) -> None:
        """Serve this socket from now on; it is closed with the connection."""
        try:
            await self._loop.connect_accepted_socket(lambda: self, peer)
        except BaseException:
            peer.close()
            self._calls.left(self)
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._calls.is_stopping or self._is_hung_up:
            transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._calls.left(self)
        self._end_frame()
        if self.running is not None:
            self.running.cancel()  # as gRPC does where its caller is gone

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if self.running is not None or self._transport.get_write_buffer_size():
            self._cut_off(InvalidRequest("a call before the answer to the one before was read", field="frame"))
            return
        self._received += data
        if len(self._received) < LENGTH.size:
            self._expect_more()
            return
        (size_bytes,) = LENGTH.unpack_from(self._received)
        missing_bytes = LENGTH.size + size_bytes - len(self._received)
        if size_bytes > self._calls.frame_bytes_max:
            # As gRPC calls it: the caller takes it for a miss, not for a mistake.
            bound = self._calls.frame_bytes_max
            self._cut_off(Overloaded(f"a call of {size_bytes} bytes, at most {bound} (message_bytes_max)"))
        elif missing_bytes < 0:
            self._cut_off(InvalidRequest("more than one call at a time", field="frame"))
        elif missing_bytes == 0:
            self._end_frame()
            received, self._received = self._received, bytearray()
            self._begin(memoryview(received)[LENGTH.size :])
        else:
            self._expect_more()

    def close_when_idle(self) -> None:
        """Hang up when the call under way, if any, was answered."""
        if self.running is None and self._transport is not None:
            self._transport.close()

    def hang_up(self) -> None:
        """Hang up; nobody gets an answer any more."""
        self._is_hung_up = True  # also where the socket is not taken over yet
        if self._transport is not None:
            self._transport.abort()
        if self.running is not None:
            self.running.cancel()

    # ---------------------------------------------------------------- privately

    def _begin(self, frame: memoryview) -> None:
        try:
            call = pb.SocketCall.FromString(frame)  # type: ignore[arg-type]  # any buffer is fine
        except DecodeError as error:
            self._cut_off(InvalidRequest(f"the frame is no SocketCall: {error}", field="frame"))
            return
        method = self._calls.control.unary.get(call.method)
        if method is None:
            self._refuse(InvalidRequest(f"no unary method {call.method[:100]!r}", field="method"))
            return
        self._calls.count()
        request: Any
        try:
            request = self._calls.requests[call.method].FromString(call.request)
        except DecodeError as error:
            request = Malformed(str(error))
        if not method.waits:
            self._answer(_answer_at_once(method, request, self._context))
        elif self._calls.waiting_calls >= CALLS_MAX:
            self._refuse(Overloaded(f"{CALLS_MAX} calls are under way"))
        else:
            self.running = self._loop.create_task(self._run(method, request, call.timeout_ms))

    def _expect_more(self) -> None:
        if self._late is None:
            late = Overloaded(f"a call that took longer than {FRAME_S:.0f} s to arrive")
            self._late = self._loop.call_later(FRAME_S, self._cut_off, late)

    def _end_frame(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    async def _run(self, method: UnaryMethod, request: Any, timeout_ms: int) -> None:
        self._calls.waiting_calls += 1
        try:
            async with asyncio.timeout(timeout_ms / 1000 if timeout_ms else None):
                response = await method.handle(request, self._context)
        except TimeoutError:
            message = "the call was not done within its deadline"
            answer = pb.SocketAnswer(error=pb.ErrorDetail(reason=pb.ERROR_REASON_DEADLINE_EXCEEDED, message=message))
        except CallAborted as aborted:
            answer = pb.SocketAnswer(error=aborted.detail)
        except asyncio.CancelledError:
            self.running = None
            self.hang_up()
            raise
        else:
            answer = pb.SocketAnswer(response=response.SerializeToString())
        finally:
            self._calls.waiting_calls -= 1
        self.running = None
        self._answer(answer)

    def _cut_off(self, error: KVServiceError) -> None:
        """Say why, and hang up."""
        _log.info("call_connection_broken", why=str(error))
        self._refuse(error, last=True)

    def _refuse(self, error: KVServiceError, *, last: bool = False) -> None:
        self._answer(pb.SocketAnswer(error=error_detail(error, where="call_socket")[1], last=last))

    def _answer(self, answer: pb.SocketAnswer) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._calls.is_stopping:
            answer.last = True
        transport.write(framed(answer))
        if answer.last:
            transport.close()


def framed(message: pb.SocketAnswer | pb.SocketResponse) -> bytes:
    """The message as memory.sock carries it."""
    body = message.SerializeToString()
    return LENGTH.pack(len(body)) + body


def _answer_at_once(method: UnaryMethod, request: Any, context: CallContext) -> pb.SocketAnswer:
    """Call a handler that waits for nothing: a coroutine of one step, so without a task."""
    try:
        method.handle(request, context).send(None)
    except StopIteration as done:
        return pb.SocketAnswer(response=done.value.SerializeToString())
    except CallAborted as aborted:
        return pb.SocketAnswer(error=aborted.detail)
    raise AssertionError("a handler that waits for nothing waited")
