"""A buffer that is full: who makes room for whom, and who does without."""

from __future__ import annotations

import random
import threading

import pytest

import kvservice_client as kv
from kvservice_adapters.gpu import room
from kvservice_client import Reason
from tests.blocks import chain
from tests.devices import FakeGpu
from tests.integration.test_hbm_buffer.conftest import BUFFER_BLOCKS, CACHE_BLOCKS, LAYERS, Engine, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is waited for until the load's deadline."""
    monkeypatch.setattr(room, "_WAIT_S", 60.0)


@pytest.mark.usefixtures("every_layer_alone", "patient")
@pytest.mark.parametrize("waited", [0, 2])
def test_loads_that_no_stream_has_come_to_are_finished_for_their_room(engine: Engine, waited: int) -> None:
    first, second = list(range(BUFFER_BLOCKS)), list(range(10, 10 + BUFFER_BLOCKS))
    saved = engine.blocks([*first, *second])
    engine.save(chain("a", BUFFER_BLOCKS), first)
    engine.save(chain("b", BUFFER_BLOCKS), second)
    engine.fill(seed=1)
    early = engine.buffer.load(chain("a", BUFFER_BLOCKS), engine.mover, first)
    for layer in range(waited):
        early.wait_layer(layer, engine.stream)
    # The same thread is to go on with the first: it cannot wait here for itself.
    late = engine.buffer.load(chain("b", BUFFER_BLOCKS), engine.mover, second)
    assert (early.blocks, late.blocks) == (BUFFER_BLOCKS, BUFFER_BLOCKS)
    for layer in range(LAYERS):
        early.wait_layer(layer, engine.stream)
        late.wait_layer(layer, engine.stream)
    engine.synchronize()
    assert engine.blocks([*first, *second]) == saved
    assert (early.finish().blocks, late.finish().blocks) == (BUFFER_BLOCKS, BUFFER_BLOCKS)


@pytest.mark.usefixtures("patient")
def test_a_load_waits_for_room_that_a_save_gives_back(engine: Engine) -> None:
    saved = engine.blocks([0, 1, 2])
    engine.save(chain("a", 3), [0, 1, 2])
    gathered = engine.buffer.gather(engine.mover, range(BUFFER_BLOCKS))
    assert gathered is not None
    loads = []
    loading = threading.Thread(
        target=lambda: loads.append(engine.buffer.load(chain("a", 3), engine.mover, [20, 21, 22]))
    )
    loading.start()
    assert engine.buffer.save(gathered, chain("b", BUFFER_BLOCKS)).saved == BUFFER_BLOCKS
    loading.join(30.0)
    assert loads[0].finish().blocks == 3
    assert engine.blocks([20, 21, 22]) == saved


@pytest.mark.usefixtures("patient")
def test_nobody_waits_for_room_that_a_late_daemon_has(engine: Engine, gpu: FakeGpu) -> None:
    engine.save(chain("a", BUFFER_BLOCKS), range(BUFFER_BLOCKS))
    with gpu.held():
        late = engine.buffer.load(chain("a", BUFFER_BLOCKS), engine.mover, range(BUFFER_BLOCKS))
        late.cancel()
        assert engine.buffer.free_blocks == 0
        load = engine.buffer.load(chain("a", 3), engine.mover, [20, 21, 22])
        assert (load.blocks, load.reason) == (0, Reason.OVERLOADED)
        assert engine.buffer.gather(engine.mover, [0]) is None
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    assert engine.buffer.load(chain("a", 3), engine.mover, [20, 21, 22]).finish().blocks == 3


def test_a_buffer_that_stays_full_is_a_miss(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_WAIT_S", 0.05)
    engine.save(chain("a", 3), [0, 1, 2])
    gathered = engine.buffer.gather(engine.mover, range(BUFFER_BLOCKS))
    assert gathered is not None
    load = engine.buffer.load(chain("a", 3), engine.mover, [20, 21, 22])
    assert load.finish() == kv.LoadResult(0, Reason.OVERLOADED)
    engine.buffer.discard(gathered)


def test_what_a_get_did_not_find_takes_no_room(engine: Engine) -> None:
    engine.save(chain("a", 3), [0, 1, 2])
    gate = threading.Event()
    load = engine.buffer.load(chain("a", BUFFER_BLOCKS), engine.mover, range(20, 20 + BUFFER_BLOCKS))
    engine.stop_at(gate)
    assert load.blocks == 3
    assert engine.buffer.free_blocks == BUFFER_BLOCKS - 3
    gathered = engine.buffer.gather(engine.mover, range(BUFFER_BLOCKS - 3))
    assert gathered is not None
    gate.set()
    assert load.finish().blocks == 3
    engine.buffer.discard(gathered)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("patient")
def test_many_threads_get_their_own_blocks_and_nobody_else_s(make_engine: MakeEngine) -> None:
    """Every thread has blocks of the cache of its own, saves them, spoils them, and loads them again."""
    engine = make_engine()
    threads, rounds, own = 4, 60, CACHE_BLOCKS // 4
    wrong: list[str] = []

    def work(number: int) -> None:
        choose = random.Random(number)
        context = engine.gpu.driver.context(0)
        stream = context.stream()
        mine = list(range(number * own, (number + 1) * own))
        for turn in range(rounds):
            blocks = choose.randint(1, own)
            ids = choose.sample(mine, blocks)
            hashes = chain(f"{number}/{turn}", blocks)
            with engine.streams.on(stream):
                gathered = engine.buffer.gather(engine.mover, ids[:BUFFER_BLOCKS])
                if gathered is None:
                    continue
                context.synchronize(stream)
                expected = engine.blocks(ids[: gathered.blocks])
                if engine.buffer.save(gathered, hashes[: gathered.blocks]).saved != gathered.blocks:
                    continue
                for of_layer in engine.parts:
                    for part in of_layer:
                        part[mine] = choose.randint(0, 255)
                places = choose.sample(mine, blocks)
                load = engine.buffer.load(hashes, engine.mover, places, deadline_s=60.0)
                if choose.random() < 0.2:
                    load.cancel()
                    context.synchronize(stream)
                    continue
                for layer in range(choose.randint(0, LAYERS)):
                    load.wait_layer(layer, stream)
                result = load.finish(60.0)
                if engine.blocks(places[: result.blocks]) != expected[: result.blocks]:
                    wrong.append(f"thread {number}, turn {turn}: {result}")

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    assert wrong == []
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
