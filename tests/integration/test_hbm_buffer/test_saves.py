"""Saves through the buffer: the engine's blocks are free once they were gathered, and no room is lost."""

from __future__ import annotations

import gc
import threading

import pytest

import kvservice_client as kv
from kvservice_client import Reason
from tests.blocks import chain
from tests.integration.test_hbm_buffer.conftest import BLOCK, BUFFER_BLOCKS, Engine
from tests.waiting import eventually

pytestmark = pytest.mark.integration


def test_later_work_of_the_stream_may_overwrite_what_was_gathered(engine: Engine) -> None:
    saved = engine.blocks([3, 1, 2])

    def overwrite() -> bool:
        engine.fill(seed=1)
        return True

    gathered = engine.buffer.gather(engine.mover, [3, 1, 2])
    assert gathered is not None
    assert gathered.blocks == 3
    engine.gpu.queue(engine.stream, overwrite)
    assert engine.buffer.save(gathered, chain("a", 3)) == kv.SaveResult(saved=3)
    landed = bytearray(3 * BLOCK)
    assert engine.client.load(chain("a", 3), landed).blocks == 3
    assert bytes(landed) == b"".join(saved)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


def test_a_save_waits_for_the_kernel_and_the_engine_for_nothing(engine: Engine) -> None:
    gate = threading.Event()
    engine.stop_at(gate)
    gathered = engine.buffer.gather(engine.mover, [0, 1])
    assert gathered is not None
    results: list[kv.SaveResult] = []
    saving = threading.Thread(target=lambda: results.append(engine.buffer.save(gathered, chain("a", 2))))
    saving.start()
    assert engine.client.lookup(chain("a", 2)).blocks == 0
    gate.set()
    saving.join(30.0)
    assert results == [kv.SaveResult(saved=2)]


def test_there_is_no_room_for_more_than_the_buffer_has_and_some_again_after_saving(engine: Engine) -> None:
    first = engine.buffer.gather(engine.mover, range(BUFFER_BLOCKS - 2))
    assert first is not None
    assert engine.buffer.gather(engine.mover, [0, 1, 2]) is None
    second = engine.buffer.gather(engine.mover, [30, 31])
    assert second is not None
    assert engine.buffer.free_blocks == 0
    assert engine.buffer.gather(engine.mover, [0]) is None
    assert engine.buffer.gather(engine.mover, range(BUFFER_BLOCKS + 1)) is None
    assert engine.buffer.save(second, chain("b", 2)).saved == 2
    assert engine.buffer.save(first, chain("a", BUFFER_BLOCKS - 2)).saved == BUFFER_BLOCKS - 2
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


def test_what_is_not_saved_after_all_gives_its_room_back_once_the_kernel_has_run(engine: Engine) -> None:
    gate = threading.Event()
    engine.stop_at(gate)
    gathered = engine.buffer.gather(engine.mover, [0, 1])
    assert gathered is not None
    engine.buffer.discard(gathered)
    engine.buffer.discard(gathered)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS - 2, "a kernel is still to write there"
    gate.set()
    engine.synchronize()
    assert engine.buffer.free_blocks == BUFFER_BLOCKS
    with pytest.raises(kv.InvalidRequest, match="saved or discarded before"):
        engine.buffer.save(gathered, chain("a", 2))


def test_blocks_are_saved_once(engine: Engine) -> None:
    gathered = engine.buffer.gather(engine.mover, [0, 1])
    assert gathered is not None
    assert engine.buffer.save(gathered, chain("a", 2)).saved == 2
    with pytest.raises(kv.InvalidRequest, match="saved or discarded before"):
        engine.buffer.save(gathered, chain("b", 2))
    assert engine.client.lookup(chain("b", 2)).blocks == 0


def test_forgotten_blocks_give_their_room_back(engine: Engine) -> None:
    gathered = engine.buffer.gather(engine.mover, [0, 1])
    assert gathered is not None
    engine.synchronize()
    assert engine.buffer.free_blocks == BUFFER_BLOCKS - 2
    del gathered
    gc.collect()
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


def test_parts_of_one_gather_are_saved_apart_and_the_room_comes_back_with_the_last(engine: Engine) -> None:
    saved = engine.blocks(range(5))
    gathered = engine.buffer.gather(engine.mover, range(5))
    assert gathered is not None
    with pytest.raises(kv.InvalidRequest, match=r"parts of \[2, 2\] blocks of 5"):
        gathered.split([2, 2])
    first, nothing, second, third = gathered.split([2, 0, 1, 2])
    with pytest.raises(kv.InvalidRequest, match="saved or discarded before"):
        engine.buffer.save(gathered, chain("a", 5))
    assert engine.buffer.save(third, chain("c", 2)).saved == 2
    assert engine.buffer.save(nothing, []) == kv.SaveResult()
    engine.buffer.discard(second)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS - 5
    assert engine.buffer.save(first, chain("a", 2)).saved == 2
    assert engine.buffer.free_blocks == BUFFER_BLOCKS
    for name, expected in (("a", saved[:2]), ("c", saved[3:])):
        landed = bytearray(2 * BLOCK)
        assert engine.client.load(chain(name, 2), landed).blocks == 2
        assert bytes(landed) == b"".join(expected)


def test_a_save_whose_hashes_do_not_fit_is_refused_and_gives_its_room_back(engine: Engine) -> None:
    for hashes in (chain("a", 3), [b"short"] * 2):
        gathered = engine.buffer.gather(engine.mover, [0, 1])
        assert gathered is not None
        with pytest.raises(kv.InvalidRequest):
            engine.buffer.save(gathered, hashes)
        engine.synchronize()
        assert engine.buffer.free_blocks == BUFFER_BLOCKS
    with pytest.raises(kv.InvalidRequest, match="no blocks to gather"):
        engine.buffer.gather(engine.mover, [])


def test_a_kernel_that_cannot_be_launched_saves_nothing_and_loses_no_room(engine: Engine) -> None:
    engine.mover.error = RuntimeError("no such kernel")
    assert engine.buffer.gather(engine.mover, [0, 1]) is None
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)


def test_without_a_daemon_a_save_is_refused(engine: Engine) -> None:
    gathered = engine.buffer.gather(engine.mover, [0, 1])
    assert gathered is not None
    engine.client.close()
    result = engine.buffer.save(gathered, chain("a", 2))
    assert (result.refused, result.reason) == (2, Reason.CLOSED)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS
