"""What clients may ask of the device plane: caches to register, places to copy to; all of it bounded and checked."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack

import pytest

import kvservice_client as kv
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain
from tests.daemons import DaemonThread
from tests.devices import UUID, FakeGpu
from tests.integration.test_device_plane.conftest import BLOCK, BLOCKS, LAYERS, PIECE, Engine, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration


def request_of(engine: Engine) -> pb.RegisterDeviceRequest:
    start = engine.layers[0]
    request = pb.RegisterDeviceRequest(namespace_id=1, device_uuid=UUID, blocks=BLOCKS)
    request.regions.add(ipc_handle=start.to_bytes(64, "little"), offset_bytes=0, size_bytes=2 * BLOCKS * PIECE)
    for number in range(2 * LAYERS):
        request.pieces.add(offset_bytes=0, block_stride_bytes=PIECE, size_bytes=PIECE, layer=number // 2)
    return request


def register(engine: Engine, request: pb.RegisterDeviceRequest) -> pb.RegisterDeviceResponse:
    link = engine.client.link
    response: pb.RegisterDeviceResponse = link.call("RegisterDevice", request, 5.0)
    return response


WRONG: dict[str, Callable[[pb.RegisterDeviceRequest], object]] = {
    "ends at byte": lambda request: setattr(request.regions[0], "size_bytes", 1 << 40),
    "must be 1 to 2147483648": lambda request: setattr(request, "blocks", 0),
    "of the last block ends": lambda request: setattr(request, "blocks", 1_000_000),
    "in region 7": lambda request: setattr(request.pieces[1], "region", 7),
    "bytes apart": lambda request: setattr(request.pieces[1], "block_stride_bytes", PIECE - 1),
    "layer 5000": lambda request: setattr(request.pieces[1], "layer", 5000),
    "a block of the namespace": lambda request: request.pieces.pop(),
    "has 3 bytes, not 16": lambda request: setattr(request, "device_uuid", b"abc"),
    "has 2 bytes, not 64": lambda request: setattr(request.regions[0], "ipc_handle", b"ab"),
    "opens nothing": lambda request: setattr(request.regions[0], "ipc_handle", bytes(64)),
    "does not see the GPU": lambda request: setattr(request, "device_uuid", bytes(16)),
    "pieces is 0": lambda request: request.ClearField("pieces"),
    "0 regions": lambda request: request.ClearField("regions"),
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_cache_that_does_not_fit_is_refused_and_nothing_stays_open(
    make_engine: MakeEngine, gpu: FakeGpu, problem: str
) -> None:
    engine = make_engine()
    opened = len(gpu.opened)
    pinned = len(gpu.pinned)
    assert register(engine, request_of(engine)).registration_id
    request = request_of(engine)
    WRONG[problem](request)
    with pytest.raises(kv.InvalidRequest, match=problem):
        register(engine, request)
    assert len(gpu.opened) == opened + 1
    assert len(gpu.pinned) == pinned + 1


@pytest.mark.parametrize("method", ["Get", "Load"])
@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"registration_id": 1}, kv.LeaseUnknown, "register again"),
        ({"block_ids": [BLOCKS, 0]}, kv.InvalidRequest, "16 blocks are registered"),
        ({"block_ids": [0]}, kv.InvalidRequest, "1 block ids for 2 hashes"),
        ({"packed_block_ids": pack("<3I", 0, 1, 2)}, kv.InvalidRequest, "3 block ids for 2 hashes"),
        ({"packed_block_ids": pack("<2I", 0, BLOCKS)}, kv.InvalidRequest, "16 blocks are registered"),
        ({"packed_block_ids": bytes(7)}, kv.InvalidRequest, "7 bytes are not 32-bit block ids"),
        ({"lane": 256}, kv.InvalidRequest, "lane is 256"),
        ({"sequence": 0}, kv.InvalidRequest, "sequence is 0"),
        ({"sequence": 1 << 50}, kv.InvalidRequest, "sequence is"),
    ],
)
def test_a_read_into_places_that_were_not_registered_is_refused_and_grants_nothing(
    make_engine: MakeEngine,
    daemon: DaemonThread,
    method: str,
    change: dict[str, object],
    error: type[Exception],
    problem: str,
) -> None:
    engine = make_engine()
    engine.kv.save(chain("a", 2), [0, 1])
    registered = register(engine, request_of(engine)).registration_id
    fields = {"registration_id": registered, "block_ids": [0, 1], "lane": 0, "sequence": 1} | change
    device = pb.DeviceBlocks(**fields)  # type: ignore[arg-type]
    hashes, link = b"".join(chain("a", 2)), engine.client.link
    read: dict[str, Callable[[], object]] = {
        "Get": lambda: list(link.get(pb.GetRequest(namespace_id=1, hashes=hashes, device=device), 5.0)),
        "Load": lambda: link.load(pb.LoadRequest(namespace_id=1, hashes=hashes, device=device), 5.0),
    }
    with pytest.raises(error, match=problem):
        read[method]()
    assert daemon.holds() == (0, 0, 0)


def test_a_get_that_names_places_copies_as_a_load_does(make_engine: MakeEngine, daemon: DaemonThread) -> None:
    engine = make_engine()
    engine.kv.save(chain("a", 2), [0, 1])
    request = pb.GetRequest(namespace_id=1, hashes=b"".join(chain("a", 3)))
    request.device.registration_id = register(engine, request_of(engine)).registration_id
    request.device.block_ids.extend([5, 6, 7])
    request.device.sequence = 1
    before = engine.gpu.copied_bytes
    (response,) = engine.client.link.get(request, 5.0)
    outcomes = [(run.blocks, run.WhichOneof("outcome")) for run in response.runs]
    assert outcomes == [(2, "handles"), (1, "miss")]
    assert (response.lease_id, response.runs[0].handles.WhichOneof("plane")) == (0, "device")
    eventually(lambda: engine.gpu.copied_bytes == before + 2 * BLOCK)
    eventually(lambda: daemon.holds() == (0, 0, 0))


def test_a_load_says_how_much_comes_why_not_more_and_is_counted(make_engine: MakeEngine, daemon: DaemonThread) -> None:
    engine = make_engine()
    engine.kv.save(chain("a", 2), [0, 1])
    assert engine.kv.load(chain("a", 4), [4, 5, 6, 7]).result() == kv.LoadResult(2, kv.Reason.NOT_HELD)
    assert engine.kv.load(chain("b", 2), [4, 5]).result() == kv.LoadResult(0, kv.Reason.NOT_HELD)
    assert engine.kv.load(chain("a", 2), [4, 5]).result() == kv.LoadResult(2)
    (counted,) = engine.client.stats().namespaces
    assert (counted.requested_blocks, counted.dram_hit_blocks, counted.miss_blocks) == (8, 4, 4)
    registry = daemon.daemon.metrics.registry
    missed = {
        reason: registry.get_sample_value("kvservice_block_requests_total", {"outcome": "miss", "reason": reason})
        for reason in ("not_held", "prefix_missing")
    }
    assert missed == {"not_held": 2, "prefix_missing": 2}


def test_another_instance_s_registration_is_unknown(make_engine: MakeEngine) -> None:
    first, second = make_engine(), make_engine()
    registered = register(first, request_of(first)).registration_id
    request = pb.UnregisterDeviceRequest(registration_id=registered)
    with pytest.raises(kv.LeaseUnknown):
        second.client.link.call("UnregisterDevice", request, 5.0)
    first.client.link.call("UnregisterDevice", request, 5.0)


def test_registrations_per_instance_are_bounded(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for _ in range(15):
        register(engine, request_of(engine))
    with pytest.raises(kv.Overloaded, match="16 KV caches"):
        register(engine, request_of(engine))
