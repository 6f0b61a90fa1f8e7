"""Loads of a part of a chain, and of blocks that moved: on both planes, and with a daemon that is too old."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import pytest

import kvservice_client as kv
from kvservice.service import devices
from kvservice_client import Reason
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain
from tests.devices import FakeGpu
from tests.integration.test_device_plane.conftest import BLOCKS, Engine, MakeEngine

pytestmark = pytest.mark.integration

PLANES = pytest.mark.parametrize(("exportable", "plane"), [(True, "cuda-ipc"), (False, "mapped")])
TOKENS = 16
OLD = chain("a", 8)
SOURCES = [3, 4, 5, 9, 0, 1, 2, 6]
KEPT = [0, 5, 6, 7]
"""Of the old chain, the blocks that stay: the first, and the last three four places further to the front."""
SHIFTS = (0, *[-4 * TOKENS] * 3)


def salted(hashes: Sequence[bytes]) -> list[bytes]:
    return [sha256(b"talk" + block_hash).digest() for block_hash in hashes]


NEW = salted([OLD[place] for place in KEPT])


def overflow(engine: Engine) -> list[bytes]:
    """Save a conversation and truncate it; the bytes of the blocks that stay."""
    assert engine.kv.save(OLD, SOURCES, session_id="talk").saved == 8
    kept = [engine.block(SOURCES[place]) for place in KEPT]
    assert engine.client.truncate("talk", NEW, drop_ratio=0.5, sink_blocks=1).held_blocks == 4
    engine.fill(seed=1)
    return kept


@PLANES
def test_blocks_that_moved_come_with_their_shifts(make_engine: MakeEngine, *, exportable: bool, plane: str) -> None:
    engine = make_engine(exportable=exportable)
    assert engine.kv.plane.name == plane
    kept = overflow(engine)
    load = engine.kv.load(NEW, [8, 9, 10, 11], session_id="talk", accepts_shifts=True)
    assert (load.blocks, load.reason, load.shifts) == (4, Reason.OK, SHIFTS)
    assert load.shifted == (kv.ShiftedBlocks(1, 3, -4 * TOKENS),)
    assert load.result() == kv.LoadResult(4, Reason.OK, load.shifted)
    assert engine.blocks([8, 9, 10, 11]) == kept


@PLANES
def test_blocks_that_moved_are_misses_for_who_does_not_turn_them(
    make_engine: MakeEngine, *, exportable: bool, plane: str
) -> None:
    engine = make_engine(exportable=exportable)
    overflow(engine)
    before = engine.blocks([8, 9, 10, 11])
    for session_id, accepts_shifts in (("talk", False), ("other", True), ("", True)):
        load = engine.kv.load(NEW, [8, 9, 10, 11], session_id=session_id, accepts_shifts=accepts_shifts)
        assert (load.blocks, load.reason, load.shifts) == (0, Reason.OTHER_SESSION, ())
    assert engine.blocks([8, 9, 10, 11]) == before


@PLANES
def test_a_part_of_a_chain_is_loaded_from_its_place_on(
    make_engine: MakeEngine, *, exportable: bool, plane: str
) -> None:
    engine = make_engine(exportable=exportable)
    kept = overflow(engine)
    untouched = [block_id for block_id in range(16) if block_id not in (8, 9)]
    before = engine.blocks(untouched)
    # One more than is held: the load ends where the chain does.
    load = engine.kv.load(
        [*NEW, *chain("b", 1)], [8, 9, 10], first=2, session_id="talk", accepts_shifts=True, wait_s=1.0
    )
    assert (load.blocks, load.reason, load.shifts) == (2, Reason.NOT_HELD, SHIFTS[2:])
    assert load.result() == kv.LoadResult(2, Reason.NOT_HELD, (kv.ShiftedBlocks(0, 2, -4 * TOKENS),))
    assert engine.blocks([8, 9]) == kept[2:]
    assert engine.blocks(untouched) == before


@PLANES
def test_a_part_that_begins_behind_what_is_held_is_a_miss(
    make_engine: MakeEngine, gpu: FakeGpu, *, exportable: bool, plane: str
) -> None:
    engine = make_engine(exportable=exportable)
    engine.kv.save(chain("a", 2), [0, 1])
    queued = gpu.queued_copies
    for first in (2, 3):
        load = engine.kv.load(chain("a", 5), range(5 - first), first=first)
        assert (load.blocks, load.reason) == (0, Reason.NOT_HELD)
        assert load.is_quiet
    assert engine.kv.load(chain("a", 2), [], first=2).blocks == 0
    assert gpu.queued_copies == queued
    assert engine.kv.transfers_under_way == 0


def test_block_ids_are_those_from_the_first_on(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for block_ids, first in (([1, 2], 2), ([1], 4), ([1], -1), ([1, 2, 3, 4], -1)):
        with pytest.raises(kv.InvalidRequest, match="hashes from place"):
            engine.kv.load(chain("a", 3), block_ids, first=first)


@pytest.mark.parametrize(
    "block_ids", [[BLOCKS, 1], [1, -1], range(-1, 1), range(BLOCKS - 1, BLOCKS + 1), range(0, -2, -1)]
)
def test_block_ids_outside_the_cache_are_refused(make_engine: MakeEngine, block_ids: Sequence[int]) -> None:
    engine = make_engine()
    with pytest.raises(kv.InvalidRequest, match="the cache has 16 blocks"):
        engine.kv.load(chain("a", 2), block_ids)
    with pytest.raises(kv.InvalidRequest, match="the cache has 16 blocks"):
        engine.kv.save(chain("a", 2), block_ids)
    assert engine.kv.save(chain("a", 2), range(BLOCKS - 1, BLOCKS - 3, -1)).saved == 2


@pytest.mark.parametrize("revision", [0, 1, 2])
def test_with_a_daemon_that_is_too_old_the_client_copies_itself(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, revision: int
) -> None:
    monkeypatch.setattr(devices, "_REVISION", revision)
    engine = make_engine()
    assert engine.kv.plane.name == "mapped"
    assert "is too old" in engine.kv.plane.why
    assert not engine.client.stats().devices[0].registrations
    overflow(engine)
    load = engine.kv.load(NEW, [8, 9, 10, 11], session_id="talk", accepts_shifts=True)
    assert load.result().blocks == 4
    assert load.shifts == SHIFTS


@pytest.mark.parametrize(
    ("call", "device", "problem"),
    [
        ("Get", {"first": 1, "block_ids": [0, 1]}, "2 block ids for 1 hashes"),
        ("Get", {"first": 5, "block_ids": []}, "0 block ids for -3 hashes"),
        ("Put", {"first": 1, "block_ids": [0]}, "`first` is a Get's"),
    ],
)
def test_places_that_do_not_fit_the_chain_are_refused(
    make_engine: MakeEngine, call: str, device: dict[str, Any], problem: str
) -> None:
    engine = make_engine()
    ipc, link = engine.kv._ipc, engine.client.link
    assert ipc is not None
    places = pb.DeviceBlocks(registration_id=ipc._registration_id, lane=0, sequence=1, **device)
    hashes = b"".join(chain("a", 2))
    with pytest.raises(kv.InvalidRequest, match=problem):  # noqa: PT012  # one of two calls
        if call == "Get":
            list(link.get(pb.GetRequest(namespace_id=1, hashes=hashes, device=places), 5.0))
        else:
            link.put(pb.PutRequest(namespace_id=1, hashes=hashes, device=places), 5.0)
