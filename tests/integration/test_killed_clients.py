"""A client that dies, in the middle of a save, a load or anything else, leaves nothing behind and nothing half done."""

from __future__ import annotations

import signal

import psutil
import pytest

from tests.blocks import namespace
from tests.commands import CommandFailed
from tests.daemons import DaemonThread
from tests.engines import EngineProcess
from tests.integration.conftest import MakeDaemon, MakeDaemonThread, MakeEngine
from tests.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.integration

BLOCKS = 40
ALL = {"blocks": BLOCKS, "reason": "ok", "wrong": 0}
ARENA_BLOCKS = 1024


def free_slots(daemon: DaemonThread) -> int:
    """Of the one namespace, memory that was not made yet included."""

    def count() -> int:
        (only,) = daemon.store.namespaces.values()
        return only.pool.free_slots + daemon.store.arena.unused_bytes // only.stride_bytes

    daemon.wait_checksummed()
    return daemon.on_loop(count)


def only_this_one_is_left(daemon: DaemonThread, survivor: EngineProcess) -> None:
    """The daemon has noticed every death but this process's; the books balance."""
    eventually(
        lambda: (
            [i.identity.process_id for i in daemon.on_loop(lambda: list(daemon.store.instances))]
            == [survivor.process_id]
        )
    )
    daemon.wait_no_holds()


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0], ids=["before writing", "half written", "all but the commit"])
def test_killed_in_the_middle_of_a_save(daemon_thread: DaemonThread, make_engine: MakeEngine, fraction: float) -> None:
    survivor, victim = make_engine(daemon_thread.socket_dir), make_engine(daemon_thread.socket_dir)
    before = free_slots(daemon_thread)
    assert victim.do("put", name="a", blocks=BLOCKS) == BLOCKS
    victim.do("write", fraction=fraction)
    assert free_slots(daemon_thread) == before - BLOCKS
    assert survivor.do("load", name="a", blocks=BLOCKS)["reason"] == "being_written"
    victim.kill()
    only_this_one_is_left(daemon_thread, survivor)
    assert free_slots(daemon_thread) == before
    assert survivor.do("lookup", name="a", blocks=BLOCKS)["blocks"] == 0
    assert survivor.do("explain", name="a") == ["dropped"]
    # Nothing half-written is ever readable, and the survivor stores the same blocks itself.
    assert survivor.do("save", name="a", blocks=BLOCKS)["saved"] == BLOCKS
    assert survivor.do("load", name="a", blocks=BLOCKS) == ALL


def test_killed_in_the_middle_of_a_load(daemon_thread: DaemonThread, make_engine: MakeEngine) -> None:
    survivor, victim = make_engine(daemon_thread.socket_dir), make_engine(daemon_thread.socket_dir)
    survivor.do("save", name="a", blocks=BLOCKS)
    before = free_slots(daemon_thread)
    assert victim.do("get", name="a", blocks=BLOCKS) == BLOCKS
    assert victim.do("read", first=BLOCKS // 2) == ["right"] * (BLOCKS // 2)
    # What it holds cannot be evicted while it lives, and can be once it is dead.
    with pytest.raises(CommandFailed, match="CapacityExhausted"):
        survivor.do("put", name="b", blocks=ARENA_BLOCKS - BLOCKS + 1)
    victim.kill()
    only_this_one_is_left(daemon_thread, survivor)
    assert free_slots(daemon_thread) == before
    assert survivor.do("save", name="b", blocks=ARENA_BLOCKS - BLOCKS + 1)["saved"] == ARENA_BLOCKS - BLOCKS + 1
    assert survivor.do("load", name="b", blocks=ARENA_BLOCKS - BLOCKS + 1)["wrong"] == 0


def test_killed_between_the_commits_of_a_chain_that_others_build_on(
    daemon_thread: DaemonThread, make_engine: MakeEngine
) -> None:
    survivor, victim = make_engine(daemon_thread.socket_dir), make_engine(daemon_thread.socket_dir)
    assert victim.do("put", name="a", blocks=10) == 10
    assert survivor.do("put", name="a", blocks=20) == 10
    survivor.do("write")
    assert survivor.do("commit") == ["awaiting_parent"] * 10
    victim.kill()
    only_this_one_is_left(daemon_thread, survivor)
    # The tail cannot be reached without its prefix, so it is gone as well: never readable, never leaked.
    assert survivor.do("lookup", name="a", blocks=20)["blocks"] == 0
    assert survivor.do("explain", name="a", position=15) == ["dropped"]
    assert survivor.do("save", name="a", blocks=20)["saved"] == 20
    assert survivor.do("load", name="a", blocks=20) == {"blocks": 20, "reason": "ok", "wrong": 0}


def test_killed_while_its_reservation_is_behind_anothers(daemon_thread: DaemonThread, make_engine: MakeEngine) -> None:
    survivor, victim = make_engine(daemon_thread.socket_dir), make_engine(daemon_thread.socket_dir)
    assert survivor.do("put", name="a", blocks=10) == 10
    assert victim.do("put", name="a", blocks=20) == 10
    victim.do("write", fraction=0.5)
    victim.kill()
    survivor.do("write")
    eventually(lambda: daemon_thread.holds() == (0, 1, 0))
    assert survivor.do("commit") == ["published"] * 10
    only_this_one_is_left(daemon_thread, survivor)
    assert survivor.do("load", name="a", blocks=20) == {"blocks": 10, "reason": "not_held", "wrong": 0}


def test_killed_at_any_moment_of_saving_and_loading(
    make_daemon_thread: MakeDaemonThread, make_engine: MakeEngine
) -> None:
    daemon = make_daemon_thread(dram_bytes=2 << 20)
    of = namespace(block_size_bytes=20_000)
    survivor = make_engine(daemon.socket_dir, of)
    survivor.do("run_background", name="own", chains=2, blocks=6)
    victims = [make_engine(daemon.socket_dir, of) for _ in range(6)]
    for victim in victims:
        # The same chains, so that one's death hits blocks that the others read, await and write.
        victim.do("run_background", name="shared", chains=8, blocks=10)
    for victim in victims:
        eventually(lambda v=victim: v.do("background_counts").get("loads", 0) > 30)  # type: ignore[misc]  # bound now
        victim.kill()
    only_running(daemon, survivor)
    counts = survivor.do("stop_background")
    assert counts["failed"] == []
    assert counts["wrong"] == 0
    only_this_one_is_left(daemon, survivor)
    for number in range(8):
        assert survivor.do("load", name=f"shared-{number}", blocks=10)["wrong"] == 0


def only_running(daemon: DaemonThread, survivor: EngineProcess) -> None:
    """Everybody else's death has been noticed."""
    eventually(
        lambda: (
            {i.identity.process_id for i in daemon.on_loop(lambda: list(daemon.store.instances))}
            == {survivor.process_id}
        )
    )
    daemon.check()


def test_a_client_that_ends_by_itself_leaves_nothing_either(
    daemon_thread: DaemonThread, make_engine: MakeEngine
) -> None:
    engine = make_engine(daemon_thread.socket_dir)
    engine.do("save", name="a", blocks=BLOCKS)
    engine.do("get", name="a", blocks=BLOCKS)
    engine.do("put", name="b", blocks=BLOCKS)
    assert engine.quit() == 0
    daemon_thread.wait_no_instances()
    again = make_engine(daemon_thread.socket_dir)
    again.do("get", name="a", blocks=BLOCKS)
    assert again.do("close") == "closed"
    # It still has a lease, and so the memory; the lease's end is the end of the connection.
    assert again.do("read") == ["right"] * BLOCKS
    assert daemon_thread.holds()[0] + daemon_thread.holds()[2] > 0
    again.do("release")
    daemon_thread.wait_no_instances()
    assert again.mapped_segments() == []


# ------------------------------------------------------------------------ fork


def test_a_forked_child_gets_misses_and_the_parent_goes_on(make_daemon: MakeDaemon, make_engine: MakeEngine) -> None:
    daemon = make_daemon()
    engine = make_engine(daemon.socket_dir)
    engine.do("save", name="a", blocks=BLOCKS)
    report = engine.do("fork", name="a", blocks=BLOCKS)
    assert report["status"] == "forked"
    assert report["reasons"] == ["forked"] * 4
    assert report["loaded"] == 0
    assert report["raised"] == "ForkedClient"
    assert report["mapped"] == 0, "the child must not have the parent's mapping"
    assert report["call_connections"] == {"parent": 1, "child": 0}
    assert engine.do("status") == "attached"
    assert engine.do("load", name="a", blocks=BLOCKS) == ALL
    assert engine.do("save", name="b", blocks=BLOCKS)["saved"] == BLOCKS
    assert not daemon.errors


@pytest.mark.parametrize("is_closed", [False, True], ids=["attached", "closed with a lease"])
def test_the_parents_death_is_noticed_though_its_child_lives(
    daemon_thread: DaemonThread, make_engine: MakeEngine, is_closed: bool
) -> None:
    survivor, parent = make_engine(daemon_thread.socket_dir), make_engine(daemon_thread.socket_dir)
    survivor.do("save", name="a", blocks=BLOCKS)
    parent.do("get", name="a", blocks=BLOCKS)
    parent.do("put", name="b", blocks=BLOCKS)
    if is_closed:
        assert parent.do("close") == "closed"
    child = psutil.Process(parent.do("fork", name="a", blocks=BLOCKS, stay=True)["process_id"])
    try:
        assert parent.do("read") == ["right"] * BLOCKS, "what the parent held it still holds"
        assert daemon_thread.holds()[:2] == (1, 1)
        parent.kill()
        only_this_one_is_left(daemon_thread, survivor)
        assert child.is_running()
        assert child.status() != psutil.STATUS_ZOMBIE
    finally:
        child.send_signal(signal.SIGKILL)
        eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, within_s=DEADLINE_S)
    assert survivor.do("load", name="a", blocks=BLOCKS) == ALL
