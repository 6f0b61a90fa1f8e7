"""A client that the scheduler or a debugger stops for as long as it likes never reads or writes what is not its own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.blocks import namespace
from tests.commands import CommandFailed
from tests.daemons import DaemonProcess, DaemonThread
from tests.engines import EngineProcess
from tests.integration.conftest import MakeDaemon, MakeDaemonThread, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration

LEASE_S = 0.3
"""Of those who are stopped; who is not has the usual time, however busy the machine."""
BLOCKS = 32
ARENA_BLOCKS = 256
OF = namespace(block_size_bytes=16_384)


@pytest.fixture
def daemon(make_daemon_thread: MakeDaemonThread) -> DaemonThread:
    """An arena of 256 blocks."""
    return make_daemon_thread(high_watermark=1.0, low_watermark=0.9)


def quarantined(daemon: DaemonThread) -> int:
    return daemon.holds()[2]


def fill(engine: EngineProcess, name: str, blocks: int) -> None:
    """Store a chain that takes so many blocks, evicting what may be evicted; then see that it is whole."""
    assert engine.do("save", name=name, blocks=blocks)["reason"] == "ok"
    assert engine.do("load", name=name, blocks=blocks) == {"blocks": blocks, "reason": "ok", "wrong": 0}


def test_stopped_in_the_middle_of_a_save(daemon: DaemonThread, make_engine: MakeEngine) -> None:
    stopped, other = make_engine(daemon.socket_dir, OF), make_engine(daemon.socket_dir, OF)
    assert stopped.do("put", name="a", blocks=BLOCKS, lease_s=LEASE_S) == BLOCKS
    stopped.do("write", fraction=0.5)
    stopped.pause()
    eventually(lambda: quarantined(daemon) == BLOCKS)
    # The others go on: the same blocks, and every other slot of the arena, twice over.
    fill(other, "a", BLOCKS)
    fill(other, "b", ARENA_BLOCKS - BLOCKS)
    fill(other, "c", ARENA_BLOCKS - 2 * BLOCKS)
    fill(other, "a", BLOCKS)
    with pytest.raises(CommandFailed, match="CapacityExhausted"):
        other.do("put", name="d", blocks=ARENA_BLOCKS - BLOCKS + 1)
    assert quarantined(daemon) == BLOCKS
    stopped.resume()
    # It goes on where it was, into slots that nobody else has got.
    stopped.do("write")
    assert other.do("load", name="a", blocks=BLOCKS) == {"blocks": BLOCKS, "reason": "ok", "wrong": 0}
    assert other.do("load", name="c", blocks=ARENA_BLOCKS - 2 * BLOCKS)["wrong"] == 0
    with pytest.raises(CommandFailed, match="ReservationLost"):
        stopped.do("commit")
    assert quarantined(daemon) == BLOCKS
    stopped.do("abort")
    daemon.wait_no_holds()
    fill(other, "e", ARENA_BLOCKS)
    assert stopped.do("load", name="e", blocks=ARENA_BLOCKS)["wrong"] == 0


@pytest.mark.parametrize("first", [0, BLOCKS // 2], ids=["before the first block", "half way"])
def test_stopped_in_the_middle_of_a_load(daemon: DaemonThread, make_engine: MakeEngine, first: int) -> None:
    stopped, other = make_engine(daemon.socket_dir, OF), make_engine(daemon.socket_dir, OF)
    other.do("save", name="a", blocks=BLOCKS)
    assert stopped.do("get", name="a", blocks=BLOCKS, lease_s=LEASE_S) == BLOCKS
    stopped.pause()
    eventually(lambda: quarantined(daemon) == BLOCKS)
    fill(other, "b", ARENA_BLOCKS - BLOCKS)
    fill(other, "c", ARENA_BLOCKS - BLOCKS)
    assert other.do("forget") > 0
    assert other.do("lookup", name="a", blocks=BLOCKS)["blocks"] == 0
    fill(other, "d", ARENA_BLOCKS - BLOCKS)
    stopped.resume()
    # Forgotten by all, but not overwritten: it may finish.
    assert set(stopped.do("read", first=first)) <= {"right", "changed"}
    with pytest.raises(CommandFailed, match="LeaseExpired"):
        stopped.do("renew")
    stopped.do("release")
    daemon.wait_no_holds()
    fill(other, "e", ARENA_BLOCKS)
    assert other.do("load", name="e", blocks=ARENA_BLOCKS)["wrong"] == 0
    # After the release the views say that they are nobody's any more.
    assert set(stopped.do("read")) == {"changed"}


def loads(engine: EngineProcess) -> int:
    """How many loads it has done in the background."""
    return int(engine.do("background_counts").get("loads", 0))


def test_stopped_at_any_moment_of_saving_and_loading(
    make_daemon_thread: MakeDaemonThread, make_engine: MakeEngine
) -> None:
    daemon = make_daemon_thread(lease_s=LEASE_S, high_watermark=1.0, low_watermark=0.9)
    stopped, other = make_engine(daemon.socket_dir, OF), make_engine(daemon.socket_dir, OF)
    chosen = random.Random(5)
    stopped.do("run_background", name="shared", chains=12, blocks=BLOCKS)
    for turn in range(6):
        wanted = loads(stopped) + chosen.randrange(1, 40)
        eventually(lambda n=wanted: loads(stopped) >= n)  # type: ignore[misc]  # bound now
        stopped.pause()
        eventually(lambda: daemon.on_loop(lambda: daemon.store.is_idle), what="what it held has expired")
        # The same chains with the same bytes, and others in between.
        other.do("save", name=f"shared-{turn}", blocks=BLOCKS)
        other.do("save", name=f"own-{turn}", blocks=ARENA_BLOCKS - 2 * BLOCKS)
        assert other.do("load", name=f"own-{turn}", blocks=ARENA_BLOCKS - 2 * BLOCKS)["wrong"] == 0
        stopped.resume()
        assert other.do("load", name=f"shared-{turn}", blocks=BLOCKS)["wrong"] == 0
    counts = stopped.do("stop_background")
    assert counts["failed"] == []
    assert counts["wrong"] == 0
    assert counts["loaded blocks"] > 0
    daemon.wait_no_holds()
    for number in range(12):
        assert other.do("load", name=f"shared-{number}", blocks=BLOCKS)["wrong"] == 0


def stop_gracefully(daemon: DaemonProcess) -> None:
    assert daemon.stop() == 0


@pytest.mark.parametrize("end", [stop_gracefully, DaemonProcess.kill], ids=["SIGTERM", "SIGKILL"])
def test_stopped_in_the_middle_of_a_load_while_the_daemon_goes_away(
    make_daemon: MakeDaemon, make_engine: MakeEngine, end: Callable[[DaemonProcess], None]
) -> None:
    daemon = make_daemon(drain_s=2)
    stopped, other = make_engine(daemon.socket_dir, OF), make_engine(daemon.socket_dir, OF)
    other.do("save", name="a", blocks=BLOCKS)
    assert stopped.do("get", name="a", blocks=BLOCKS, lease_s=LEASE_S) == BLOCKS
    stopped.pause()
    end(daemon)
    daemon.restart()
    other.wait_served()
    fill(other, "b", BLOCKS)
    stopped.resume()
    # The old daemon's memory may be gone under its mapping; then it must not look like blocks of zeros.
    assert set(stopped.do("read")) <= {"right", "changed"}
    stopped.do("release")
    stopped.wait_served()
    assert stopped.do("load", name="b", blocks=BLOCKS) == {"blocks": BLOCKS, "reason": "ok", "wrong": 0}
    assert not daemon.errors


@pytest.mark.parametrize("end", [stop_gracefully, DaemonProcess.kill], ids=["SIGTERM", "SIGKILL"])
def test_stopped_in_the_middle_of_a_save_while_the_daemon_goes_away(
    make_daemon: MakeDaemon, make_engine: MakeEngine, end: Callable[[DaemonProcess], None]
) -> None:
    daemon = make_daemon(drain_s=2)
    stopped, other = make_engine(daemon.socket_dir, OF), make_engine(daemon.socket_dir, OF)
    assert stopped.do("put", name="a", blocks=BLOCKS, lease_s=LEASE_S) == BLOCKS
    stopped.do("write", fraction=0.5)
    stopped.pause()
    end(daemon)
    daemon.restart()
    other.wait_served()
    fill(other, "a", BLOCKS)
    fill(other, "b", ARENA_BLOCKS - BLOCKS)
    stopped.resume()
    stopped.do("write")
    with pytest.raises(CommandFailed, match=r"DaemonUnreachable|Unauthenticated|LeaseUnknown"):
        stopped.do("commit")
    stopped.do("abort")
    assert other.do("load", name="a", blocks=BLOCKS)["wrong"] == 0
    assert other.do("load", name="b", blocks=ARENA_BLOCKS - BLOCKS)["wrong"] == 0
    stopped.wait_served()
    assert stopped.do("load", name="b", blocks=ARENA_BLOCKS - BLOCKS)["wrong"] == 0
    assert not daemon.errors
