"""Memory that goes from one namespace to another takes no bytes along, and leaves no mapping behind."""

from __future__ import annotations

import pytest

import kvservice_client as kv
from tests.blocks import namespace
from tests.daemons import MIB, DaemonProcess, DaemonThread
from tests.engines import EngineProcess
from tests.integration.conftest import MakeDaemonThread, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration

BLOCK_BYTES = 16_384
A, B = (namespace(name, block_size_bytes=BLOCK_BYTES) for name in ("a", "b"))
# Another stride, so that its slots lie across what were two of A's.
C = namespace("c", block_size_bytes=3 * BLOCK_BYTES + 1)
SEGMENT_BLOCKS = MIB // BLOCK_BYTES
ARENA_BLOCKS = 4 * SEGMENT_BLOCKS
SEGMENT_BLOCKS_OF_C = MIB // (3 * BLOCK_BYTES + 4096)


@pytest.fixture
def daemon_thread(make_daemon_thread: MakeDaemonThread) -> DaemonThread:
    """Four segments; nothing leaves before it must."""
    return make_daemon_thread(high_watermark=1.0, low_watermark=0.9)


def fill(engine: EngineProcess, name: str, blocks: int) -> None:
    assert engine.do("save", name=name, blocks=blocks)["saved"] == blocks


def all_right(engine: EngineProcess, name: str, blocks: int) -> int:
    """Load; what is left of the chain, all of it right."""
    loaded = engine.do("load", name=name, blocks=blocks)
    assert loaded["wrong"] == 0
    return int(loaded["blocks"])


@pytest.mark.parametrize(
    ("taker", "of_newcomer"), [(B, SEGMENT_BLOCKS), (C, SEGMENT_BLOCKS_OF_C)], ids=["same stride", "another stride"]
)
def test_the_taker_finds_zeros_and_the_loser_unmaps(
    daemon_thread: DaemonThread, make_engine: MakeEngine, taker: kv.Namespace, of_newcomer: int
) -> None:
    daemon = daemon_thread
    loser = make_engine(daemon.socket_dir, A)
    for number in range(4):  # a chain in each segment
        fill(loser, f"x{number}", SEGMENT_BLOCKS)
    daemon.wait_checksummed()
    assert len(loser.mapped_segments()) == 4
    newcomer = make_engine(daemon.socket_dir, taker)
    for turn in range(2):
        # Every byte of a fresh slot, before anything is written to it.
        assert newcomer.do("put", name=f"y{turn}", blocks=of_newcomer) == of_newcomer
        assert newcomer.do("read_raw") == 0
        newcomer.do("write")
        assert newcomer.do("commit") == ["published"] * of_newcomer
        daemon.wait_checksummed()
    eventually(lambda: len(loser.mapped_segments()) == 2, what="the loser unmapped what was taken from it")
    assert len(newcomer.mapped_segments()) == 2
    assert not set(loser.mapped_segments()) & set(newcomer.mapped_segments())
    assert daemon.store.arena.used_bytes <= 4 * MIB
    daemon.check()
    assert all_right(newcomer, "y0", of_newcomer) == of_newcomer
    assert all_right(newcomer, "y1", of_newcomer) == of_newcomer
    assert sum(all_right(loser, f"x{number}", SEGMENT_BLOCKS) for number in range(4)) == 2 * SEGMENT_BLOCKS
    assert [loser.do("explain", name=f"x{number}") for number in range(4)].count(["dropped"]) == 2
    # Both at their share now: neither takes from the other, each evicts its own.
    fill(loser, "z", 2 * SEGMENT_BLOCKS)
    assert all_right(loser, "z", 2 * SEGMENT_BLOCKS) == 2 * SEGMENT_BLOCKS
    assert all_right(newcomer, "y1", of_newcomer) == of_newcomer
    daemon.check()


def test_each_maps_exactly_what_its_namespace_owns(daemon_thread: DaemonThread, make_engine: MakeEngine) -> None:
    daemon = daemon_thread

    def owned(of: kv.Namespace) -> list[str]:
        live = [
            segment.segment_id
            for namespace in daemon.store.namespaces.values()
            if namespace.spec.label == of.label
            for _, segment in namespace.pool.live_segments()
        ]
        return sorted(f"kvservice-segment-{segment_id} (deleted)" for segment_id in live)

    namespaces = {"a": A, "c": C, "b": B, "d": namespace("d", block_size_bytes=7 * BLOCK_BYTES)}
    engines: dict[str, list[EngineProcess]] = {}
    for newest, of in namespaces.items():
        engines[newest] = [make_engine(daemon.socket_dir, of) for _ in range(2)]
        for turn in range(3):
            for name, (writer, reader) in engines.items():
                daemon.wait_checksummed()
                blocks = MIB // namespaces[name].block_size_bytes // 2
                fill(writer, f"{newest}{turn}", blocks)
                assert all_right(reader, f"{newest}{turn}", blocks) == blocks
        for name, both in engines.items():
            for engine in both:
                eventually(
                    lambda e=engine, n=name: (
                        sorted(e.mapped_segments())  # type: ignore[misc]  # bound now
                        == daemon.on_loop(lambda: owned(namespaces[n]))
                    )
                )
        daemon.check()
        assert daemon.store.arena.used_bytes <= 4 * MIB


def test_what_is_leased_or_being_written_is_not_taken(daemon_thread: DaemonThread, make_engine: MakeEngine) -> None:
    daemon = daemon_thread
    loser = make_engine(daemon.socket_dir, A)
    fill(loser, "x", ARENA_BLOCKS)
    assert loser.do("get", name="x", blocks=ARENA_BLOCKS) == ARENA_BLOCKS
    newcomer = make_engine()
    assert newcomer.attach(daemon.socket_dir, B, timeout_s=0.5) == "reconnecting", "there is nothing to take"
    assert len(loser.mapped_segments()) == 4
    assert loser.do("read") == ["right"] * ARENA_BLOCKS
    loser.do("release")
    newcomer.wait_served()
    fill(newcomer, "y", SEGMENT_BLOCKS)
    assert loser.do("put", name="z", blocks=SEGMENT_BLOCKS) == SEGMENT_BLOCKS
    loser.do("write")
    daemon.wait_checksummed()
    third = make_engine(daemon.socket_dir, C)
    fill(third, "w", SEGMENT_BLOCKS_OF_C)
    assert loser.do("commit") == ["published"] * SEGMENT_BLOCKS
    assert all_right(loser, "z", SEGMENT_BLOCKS) == SEGMENT_BLOCKS
    assert all_right(newcomer, "y", SEGMENT_BLOCKS) == SEGMENT_BLOCKS
    assert all_right(third, "w", SEGMENT_BLOCKS_OF_C) == SEGMENT_BLOCKS_OF_C
    daemon.wait_no_holds()


def test_a_stopped_loser_unmaps_when_it_goes_on(daemon_thread: DaemonThread, make_engine: MakeEngine) -> None:
    daemon = daemon_thread
    loser = make_engine(daemon.socket_dir, A)
    fill(loser, "x", ARENA_BLOCKS)
    daemon.wait_checksummed()
    loser.pause()
    newcomer = make_engine(daemon.socket_dir, B)
    assert newcomer.do("put", name="y", blocks=SEGMENT_BLOCKS) == SEGMENT_BLOCKS
    assert newcomer.do("read_raw") == 0
    newcomer.do("write")
    newcomer.do("commit")
    assert len(loser.mapped_segments()) == 4
    assert daemon.store.arena.used_bytes <= 4 * MIB, "punched out, so mapped or not it costs nothing"
    loser.resume()
    eventually(lambda: len(loser.mapped_segments()) == 3)
    assert all_right(loser, "x", ARENA_BLOCKS) <= 3 * SEGMENT_BLOCKS
    assert all_right(newcomer, "y", SEGMENT_BLOCKS) == SEGMENT_BLOCKS


def test_the_memory_itself_goes_back_to_the_system(daemon: DaemonProcess, make_engine: MakeEngine) -> None:
    def shared_bytes() -> int:
        return int(daemon.process.memory_info().shared)

    loser = make_engine(daemon.socket_dir, A)
    fill(loser, "x", ARENA_BLOCKS)
    with_all = shared_bytes()
    for name in ("b", "c", "d"):
        newcomer = make_engine(daemon.socket_dir, namespace(name, block_size_bytes=BLOCK_BYTES))
        eventually(lambda n=newcomer, m=name: n.do("save", name=m, blocks=SEGMENT_BLOCKS)["saved"] == SEGMENT_BLOCKS)  # type: ignore[misc]  # bound now
    assert shared_bytes() <= with_all + MIB // 2
    assert daemon.open_descriptors < 64
    assert daemon.stop() == 0
    assert not daemon.errors
