"""Loads ahead: blocks wait in the buffer until it is known where they go, and nobody takes their room."""

from __future__ import annotations

import pytest

import kvservice_client as kv
from kvservice_client import InvalidRequest, Reason
from tests.blocks import chain
from tests.devices import FakeGpu
from tests.integration.test_hbm_buffer.conftest import BUFFER_BLOCKS, LAYERS, Engine, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration

SOURCES = [3, 14, 15, 9, 0]
PLACES = [1, 25, 2, 7, 38]


@pytest.mark.parametrize("exportable", [True, False])
def test_blocks_wait_in_the_buffer_and_then_go_where_they_are_told(
    make_engine: MakeEngine, *, exportable: bool
) -> None:
    engine = make_engine(exportable=exportable)
    saved = engine.blocks(SOURCES)
    engine.save(chain("a", 5), SOURCES)
    engine.save(chain("b", 6), [20, 21, 22, 23, 24, 26])
    engine.fill(seed=1)
    before = engine.blocks(range(40))
    ahead = engine.buffer.load_ahead(chain("a", 6))
    assert ahead is not None
    assert ahead.blocks == 5
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS - 5)
    # Others' loads do not push it out, though the buffer is too small for them as a whole.
    assert engine.buffer.load(chain("b", 6), engine.mover, [30, 31, 32, 33, 34, 35]).finish() == kv.LoadResult(6)
    assert engine.blocks(range(30)) == before[:30]
    assert not ahead.has_failed
    with pytest.raises(InvalidRequest, match="4 block ids for 5 blocks"):
        ahead.into(engine.mover, PLACES[:4])
    load = ahead.into(engine.mover, PLACES)
    assert (load.blocks, load.reason) == (5, Reason.NOT_HELD)
    for layer in range(LAYERS):
        load.wait_layer(layer, engine.stream)
    engine.synchronize()
    assert load.finish() == kv.LoadResult(5, Reason.NOT_HELD)
    assert engine.blocks(PLACES) == saved
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


def test_what_is_not_needed_or_has_no_room_takes_none(engine: Engine, gpu: FakeGpu) -> None:
    engine.save(chain("a", 5), SOURCES)
    assert engine.buffer.load_ahead(chain("a", BUFFER_BLOCKS + 1)) is None
    assert engine.buffer.load_ahead([]) is None
    first = engine.buffer.load_ahead(chain("a", 5))
    assert first is not None
    assert engine.buffer.load_ahead(chain("a", 5)) is None, "three blocks are left"
    first.cancel()
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    forgotten = engine.buffer.load_ahead(chain("a", 5))
    del forgotten
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    nothing = engine.buffer.load_ahead(chain("nobody has this", 2))
    assert nothing is not None
    assert (nothing.blocks, engine.buffer.free_blocks) == (0, BUFFER_BLOCKS)
    with gpu.held():
        late = engine.buffer.load_ahead(chain("a", 5), deadline_s=0.2)
        assert late is not None
        eventually(lambda: late.has_failed)
    assert late.into(engine.mover, PLACES).finish().blocks == 0


def test_a_closed_buffer_loads_nothing_ahead(engine: Engine) -> None:
    engine.save(chain("a", 5), SOURCES)
    ahead = engine.buffer.load_ahead(chain("a", 5))
    assert ahead is not None
    engine.buffer.close()
    assert engine.buffer.load_ahead(chain("a", 5)) is None
    assert ahead.into(engine.mover, PLACES).finish() == kv.LoadResult(0, Reason.CLOSED)
