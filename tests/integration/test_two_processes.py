"""What one process saved, another loads byte for byte, whatever the size and the layout of its buffers."""

from __future__ import annotations

import pytest

from tests.blocks import namespace
from tests.daemons import MIB
from tests.integration.conftest import MakeDaemon, MakeEngine

pytestmark = pytest.mark.integration

SIZES_BYTES = (1, 4095, 4096, 4097, 5000, 65_536, 100_003, 1 * MIB, 4 * MIB)


@pytest.mark.parametrize("as_list", [False, True], ids=["one buffer", "a buffer per block"])
def test_the_second_process_loads_what_the_first_saved(
    make_daemon: MakeDaemon, make_engine: MakeEngine, as_list: bool
) -> None:
    daemon = make_daemon(dram_bytes=64 * MIB)
    for size_bytes in SIZES_BYTES:
        of = namespace(f"{size_bytes} bytes", block_size_bytes=size_bytes)
        blocks = 5 if size_bytes >= MIB else 17
        first, second = make_engine(daemon.socket_dir, of), make_engine(daemon.socket_dir, of)
        assert second.do("load", name="a", blocks=blocks)["blocks"] == 0
        saved = first.do("save", name="a", blocks=blocks, as_list=as_list)
        assert (saved["saved"], saved["reason"]) == (blocks, "ok")
        assert second.do("lookup", name="a", blocks=blocks + 3)["blocks"] == blocks
        # The other layout on the way out: the bytes do not remember how they came in.
        loaded = second.do("load", name="a", blocks=blocks, as_list=not as_list)
        assert loaded == {"blocks": blocks, "reason": "ok", "wrong": 0}, size_bytes
        first.kill()
        # Committed blocks belong to the daemon, not to who wrote them.
        longer = second.do("load", name="a", blocks=blocks + 3, as_list=as_list)
        assert longer == {"blocks": blocks, "reason": "not_held", "wrong": 0}
        second.kill()
    assert not daemon.errors


def test_a_chain_grows_by_turns_of_two_processes(make_daemon: MakeDaemon, make_engine: MakeEngine) -> None:
    daemon = make_daemon()
    engines = [make_engine(daemon.socket_dir), make_engine(daemon.socket_dir)]
    for turn in range(6):
        writer, reader = engines[turn % 2], engines[1 - turn % 2]
        assert writer.do("save", name="talk", start=10 * turn, blocks=10)["saved"] == 10
        assert reader.do("load", name="talk", blocks=10 * (turn + 1)) == {
            "blocks": 10 * (turn + 1),
            "reason": "ok",
            "wrong": 0,
        }
    # Who saves it all again writes nothing.
    again = engines[0].do("save", name="talk", blocks=60)
    assert (again["saved"], again["held"]) == (0, 60)


def test_a_tail_without_its_prefix_is_refused_and_nothing_of_it_is_kept(
    make_daemon: MakeDaemon, make_engine: MakeEngine
) -> None:
    engine = make_engine(make_daemon().socket_dir)
    saved = engine.do("save", name="talk", start=3, blocks=4)
    assert (saved["refused"], saved["reason"]) == (4, "parent_missing")
    assert engine.do("lookup", name="talk", blocks=7)["blocks"] == 0
    assert engine.do("explain", name="talk", position=3) == ["not_remembered"]


def test_two_processes_that_save_the_same_blocks_write_them_once(
    make_daemon: MakeDaemon, make_engine: MakeEngine
) -> None:
    daemon = make_daemon()
    first, second = make_engine(daemon.socket_dir), make_engine(daemon.socket_dir)
    assert first.do("put", name="both", blocks=4) == 4
    saved = second.do("save", name="both", blocks=4)
    assert (saved["saved"], saved["being_written"]) == (0, 4)
    assert second.do("load", name="both", blocks=4) == {"blocks": 0, "reason": "being_written", "wrong": 0}
    first.do("write")
    assert first.do("commit") == ["published"] * 4
    assert second.do("load", name="both", blocks=4) == {"blocks": 4, "reason": "ok", "wrong": 0}
    # The other way round: a chain behind blocks that somebody else is still writing waits for them.
    assert first.do("put", name="chain", blocks=2) == 2
    assert second.do("put", name="chain", blocks=4) == 2
    second.do("write")
    assert second.do("commit") == ["awaiting_parent"] * 2
    assert second.do("lookup", name="chain", blocks=4)["blocks"] == 0
    first.do("write")
    assert first.do("commit") == ["published"] * 2
    assert second.do("load", name="chain", blocks=4) == {"blocks": 4, "reason": "ok", "wrong": 0}


def test_a_client_in_the_same_process_as_no_daemon_gets_misses_until_there_is_one(
    make_daemon: MakeDaemon, make_engine: MakeEngine
) -> None:
    daemon = make_daemon()
    assert daemon.stop() == 0
    engine = make_engine()
    assert engine.attach(daemon.socket_dir, namespace(), timeout_s=0.2) == "reconnecting"
    assert engine.do("load", name="a", blocks=2) == {"blocks": 0, "reason": "unavailable", "wrong": 0}
    assert engine.do("save", name="a", blocks=2)["reason"] == "unavailable"
    daemon.restart()
    engine.wait_served()
    assert engine.do("save", name="a", blocks=2)["saved"] == 2
    assert engine.do("load", name="a", blocks=2)["wrong"] == 0
