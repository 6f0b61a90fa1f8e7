"""The client's unary calls go over call connections where the daemon offers them, and mean what they mean over gRPC."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

import kvservice_client as kv
from kvservice import call_socket, fd_socket
from kvservice.service.calls import UnaryMethod
from kvservice_client.link import Link
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, contents, namespace
from tests.daemons import DaemonProcess, DaemonThread
from tests.integration.conftest import MakeClient, MakeDaemon, MakeDaemonThread, MakeEngine
from tests.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.integration

OF = namespace(block_size_bytes=4096)


def link_of(client: kv.Client) -> Link:
    return client.link


def without_grpc(client: kv.Client) -> None:
    """A unary call over gRPC fails from now on."""
    link_of(client).unary._stub = None  # type: ignore[assignment]


def without_call_connections(client: kv.Client) -> None:
    """Every call goes over gRPC from now on."""
    link_of(client).unary._call_socket.close()


def call_connections(daemon: DaemonThread) -> int:
    return daemon.on_loop(lambda: len(daemon.daemon._calls))


def everything(client: kv.Client) -> set[str]:
    """Use each unary RPC that a client without a GPU makes; their names."""
    hashes = chain("a", 8)
    assert client.save(hashes, contents(hashes, 4096), session_id="talk").saved == 8
    assert client.lookup(hashes).blocks == 8
    with client.get(hashes) as lease:
        lease.renew()
    client.put(chain("b", 2)).abort()
    assert client.plan_load(hashes, prefill_tokens_per_s=1000).held_blocks == 8
    assert client.prefetch(hashes).dram_blocks == 8
    client.release("nobody's request")
    assert client.hint_session("talk", kv.Resumption.typing())
    assert client.explain(hashes[0])
    assert client.stats().instances == 1
    assert client.truncate("talk", [], drop_ratio=0.5).chain_blocks == 8
    assert client.forget_namespace().blocks_dropped == 8
    return {
        *("Put", "Commit", "Lookup", "Renew", "Release", "Abort", "PlanLoad", "Prefetch", "HintSessions", "Explain"),
        *("Stats", "Truncate", "Forget"),
    }


def test_every_unary_call_goes_over_it(daemon: DaemonProcess, make_client: MakeClient) -> None:
    client = make_client(daemon.socket_dir, OF)
    without_grpc(client)
    methods = everything(client)
    counted = {method: daemon.series("kvservice_rpc_duration_seconds_count", method=method) for method in methods}
    assert all(counted.values()), counted
    assert daemon.series("kvservice_socket_calls_total") == sum(counted.values())
    assert daemon.series("kvservice_call_connections") == 1
    client.close()
    eventually(lambda: daemon.series("kvservice_call_connections") == 0)
    assert not daemon.errors


def without_call_hello(receive: Callable[..., Any], seen: list[pb.SocketRequest]) -> Callable[..., Any]:
    """What a daemon that does not know that frame makes of it."""

    async def receive_as_before(peer: Any) -> pb.SocketRequest | None:
        request: pb.SocketRequest | None = await receive(peer)
        if request is not None and request.WhichOneof("message") == "call_hello":
            seen.append(request)
            return pb.SocketRequest()
        return request

    return receive_as_before


def test_an_older_daemon_is_asked_once_and_served_over_grpc(
    daemon_thread: DaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pb.SocketRequest] = []
    monkeypatch.setattr(fd_socket, "_receive", without_call_hello(fd_socket._receive, seen))
    client = make_client(daemon_thread.socket_dir, OF)
    everything(client)
    assert len(seen) == 1
    assert daemon_thread.daemon.metrics.registry.get_sample_value("kvservice_socket_calls_total") == 0


def raised(client: kv.Client, method: str, request: Any) -> tuple[type[Exception], str, str]:
    with pytest.raises(kv.KVServiceError) as caught:
        link_of(client).call(method, request, 5)
    return type(caught.value), str(caught.value), caught.value.error_id


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Put", pb.PutRequest(namespace_id=1, hashes=b"short")),
        ("Commit", pb.CommitRequest(reservation_id=9)),
        ("Lookup", pb.LookupRequest(namespace_id=1, hashes=bytes(16_385 * 32))),
        ("Load", pb.LoadRequest(namespace_id=1, hashes=bytes(32))),
        ("Forget", pb.ForgetRequest(namespace_id=1)),
        ("Lookup", pb.LookupRequest(namespace_id=9, hashes=bytes(32))),
    ],
)
def test_errors_are_those_of_grpc(daemon: DaemonProcess, make_client: MakeClient, method: str, request_: Any) -> None:
    one, other = make_client(daemon.socket_dir, OF), make_client(daemon.socket_dir, OF)
    without_grpc(one)
    without_call_connections(other)
    assert raised(one, method, request_) == raised(other, method, request_)


def test_a_message_above_the_limit_is_refused_as_over_grpc(make_daemon: MakeDaemon, make_client: MakeClient) -> None:
    daemon = make_daemon(message_bytes_max=64 * 1024, hashes_per_call_max=500)
    for size_bytes in (70_000, 4_000_000):
        client = make_client(daemon.socket_dir, OF)
        without_grpc(client)
        kind, says, _ = raised(client, "Lookup", pb.LookupRequest(namespace_id=1, hashes=bytes(size_bytes)))
        assert kind is kv.Overloaded
        assert "message_bytes_max" in says
        assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
    assert not daemon.errors


def test_a_bug_in_the_daemon_tells_an_id_and_no_more(
    daemon_thread: DaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    client = make_client(daemon_thread.socket_dir, OF)
    without_grpc(client)
    monkeypatch.setattr(daemon_thread.store, "lookup", broken)
    kind, says, error_id = raised(client, "Lookup", pb.LookupRequest(namespace_id=1))
    assert kind is kv.InternalError
    assert error_id
    assert error_id in says
    assert "secret" not in says


# ------------------------------------------------------------------- connections


def test_many_threads_at_once_each_get_their_own_answers(daemon: DaemonProcess, make_client: MakeClient) -> None:
    client = make_client(daemon.socket_dir, OF)
    without_grpc(client)
    hashes = chain("a", 16)
    assert client.save(hashes, contents(hashes, 4096)).saved == 16
    all_at_once = threading.Barrier(16)

    def ask(blocks: int) -> set[int]:
        all_at_once.wait(DEADLINE_S)
        return {client.lookup(hashes[:blocks]).blocks for _ in range(100)}

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(1, 17))) == [{blocks} for blocks in range(1, 17)]
    assert 1 <= daemon.series("kvservice_call_connections") <= 16
    assert not daemon.errors


def test_large_requests_and_answers_one_after_the_other(make_daemon: MakeDaemon, make_client: MakeClient) -> None:
    daemon = make_daemon(dram_bytes=64 << 20, dram_segment_bytes=64 << 20)
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=1024))
    without_grpc(client)
    hashes = chain("a", 10_000)
    for _ in range(5):
        with client.put(hashes) as reservation:
            assert len(reservation.reserved) == 10_000
        assert client.lookup(hashes).blocks == 0
    assert daemon.series("kvservice_call_connections") == 1


class HeldUp:
    """How many calls wait, and how many were cancelled while they did."""

    def __init__(self, daemon: DaemonThread) -> None:
        self._daemon = daemon
        self._may_go_on = daemon.on_loop(asyncio.Event)
        self.waiting = self.cancelled = 0

    def go_on(self) -> None:
        self._daemon.on_loop(self._may_go_on.set)

    def handler(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        async def wait(request: Any, context: Any) -> Any:
            self.waiting += 1
            try:
                await self._may_go_on.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.waiting -= 1
            return await answer(request, context)

        return wait


@contextmanager
def held_up(daemon: DaemonThread, monkeypatch: pytest.MonkeyPatch, method: str) -> Iterator[HeldUp]:
    """Calls of that method over call connections wait in the daemon before they do anything."""
    held = HeldUp(daemon)
    unary = daemon.daemon._control.unary
    with monkeypatch.context() as patched:
        patched.setitem(unary, method, UnaryMethod(held.handler(unary[method].handle), waits=True))
        yield held
        held.go_on()


def test_above_the_daemon_s_bound_calls_go_over_grpc(
    daemon_thread: DaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_socket, "CONNECTIONS_PER_INSTANCE_MAX", 3)
    client = make_client(daemon_thread.socket_dir, OF)
    with held_up(daemon_thread, monkeypatch, "Stats") as held, ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(client.stats) for _ in range(3)]
        eventually(lambda: held.waiting == 3)
        for _ in range(3):
            assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
        held.go_on()
        assert [each.result(DEADLINE_S).instances for each in waiting] == [1, 1, 1]
    assert call_connections(daemon_thread) == 3
    without_grpc(client)
    assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD


def test_without_a_descriptor_for_a_connection_calls_go_over_grpc(
    daemon: DaemonProcess, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(daemon.socket_dir, OF)

    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("kvservice_client.call_socket._Connection", none_left)
        assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
    assert daemon.series("kvservice_socket_calls_total") == 0
    assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
    assert daemon.series("kvservice_socket_calls_total") == 1


def test_a_connection_that_ended_while_it_was_idle_is_replaced(
    daemon_thread: DaemonThread, make_client: MakeClient
) -> None:
    def hang_up() -> None:
        for connection in daemon_thread.daemon._calls:
            connection.hang_up()

    client = make_client(daemon_thread.socket_dir, OF)
    without_grpc(client)
    for _ in range(3):
        assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
        daemon_thread.on_loop(hang_up)
        eventually(lambda: call_connections(daemon_thread) == 0)
    assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD


def test_a_client_whose_token_ended_attaches_again(daemon_thread: DaemonThread, make_client: MakeClient) -> None:
    client = make_client(daemon_thread.socket_dir, OF)
    assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
    (instance,) = daemon_thread.on_loop(lambda: list(daemon_thread.store.instances))
    # Of its token alone: nothing but the next call says so.
    daemon_thread.on_loop(lambda: daemon_thread.store.instances.hang_up(instance))
    with pytest.raises(kv.Unauthenticated):
        client.link.call("Lookup", pb.LookupRequest(namespace_id=1), 5)
    eventually(lambda: client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD)
    daemon_thread.on_loop(lambda: daemon_thread.store.hang_up(instance))


# --------------------------------------------------------------- deadlines, deaths


def test_a_deadline_cancels_the_call_and_its_answer_is_nobody_s(
    daemon_thread: DaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(daemon_thread.socket_dir, OF)
    without_grpc(client)
    with held_up(daemon_thread, monkeypatch, "Lookup") as held:
        assert client.lookup(chain("a", 1), deadline_s=0.2).reason is kv.Reason.TIMEOUT
        eventually(lambda: held.cancelled == 1)
    assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
    eventually(lambda: call_connections(daemon_thread) == 1)


def test_a_daemon_that_stands_still_costs_the_deadline_and_then_serves_again(
    daemon: DaemonProcess, make_client: MakeClient
) -> None:
    client = make_client(daemon.socket_dir, OF)
    without_grpc(client)
    hashes = chain("a", 8)
    assert client.save(hashes, contents(hashes, 4096)).saved == 8
    daemon.pause()
    for blocks in (2, 3):  # the first on the connection that is there, the second on one that is not welcomed
        assert client.lookup(hashes[:blocks], deadline_s=0.2).reason is kv.Reason.TIMEOUT
    daemon.resume()
    # An answer that came late must not be taken for this one's.
    assert [client.lookup(hashes[:blocks]).blocks for blocks in (8, 4, 1)] == [8, 4, 1]
    eventually(lambda: daemon.series("kvservice_call_connections") == 1)


def test_killed_in_the_middle_of_a_call(daemon: DaemonProcess, make_client: MakeClient) -> None:
    client = make_client(daemon.socket_dir, OF)
    link = link_of(client)
    assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
    daemon.pause()
    request = pb.PutRequest(namespace_id=1, hashes=chain("b", 1)[0])
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(link.put, request, 2 * DEADLINE_S)
        eventually(lambda: not link.unary._call_socket._idle)
        daemon.kill()
        with pytest.raises(kv.DaemonUnreachable) as caught:
            asked.result(DEADLINE_S)
    assert not isinstance(caught.value, kv.DeadlineExceeded)
    # It may have been granted: nobody may forget it.
    assert not link.is_settled(request.attempt_id)
    daemon.restart()
    eventually(lambda: client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD)


def test_a_client_killed_in_the_middle_of_a_call_leaves_nothing(
    daemon_thread: DaemonThread, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivor, victim = make_engine(daemon_thread.socket_dir, OF), make_engine(daemon_thread.socket_dir, OF)
    assert victim.do("put", name="a", blocks=5) == 5
    with held_up(daemon_thread, monkeypatch, "Commit") as held:
        with ThreadPoolExecutor(1) as threads:
            committing = threads.submit(victim.do, "commit")
            eventually(lambda: held.waiting == 1)
            victim.kill()
            assert committing.exception(DEADLINE_S) is not None
        eventually(lambda: held.cancelled == 1)
    daemon_thread.wait_no_holds()
    assert survivor.do("lookup", name="a", blocks=5)["blocks"] == 0
    assert survivor.do("save", name="a", blocks=5)["saved"] == 5
    assert call_connections(daemon_thread) == 1


def test_a_closed_client_s_calls_under_way_end(
    daemon_thread: DaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(daemon_thread.socket_dir, OF)
    link = link_of(client)
    with held_up(daemon_thread, monkeypatch, "Stats") as held, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(link.call, "Stats", pb.StatsRequest(), 2 * DEADLINE_S)
        eventually(lambda: held.waiting == 1)
        client.close()
        with pytest.raises(kv.DaemonUnreachable):
            asked.result(DEADLINE_S)
        eventually(lambda: held.cancelled == 1)
    daemon_thread.wait_no_instances()
    assert call_connections(daemon_thread) == 0


def test_a_call_under_way_while_the_daemon_ends_is_answered(
    make_daemon_thread: MakeDaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon_thread()
    client = make_client(daemon.socket_dir, OF)
    with held_up(daemon, monkeypatch, "Stats") as held, ThreadPoolExecutor(2) as threads:
        asked = threads.submit(client.stats)
        eventually(lambda: held.waiting == 1)
        daemon.drain()
        ending = asyncio.run_coroutine_threadsafe(daemon.daemon._calls.stop(DEADLINE_S), daemon._loop)
        eventually(lambda: daemon.daemon._calls.is_stopping)
        assert held.waiting == 1
        held.go_on()
        assert asked.result(DEADLINE_S).state == "draining"
        ending.result(DEADLINE_S)
        eventually(lambda: call_connections(daemon) == 0)
    # Nobody gets a connection any more; gRPC, which ends next, still answers.
    assert client.stats().state == "draining"
    assert call_connections(daemon) == 0
