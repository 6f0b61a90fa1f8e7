"""What a supervisor sees: health, reflection, the HTTP pages, and a drain that ends in time with exit status 0."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import kvservice_client as kv
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, contents, namespace
from tests.connections import control_socket_path
from tests.daemons import DaemonProcess
from tests.integration.books import Code, refused
from tests.integration.conftest import MakeClient, MakeConnection, MakeDaemon, MakeDaemonThread
from tests.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.integration

SERVICE = "kvservice.v1.KVCacheService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
DRAINING = (Code.UNAVAILABLE, pb.ERROR_REASON_DRAINING)


@contextmanager
def open_channel(socket_dir: str) -> Iterator[grpc.Channel]:
    target = f"unix:{control_socket_path(socket_dir)}"
    with grpc.insecure_channel(target, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        yield channel


def health(channel: grpc.Channel, service: str = SERVICE) -> int:
    """The status that grpc.health.v1 answers. No token is needed."""
    request = health_pb2.HealthCheckRequest(service=service)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int(stub.Check(request, timeout=DEADLINE_S).status)


def page(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=DEADLINE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_daemon_that_serves_says_so_everywhere(daemon: DaemonProcess) -> None:
    with open_channel(daemon.socket_dir) as channel:
        assert health(channel, "") == SERVING
        assert health(channel, SERVICE) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health(channel, "kvservice.v1.Nonsense")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    for path in ("/livez", "/readyz"):
        assert daemon.get(path) == (200, "ok\n")
    metrics = daemon.get("/metrics")[1]
    for task in ("fd_socket", "upkeep", "checksums"):
        assert f'kvservice_background_task_up{{task="{task}"}} 1.0' in metrics
    assert "kvservice_draining 0.0" in metrics


def test_reflection_lists_the_service_and_describes_it(daemon: DaemonProcess) -> None:
    with open_channel(daemon.socket_dir) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= services
        described = database.FindFileContainingSymbol(SERVICE)
        (service,) = described.service
        assert {method.name for method in service.method} == set(
            pb.DESCRIPTOR.services_by_name["KVCacheService"].methods_by_name
        )
        assert {message.name for message in described.message_type} == set(pb.DESCRIPTOR.message_types_by_name)


@pytest.mark.parametrize("task", ["fd_socket", "upkeep", "checksums"])
def test_a_dead_background_task_is_not_serving(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, task: str
) -> None:
    daemon = make_daemon_thread(http_port=0)
    connection = make_connection(daemon.socket_dir, namespace())
    observer = make_connection(daemon.socket_dir)
    address = daemon.daemon.http_address
    with open_channel(daemon.socket_dir) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=DEADLINE_S)
        assert next(watch).status == SERVING
        assert page(address, "/livez") == (200, "ok\n")
        daemon.kill_task(task)
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        assert health(channel, "") == NOT_SERVING
    for path in ("/livez", "/readyz"):
        status, text = page(address, path)
        assert status == 503
        assert f"background task {task} died" in text
    assert f'kvservice_background_task_up{{task="{task}"}} 0.0' in page(address, "/metrics")[1]
    if task != "fd_socket":  # without it nobody has a token any more
        assert f"background task {task} died" in observer.call("Stats", pb.StatsRequest()).state
        assert connection.lookup(chain("a", 1)).hit_blocks == 0


def test_a_loop_that_does_not_come_round_is_not_live(
    make_daemon_thread: MakeDaemonThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvservice.server.daemon._STALL_S", 0.4)
    daemon = make_daemon_thread(http_port=0)
    address = daemon.daemon.http_address
    assert page(address, "/livez") == (200, "ok\n")
    seen: list[tuple[int, str]] = []

    def stall() -> None:
        # On the event loop: the HTTP threads must be able to tell.
        eventually(lambda: page(address, "/livez")[0] == 503)
        seen.append(page(address, "/livez"))

    daemon.on_loop(stall)
    assert "event loop" in seen[0][1]
    eventually(lambda: page(address, "/livez") == (200, "ok\n"))


def test_sockets_that_were_removed_make_it_unready_and_whoever_is_attached_goes_on(
    make_daemon: MakeDaemon, make_connection: MakeConnection
) -> None:
    daemon = make_daemon()
    connection = make_connection(daemon.socket_dir, namespace())
    connection.save(chain("a", 3))
    os.unlink(control_socket_path(daemon.socket_dir))
    status, text = daemon.get("/readyz")
    assert status == 503
    assert "control.sock was removed or replaced: nobody new can attach; restart the daemon" in text
    assert daemon.get("/livez") == (200, "ok\n"), "what it holds would be lost with it"
    assert connection.lookup(chain("a", 3)).hit_blocks == 3
    assert "control.sock" in daemon.wait_event("sockets_lost")["why"]


# ----------------------------------------------------------------------- drain


def test_a_drain_refuses_new_work_and_lets_what_runs_finish(
    make_daemon: MakeDaemon, make_connection: MakeConnection
) -> None:
    daemon = make_daemon(drain_s=30)
    busy = make_connection(daemon.socket_dir, namespace())
    busy.save(chain("held", 3))
    reader = make_connection(daemon.socket_dir, namespace())
    lease_id = reader.get(chain("held", 3)).lease_id
    reservation_id = busy.put(chain("new", 2)).reservation_id
    late = make_connection(daemon.socket_dir)
    with open_channel(daemon.socket_dir) as channel:
        daemon.terminate()
        daemon.wait_event("draining")
        eventually(lambda: health(channel) == NOT_SERVING)
        assert health(channel, "") == NOT_SERVING
    assert busy.next_message().drain_notice.deadline_ms == 30_000
    assert daemon.get("/readyz") == (503, "not ok\ndraining\n")
    assert daemon.get("/livez") == (200, "ok\n")
    assert "kvservice_draining 1.0" in daemon.get("/metrics")[1]
    for call in (
        lambda: busy.put(chain("more", 1)),
        lambda: reader.get(chain("held", 3)),
        lambda: late.attach(namespace()),
    ):
        assert refused(call, *DRAINING).retry_after_ms > 0
    # Asking is allowed, also for who comes only now, and so is finishing.
    with kv.admin(daemon.socket_dir) as admin:
        assert admin.stats().state == "draining"
    assert busy.lookup(chain("held", 3)).hit_blocks == 3
    assert late.call("Stats", pb.StatsRequest()).state == "draining"
    busy.call("Renew", pb.RenewRequest(reservation_ids=[reservation_id]))
    assert busy.commit(reservation_id).runs[0].WhichOneof("outcome") == "published"
    assert daemon.is_running
    assert reader.release(lease_id).released == 1
    assert daemon.wait() == 0
    assert daemon.event("drained")["is_idle"] is True, "it did not wait for the deadline"
    assert not daemon.errors


@pytest.mark.parametrize("kept", ["lease", "reservation"])
def test_a_client_that_never_lets_go_does_not_hold_up_the_exit(
    make_daemon: MakeDaemon, make_connection: MakeConnection, kept: str
) -> None:
    daemon = make_daemon(drain_s=0.5)
    connection = make_connection(daemon.socket_dir, namespace())
    connection.save(chain("held", 3))
    if kept == "lease":
        assert connection.get(chain("held", 3)).lease_id
    else:
        assert connection.put(chain("new", 3)).reservation_id
    started_s = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - started_s >= 0.5
    assert daemon.event("drained")["is_idle"] is False
    assert not daemon.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_stops_at_once_on_either_signal_however_often(
    make_daemon: MakeDaemon, make_connection: MakeConnection, number: signal.Signals
) -> None:
    daemon = make_daemon(drain_s=100)
    make_connection(daemon.socket_dir, namespace()).save(chain("a", 3))
    for _ in range(3):
        daemon.signal(number)
    assert daemon.wait() == 0, "it waits for nothing, and less than drain_s"
    assert daemon.log[-1]["event"] == "stopped"
    assert not daemon.errors


def test_the_facade_says_draining_and_heals_after_it(
    make_daemon: MakeDaemon, make_client: MakeClient, make_connection: MakeConnection
) -> None:
    daemon = make_daemon(drain_s=30)
    of = namespace()
    client = make_client(daemon.socket_dir, of)
    hashes = chain("a", 3)
    whole = contents(hashes, of.block_size_bytes)
    reservation = make_connection(daemon.socket_dir, of)
    reservation_id = reservation.put(chain("b", 1)).reservation_id
    daemon.terminate()
    eventually(lambda: client.load(hashes, bytearray(len(whole))).reason is kv.Reason.DRAINING)
    saved = client.save(hashes, whole)
    assert (saved.saved, saved.refused, saved.reason) == (0, 3, kv.Reason.DRAINING)
    reservation.abort(reservation_id)
    assert daemon.wait() == 0
    eventually(lambda: client.load(hashes, bytearray(len(whole))).reason is kv.Reason.UNAVAILABLE)
    daemon.restart()
    assert client.wait_attached(DEADLINE_S)
    assert client.save(hashes, whole).saved == 3
    assert client.load(hashes, bytearray(len(whole))).blocks == 3


def test_quarantine_does_not_hold_up_a_drain(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon_thread = make_daemon_thread(drain_s=100)  # longer than anybody here waits for it
    connection = make_connection(daemon_thread.socket_dir, namespace())
    connection.put(chain("a", 3), lease_ms=20)
    eventually(lambda: daemon_thread.holds() == (0, 1, 3))
    daemon_thread.drain()
    assert daemon_thread.holds() == (0, 1, 3)
