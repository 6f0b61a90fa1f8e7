"""Loads through the buffer: bit by bit into a cache of small pieces, layer by layer, behind the engine's stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from hashlib import sha256

import pytest
import torch

import kvservice_client as kv
from kvservice_adapters.gpu import loads
from kvservice_adapters.positions import Rope, moved
from kvservice_client import Reason
from tests.blocks import chain
from tests.devices import FakeGpu
from tests.integration.test_hbm_buffer.conftest import (
    BUFFER_BLOCKS,
    CACHE_BLOCKS,
    HEAD_DIM,
    KEYS,
    LAYERS,
    TOKENS,
    VALUES,
    Engine,
    MakeEngine,
)
from tests.waiting import eventually

pytestmark = pytest.mark.integration

SOURCES = [3, 14, 15, 9, 0]
PLACES = [1, 25, 2, 7, 38]


@pytest.mark.parametrize(("exportable", "plane"), [(True, "cuda-ipc"), (False, "mapped")])
def test_blocks_come_back_bit_by_bit_to_other_places(make_engine: MakeEngine, *, exportable: bool, plane: str) -> None:
    engine = make_engine(exportable=exportable)
    assert engine.buffer.plane.name == plane
    assert engine.buffer.blocks == BUFFER_BLOCKS
    saved = engine.blocks(SOURCES)
    engine.save(chain("a", 5), SOURCES)
    engine.fill(seed=1)
    others = [number for number in range(CACHE_BLOCKS) if number not in PLACES]
    before = engine.blocks(others)
    load = engine.buffer.load(chain("a", 6), engine.mover, [*PLACES, 12])
    assert (load.blocks, load.reason, load.shifts) == (5, Reason.NOT_HELD, (0,) * 5)
    for layer in range(LAYERS):
        load.wait_layer(layer, engine.stream)
    engine.synchronize()
    assert engine.blocks(PLACES) == saved
    assert load.finish() == kv.LoadResult(5, Reason.NOT_HELD)
    assert not load.has_failed
    assert engine.blocks(others) == before
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


@pytest.mark.usefixtures("every_layer_alone")
def test_a_stream_passes_a_layer_when_it_is_in_the_cache_and_the_call_waits_for_nothing(
    engine: Engine, gpu: FakeGpu
) -> None:
    saved = engine.blocks(SOURCES)
    engine.save(chain("a", 5), SOURCES)
    engine.fill(seed=1)
    seen: list[bool] = []

    def layer_is_there(layer: int) -> bool:
        size = KEYS + VALUES
        there = [engine.block(block_id, layer=layer) for block_id in PLACES]
        seen.append(there == [block[layer * size : (layer + 1) * size] for block in saved])
        return True

    with gpu.held():
        load = engine.buffer.load(chain("a", 5), engine.mover, PLACES)
        for layer in range(LAYERS):
            load.wait_layer(layer, engine.stream)
            gpu.queue(engine.stream, partial(layer_is_there, layer))
        assert engine.mover.launches == [(engine.stream, layer, layer + 1) for layer in range(LAYERS)]
        assert not load.has_failed
    engine.synchronize()
    assert seen == [True] * LAYERS


@pytest.mark.parametrize(
    ("layers_worth_it", "asked", "launched"),
    [
        (1, [0, 1, 2, 3], [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, [0, 1, 2, 3], [(0, 2), (2, 4)]),
        (3, [0, 1, 2, 3], [(0, 3), (3, 4)]),
        (9, [0, 1, 2, 3], [(0, 4)]),
        (1, [2, 0, 1, 3, 3, 7], [(0, 3), (3, 4)]),
        (2, [0, 3], [(0, 2), (2, 4)]),
        (2, [2], [(0, 3)]),
    ],
)
def test_small_layers_are_scattered_together_and_none_later_than_it_is_asked_for(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    layers_worth_it: int,
    asked: list[int],
    launched: list[tuple[int, int]],
) -> None:
    monkeypatch.setattr(loads, "_SCATTER_BYTES_MIN", layers_worth_it * (KEYS + VALUES) * 5)
    monkeypatch.setattr(loads, "_SCATTER_BYTES_MAX", layers_worth_it * (KEYS + VALUES) * 5)
    engine.save(chain("a", 5), SOURCES)
    load = engine.buffer.load(chain("a", 5), engine.mover, PLACES)
    for layer in asked:
        load.wait_layer(layer, engine.stream)
    assert [launch[1:] for launch in engine.mover.launches] == launched


def test_scatters_are_small_at_both_ends_and_few_between() -> None:
    mib = 1 << 20
    layers, groups = [32 * mib] * 32, []
    while layers:
        worth = loads.worth_bytes(32 * mib * (32 - len(layers)), sum(layers))
        groups.append(worth // (32 * mib))
        del layers[: groups[-1]]
    assert groups == [2, 2, 4, 4, 4, 4, 4, 4, 2, 2]
    # Where a layer is more than what is worth it, it is one layer each time.
    assert {loads.worth_bytes(done * mib, left * mib) for done, left in ((0, 4096), (4096, 0))} == {64 * mib}
    assert loads.worth_bytes(2048 * mib, 2048 * mib) == 128 * mib


@pytest.mark.usefixtures("every_layer_alone")
@pytest.mark.parametrize("waited", [0, 2, LAYERS])
def test_finish_scatters_what_no_stream_waited_for(engine: Engine, waited: int) -> None:
    saved = engine.blocks(SOURCES)
    engine.save(chain("a", 5), SOURCES)
    engine.fill(seed=1)
    load = engine.buffer.load(chain("a", 5), engine.mover, PLACES)
    for layer in range(waited):
        load.wait_layer(layer, engine.stream)
    assert load.finish() == kv.LoadResult(5, Reason.OK)
    assert engine.blocks(PLACES) == saved
    own = [launch[1:] for launch in engine.mover.launches if launch[0] != engine.stream]
    assert own == ([(waited, LAYERS)] if waited < LAYERS else [])
    # Again, and by a stream that comes late: nothing is left to do.
    launches = list(engine.mover.launches)
    load.wait_layer(LAYERS - 1, engine.stream)
    assert load.finish() == kv.LoadResult(5, Reason.OK)
    assert engine.mover.launches == launches


def test_finish_has_layers_scattered_while_others_are_on_the_bus(
    engine: Engine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "_LANDING_BYTES_MIN", 1)
    saved = engine.blocks(SOURCES)
    engine.save(chain("a", 5), SOURCES)
    engine.fill(seed=1)
    engine.mover.launches.clear()
    results: list[kv.LoadResult] = []
    with gpu.held():
        load = engine.buffer.load(chain("a", 5), engine.mover, PLACES)
        finishing = threading.Thread(target=lambda: results.append(load.finish()))
        finishing.start()
        eventually(lambda: [launch[1:] for launch in engine.mover.launches] == [(0, 1), (1, 2), (2, 3), (3, 4)])
        assert not results
    finishing.join()
    assert results == [kv.LoadResult(5, Reason.OK)]
    assert engine.blocks(PLACES) == saved


def test_finish_writes_no_block_that_the_engine_s_earlier_work_still_uses(engine: Engine) -> None:
    engine.save(chain("a", 5), SOURCES)
    engine.fill(seed=1)
    before = engine.blocks(PLACES)
    gate = threading.Event()
    seen: list[list[bytes]] = []
    engine.stop_at(gate)

    def look() -> bool:
        seen.append(engine.blocks(PLACES))
        return True

    engine.gpu.queue(engine.stream, look)
    load = engine.buffer.load(chain("a", 5), engine.mover, PLACES)
    finishing = threading.Thread(target=load.finish)
    finishing.start()
    # The bytes have come, and a scatter is queued behind what the engine's stream had to do when the load began.
    eventually(lambda: engine.mover.launches)
    gate.set()
    finishing.join(30.0)
    assert seen == [before]
    assert engine.blocks(PLACES) != before


def test_while_finish_scatters_a_stream_waits_for_it_and_cancel_too(engine: Engine) -> None:
    saved = engine.blocks(SOURCES)
    engine.save(chain("a", 5), SOURCES)
    engine.fill(seed=1)
    gate = threading.Event()
    seen: dict[str, bool] = {}

    def look() -> bool:
        seen["stream"] = engine.blocks(PLACES) == saved
        return True

    def cancel() -> None:
        load.cancel()
        seen["cancelled"] = engine.blocks(PLACES) == saved

    engine.stop_at(gate)
    load = engine.buffer.load(chain("a", 5), engine.mover, PLACES)
    finishing, cancelling = threading.Thread(target=load.finish), threading.Thread(target=cancel)
    finishing.start()
    eventually(lambda: engine.mover.launches and load._piece is not None and load._piece.load.is_quiet)
    other = engine.gpu.new_stream()
    load.wait_layer(0, other)
    engine.gpu.queue(other, look)
    cancelling.start()
    cancelling.join(0.1)
    gate.set()
    for thread in (finishing, cancelling):
        thread.join(30.0)
    engine.gpu.driver.context(0).synchronize(other)
    assert seen == {"stream": True, "cancelled": True}
    assert load.finish().blocks == 5, "it had arrived when it was cancelled"


def test_a_load_larger_than_the_buffer_comes_in_turn(engine: Engine) -> None:
    blocks = 3 * BUFFER_BLOCKS + 1
    sources, places = list(range(blocks)), list(reversed(range(blocks)))
    saved = engine.blocks(sources)
    engine.save(chain("a", blocks), sources)
    engine.fill(seed=1)
    load = engine.buffer.load(chain("a", blocks + 3), engine.mover, [*places, 30, 31, 32])
    assert (load.blocks, load.reason) == (blocks, Reason.NOT_HELD)
    for layer in range(LAYERS):
        load.wait_layer(layer, engine.stream)
    engine.synchronize()
    assert engine.blocks(places) == saved
    assert load.finish() == kv.LoadResult(blocks, Reason.NOT_HELD)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


def test_nothing_asked_for_and_nothing_held_are_nothing_to_wait_for(engine: Engine) -> None:
    nothing = engine.buffer.load([], engine.mover, [])
    missed = engine.buffer.load(chain("a", 3), engine.mover, [0, 1, 2])
    for load, reason in ((nothing, Reason.OK), (missed, Reason.NOT_HELD)):
        load.wait_layer(0, engine.stream)
        assert load.finish() == kv.LoadResult(0, reason)
        assert not load.has_failed
        load.cancel()
    assert engine.mover.launches == []
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


def test_blocks_whose_cache_is_another_one_are_refused(make_engine: MakeEngine, engine: Engine) -> None:
    other = make_engine()
    other.mover.layers = LAYERS + 1
    for call in (lambda: engine.buffer.load(chain("a", 1), other.mover, [0]),
                 lambda: engine.buffer.gather(other.mover, [0])):  # fmt: skip
        with pytest.raises(kv.InvalidRequest, match="a cache of 5 layers"):
            call()
    for block_ids, first_place in (([0, 1], 0), ([0], 2), ([0, 1], -1)):
        with pytest.raises(kv.InvalidRequest, match="hashes from place"):
            engine.buffer.load(chain("a", 1), engine.mover, block_ids, first_place=first_place)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


# ------------------------------------------------------------------ what moved

ROPE = Rope(tuple(10_000 ** (-pair / 3) for pair in range(3)))
OLD = chain("a", 8)
KEPT = [0, 5, 6, 7]
NEW = [sha256(b"talk" + OLD[place]).digest() for place in KEPT]
SHIFT = -4 * TOKENS


def overflow(engine: Engine) -> None:
    engine.save(OLD, list(range(8)), session_id="talk")
    assert engine.client.truncate("talk", NEW, drop_ratio=0.5, sink_blocks=1).held_blocks == 4


def turned_blocks(engine: Engine, sources: Sequence[int], first_place: int, shift: int) -> list[bytes]:
    """Those blocks as they must be at another place."""
    turned = []
    for position, source in enumerate(sources):
        now_at = torch.arange(TOKENS) + (first_place + position) * TOKENS
        parts = []
        for keys, values in engine.parts:
            floats = keys[source].clone().view(torch.float32).view(TOKENS, HEAD_DIM)
            parts += [moved(floats, ROPE, computed_at=now_at - shift, now_at=now_at).view(torch.uint8), values[source]]
        turned.append(b"".join(bytes(part.numpy()) for part in parts))
    return turned


@pytest.mark.parametrize("first_place", [0, 2])
@pytest.mark.parametrize("buffer_blocks", [BUFFER_BLOCKS, 2])
def test_keys_of_blocks_that_moved_are_turned_on_the_way(
    make_engine: MakeEngine, first_place: int, buffer_blocks: int
) -> None:
    saving, engine = make_engine(), make_engine(buffer_blocks=buffer_blocks)
    overflow(saving)
    expected = [saving.block(0), *turned_blocks(saving, [5, 6, 7], 1, SHIFT)][first_place:]
    places = [20, 21, 22, 23][first_place:]
    load = engine.buffer.load(
        NEW, engine.mover, places, session_id="talk", rope=ROPE, first_place=first_place, wait_s=1.0
    )
    assert load.shifts == (0, SHIFT, SHIFT, SHIFT)[first_place:]
    first = 1 if first_place == 0 else 0
    assert load.shifted == (kv.ShiftedBlocks(first, len(places) - first, SHIFT),)
    assert load.finish() == kv.LoadResult(len(places), Reason.OK, load.shifted)
    assert engine.blocks(places) == expected


def test_without_a_rope_blocks_that_moved_are_misses(engine: Engine) -> None:
    overflow(engine)
    load = engine.buffer.load(NEW, engine.mover, [20, 21, 22, 23], session_id="talk")
    assert (load.blocks, load.reason) == (0, Reason.OTHER_SESSION)
