"""A daemon that dies, stands still or goes away costs misses, never an exception, and comes back by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import kvservice_client as kv
from kvservice.service import messages
from kvservice_client.call_socket import CallSocket
from kvservice_client.memory_socket import MemorySocket
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, contents, namespace
from tests.connections import CallFailed, Connection
from tests.daemons import DaemonProcess, DaemonThread
from tests.engines import EngineProcess
from tests.integration.conftest import MakeClient, MakeConnection, MakeDaemon, MakeDaemonThread, MakeEngine
from tests.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.integration

OF = namespace(block_size_bytes=16_384)


def metric(daemon: DaemonProcess, name: str) -> float:
    """A gauge of the daemon's."""
    lines = daemon.get("/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def nothing_is_held(daemon: DaemonProcess) -> bool:
    return all(metric(daemon, f"kvservice_{what}") == 0 for what in ("leases", "reservations", "quarantined_slots"))


def counts(engine: EngineProcess, what: str) -> int:
    return int(engine.do("background_counts").get(what, 0))


def grows(engine: EngineProcess, what: str) -> None:
    """Wait until the engine counted more of it."""
    before = counts(engine, what)
    eventually(lambda: counts(engine, what) > before, what=f"more of {what!r}")


# ---------------------------------------------------------------------- killed


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM"])
def test_gone_under_load_and_back(make_daemon: MakeDaemon, make_engine: MakeEngine, end: str) -> None:
    daemon = make_daemon(drain_s=5)
    engines = [make_engine(daemon.socket_dir, OF) for _ in range(2)]
    for engine in engines:
        engine.do("run_background", name="shared", chains=6, blocks=20)
    for _ in range(3):
        for engine in engines:
            grows(engine, "loaded blocks")
        saved = sum(counts(engine, "saved blocks") for engine in engines)
        if end == "SIGKILL":
            daemon.kill()
        else:
            assert daemon.stop() == 0
            assert not daemon.errors
        for engine in engines:
            grows(engine, "load unavailable")
        daemon.restart()
        for engine in engines:
            engine.wait_served()
            grows(engine, "loaded blocks")
        # The new daemon started empty: they saved before they loaded.
        assert sum(counts(engine, "saved blocks") for engine in engines) > saved
    for engine in engines:
        total = engine.do("stop_background")
        assert total["failed"] == []
        assert total["wrong"] == 0
        assert len(set(engine.mapped_segments())) <= 4, "the memory of the daemons before is unmapped"
    eventually(lambda: nothing_is_held(daemon))
    assert not daemon.errors


def test_killed_while_a_client_holds_what_it_gave(make_daemon: MakeDaemon, make_engine: MakeEngine) -> None:
    daemon = make_daemon()
    engine = make_engine(daemon.socket_dir, OF)
    engine.do("save", name="a", blocks=20)
    assert engine.do("get", name="a", blocks=20) == 20
    assert engine.do("put", name="b", blocks=20) == 20
    daemon.kill()
    # The memory outlives the daemon for as long as it is held, and the bytes are still the block's.
    assert engine.do("read") == ["right"] * 20
    engine.do("write")
    daemon.restart()
    engine.wait_served()
    assert engine.do("read") == ["right"] * 20
    engine.do("release")
    engine.do("abort")
    eventually(lambda: len(set(engine.mapped_segments())) == 1, what="the old daemon's memory is unmapped")
    assert engine.do("load", name="a", blocks=20) == {"blocks": 0, "reason": "not_held", "wrong": 0}
    assert engine.do("save", name="a", blocks=20)["saved"] == 20
    assert engine.do("load", name="a", blocks=20)["wrong"] == 0


def test_a_restarted_daemon_knows_no_token_lease_or_namespace_of_the_one_before(
    make_daemon: MakeDaemon, make_connection: MakeConnection
) -> None:
    daemon = make_daemon()
    old = make_connection(daemon.socket_dir, OF)
    old.save(chain("a", 2))
    lease_id = old.get(chain("a", 2)).lease_id
    epoch = make_connection(daemon.socket_dir).attach(OF).daemon_epoch
    daemon.kill()
    daemon.restart()
    with Connection(daemon.socket_dir) as fresh:
        assert fresh.attach(OF).daemon_epoch != epoch
        for token, says in ((old.token, "UNAUTHENTICATED"), (None, "NOT_FOUND")):
            with pytest.raises(CallFailed, match=says):
                fresh.call("Release", pb.ReleaseRequest(lease_ids=[lease_id]), token=token)


# --------------------------------------------------------------------- stopped


@pytest.mark.timeout(90)
def test_a_daemon_that_stands_still_costs_one_deadline_and_then_nothing(
    make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(lease_s=0.5)
    client = make_client(daemon.socket_dir, OF)
    hashes, other = chain("a", 8), chain("b", 8)
    whole = contents(hashes, OF.block_size_bytes)
    assert client.save(hashes, whole).saved == 8
    daemon.pause()
    destination = bytearray(len(whole))
    for deadline_s in (0.2, 0.5):
        # Each of these may have been granted by a daemon whose answer never came.
        answers = (
            client.load(hashes, destination, deadline_s=deadline_s),
            client.save(other, whole, deadline_s=deadline_s),
            client.lookup(hashes, deadline_s=deadline_s),
        )
        # Six seconds may be over already where the machine is busy.
        assert {answer.reason for answer in answers} <= {kv.Reason.TIMEOUT, kv.Reason.UNAVAILABLE}
    # After six seconds without a sign of life nobody waits for it any more: these have ten seconds and do not use them.
    eventually(lambda: client.load(hashes, destination, deadline_s=0.2).reason is kv.Reason.UNAVAILABLE)
    at_once = (client.load(hashes, destination), client.save(other, whole), client.lookup(hashes))
    assert [answer.reason for answer in at_once] == [kv.Reason.UNAVAILABLE] * 3
    newcomer = kv.attach(OF, socket_dir=daemon.socket_dir, attach_timeout_s=0.3)
    assert newcomer.status is kv.Status.RECONNECTING
    daemon.resume()
    eventually(lambda: client.load(hashes, destination).blocks == 8)
    assert destination == whole
    assert newcomer.wait_attached(DEADLINE_S)
    newcomer.close()
    # What was granted to calls that had given up is found and ended, before and after its expiry.
    eventually(lambda: nothing_is_held(daemon))
    assert client.save(other, whole).saved + client.lookup(other).blocks >= 8
    assert not daemon.errors


@contextmanager
def stalled(daemon: DaemonThread) -> Iterator[None]:
    """The daemon's event loop does nothing meanwhile."""
    go_on, stands = threading.Event(), threading.Event()

    def stall() -> None:
        stands.set()
        go_on.wait(DEADLINE_S)

    waiting = threading.Thread(target=lambda: daemon.on_loop(stall))
    waiting.start()
    assert stands.wait(DEADLINE_S)
    try:
        yield
    finally:
        go_on.set()
        waiting.join(DEADLINE_S)


@pytest.mark.parametrize("lease_s", [60, 0.05], ids=["live", "expired"])
def test_what_was_granted_to_calls_that_gave_up_is_not_lost(
    make_daemon_thread: MakeDaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, lease_s: float
) -> None:
    daemon = make_daemon_thread(lease_s=lease_s)
    client = make_client(daemon.socket_dir, OF)
    hashes = chain("a", 8)
    whole = contents(hashes, OF.block_size_bytes)
    assert client.save(hashes, whole).saved == 8
    granted: list[str] = []
    with monkeypatch.context() as patched:
        for answer in ("get_response", "put_response"):
            patched.setattr(messages, answer, late(getattr(messages, answer), granted))
        for number in range(3):
            # The daemon grants it, and its answer comes when nobody waits any more.
            with pytest.raises(kv.DeadlineExceeded):
                client.get(hashes, deadline_s=0.1)
            daemon.on_loop(granted.copy)
            with pytest.raises(kv.DeadlineExceeded):
                client.put(chain(f"new-{number}", 8), deadline_s=0.1)
            daemon.on_loop(granted.copy)
    assert set(granted) == {"Granted", "Reserved"}
    daemon.wait_no_holds()
    assert client.load(hashes, bytearray(len(whole))).blocks == 8
    assert client.save(chain("new-0", 8), whole).saved == 8


def late(answer: Callable[..., object], granted: list[str]) -> Callable[..., object]:
    """The same answer, of a daemon that is held up after it has granted what was asked for."""

    def answer_late(outcome: object) -> object:
        granted.append(type(outcome).__name__)
        threading.Event().wait(0.2)
        return answer(outcome)

    return answer_late


def test_an_answer_that_comes_late_is_not_taken_for_the_next_one(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread()
    first = make_connection(daemon.socket_dir).attach(OF, namespace("other"))
    assert len(first.segment_ids) == 2
    memory = MemorySocket(daemon.socket_dir, timeout_s=0.2)
    with stalled(daemon), pytest.raises(kv.DaemonUnreachable):
        memory.segment(first.segment_ids[0])
    # The answer to the first question lies in the socket now; it must not become that to the second.
    for segment_id in reversed(first.segment_ids):
        with pytest.raises(kv.DaemonUnreachable, match="cut short"):
            memory.segment(segment_id)
    memory.close()


def test_a_refusal_is_heard_even_where_the_daemon_hangs_up_first(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(allowed_uids="54321")
    for _ in range(100):
        with pytest.raises(kv.PermissionDenied):
            MemorySocket(daemon.socket_dir, timeout_s=DEADLINE_S)


def test_a_memory_socket_that_breaks_alone_ends_the_attachment_and_makes_another(
    daemon_thread: DaemonThread, make_client: MakeClient
) -> None:
    client = make_client(daemon_thread.socket_dir, OF)
    hashes = chain("a", 4)
    whole = contents(hashes, OF.block_size_bytes)
    assert client.save(hashes, whole).saved == 4

    def hang_up_on_everybody() -> None:
        for instance in list(daemon_thread.store.instances):
            daemon_thread.store.hang_up(instance)

    daemon_thread.on_loop(hang_up_on_everybody)
    # Its token has ended: the next call says so to the client, which heals by itself.
    eventually(lambda: client.load(hashes, bytearray(len(whole))).blocks == 4)
    assert client.save(chain("b", 4), whole).saved == 4
    eventually(lambda: daemon_thread.on_loop(lambda: len(daemon_thread.store.instances)) == 1)
    daemon_thread.wait_no_holds()


def test_a_call_whose_attachment_ended_in_the_same_moment_finds_the_daemon_unreachable(
    make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    """The channel is closed between being looked up and being used, as when a daemon dies under load."""
    daemon = make_daemon()
    link = make_client(daemon.socket_dir, OF)._attachment.link()
    link._channel.close()
    link.unary.close()
    with pytest.raises(kv.DaemonUnreachable):
        link.put(pb.PutRequest(), 5)
    with pytest.raises(kv.DaemonUnreachable):
        list(link.get(pb.GetRequest(), 5))
    with pytest.raises(kv.DaemonUnreachable):
        link.call("Lookup", pb.LookupRequest(), 5)


def test_an_answer_that_is_no_message_is_a_miss(
    daemon_thread: DaemonThread, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(daemon_thread.socket_dir, OF)
    monkeypatch.setattr(CallSocket, "call", lambda *_: b"\xff")
    assert client.lookup(chain("a", 1)).reason is kv.Reason.UNAVAILABLE
    monkeypatch.undo()
    assert client.lookup(chain("a", 1)).reason is kv.Reason.NOT_HELD
