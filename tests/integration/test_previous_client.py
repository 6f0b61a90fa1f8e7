"""A client of the released contract, knowing nothing of what came later, works against today's daemon."""

from __future__ import annotations

import grpc
import pytest

from tests.blocks import chain, content, namespace
from tests.daemons import DaemonProcess, DaemonThread
from tests.integration.conftest import MakeClient, MakeEngine
from tests.integration.released_client import ReleasedClient
from tests.waiting import eventually

pytestmark = pytest.mark.integration

SIZE_BYTES = 5000
OF = namespace("shared with new clients", block_size_bytes=SIZE_BYTES)


def attach(client: ReleasedClient) -> None:
    welcome = client.attach(
        fingerprint=OF.fingerprint,
        label=OF.label,
        block_size_bytes=OF.block_size_bytes,
        tokens_per_block=OF.tokens_per_block,
        hash_size_bytes=OF.hash_size_bytes,
    )
    assert welcome.protocol_version == 1
    assert list(welcome.namespace_ids) == [1]
    assert welcome.limits.hashes_per_call_max > 0
    assert welcome.segment_ids
    assert client.ping() == "pong"


def save(client: ReleasedClient, name: str, blocks: int) -> None:
    hashes = chain(name, blocks)
    reserved = client.call("Put", namespace_id=1, hashes=b"".join(hashes), session_id="talk", request_id="r1")
    position = 0
    for run in reserved.runs:
        assert run.WhichOneof("outcome") == "reserved"
        for view in client.slots(run.reserved.shared_memory, SIZE_BYTES):
            view[:] = content(hashes[position], SIZE_BYTES)
            view.release()
            position += 1
    assert position == blocks
    renewed = client.call("Renew", reservation_ids=[reserved.reservation_id], lease_ms=5000)
    assert renewed.lease_ms == 5000
    committed = client.call("Commit", reservation_id=reserved.reservation_id)
    assert [(run.blocks, run.WhichOneof("outcome")) for run in committed.runs] == [(blocks, "published")]


def load(client: ReleasedClient, name: str, blocks: int) -> int:
    """Get, read in place, release; how many leading blocks were right."""
    hashes = chain(name, blocks)
    right = 0
    for response in client.call("Get", namespace_id=1, hashes=b"".join(hashes), request_id="r2"):
        for run in response.runs:
            if run.WhichOneof("outcome") != "handles":
                continue
            for view in client.slots(run.handles.shared_memory, SIZE_BYTES):
                assert view == content(hashes[right], SIZE_BYTES)
                view.release()
                right += 1
        if response.lease_id:
            assert client.call("Release", lease_ids=[response.lease_id]).released == 1
    return right


def test_a_client_of_the_released_contract_does_everything(daemon: DaemonProcess, make_client: MakeClient) -> None:
    with ReleasedClient(daemon.socket_dir) as client:
        attach(client)
        save(client, "old", 7)
        looked = client.call("Lookup", namespace_id=1, hashes=b"".join(chain("old", 9)))
        assert looked.hit_blocks == 7
        assert [(run.blocks, run.WhichOneof("outcome")) for run in looked.runs] == [
            (7, "held"),
            (1, "miss"),
            (1, "miss"),
        ]
        assert looked.runs[1].miss == client.contract.value("MissReason", "MISS_REASON_NOT_HELD")
        assert load(client, "old", 9) == 7
        # What it saved a client of today loads, and the other way round.
        today = make_client(daemon.socket_dir, OF)
        destination = bytearray(7 * SIZE_BYTES)
        assert today.load(chain("old", 7), destination).blocks == 7
        assert destination == b"".join(content(block_hash, SIZE_BYTES) for block_hash in chain("old", 7))
        source = [content(block_hash, SIZE_BYTES) for block_hash in chain("new", 3)]
        assert today.save(chain("new", 3), source).saved == 3
        assert load(client, "new", 3) == 3
        # Putting what is there reserves nothing.
        again = client.call("Put", namespace_id=1, hashes=b"".join(chain("new", 3)))
        assert (again.reservation_id, again.runs[0].WhichOneof("outcome")) == (0, "held")
        orphan = client.call("Put", namespace_id=1, parent=b"\1" * 32, hashes=chain("orphan", 1)[0])
        assert orphan.runs[0].WhichOneof("outcome") == "refused"
        given_up = client.call("Put", namespace_id=1, hashes=chain("given up", 1)[0])
        assert not client.call("Abort", reservation_id=given_up.reservation_id).expired
        assert (
            client.call("Prefetch", namespace_id=1, hashes=chain("old", 1)[0]).runs[0].WhichOneof("outcome") == "held"
        )
        found = client.call("Explain", hash=chain("old", 7)[3]).explanations[0]
        assert (found.label, found.WhichOneof("finding"), found.held.depth) == (OF.label, "held", 3)
        stats = client.call("Stats")
        assert stats.state == "serving"
        (of,) = stats.namespaces
        assert (of.blocks, of.committed_blocks, of.dram_hit_blocks + of.miss_blocks) == (10, 10, of.requested_blocks)
        assert "an engine of last year" in {instance.name for instance in stats.attached_instances}
        forgotten = client.call("Forget", namespace_id=1, session_id="talk")
        assert forgotten.blocks_dropped == 7
        assert client.call("Forget", namespace_id=1, whole_namespace=client.new("WholeNamespace")).blocks_dropped == 3
    assert not daemon.errors


def test_its_errors_come_in_the_words_that_it_knows(daemon: DaemonProcess) -> None:
    with ReleasedClient(daemon.socket_dir) as client:
        attach(client)
        for method, fields, reason in (
            ("Put", {"namespace_id": 1, "hashes": b"short"}, "ERROR_REASON_INVALID_REQUEST"),
            ("Lookup", {"namespace_id": 9, "hashes": bytes(32)}, "ERROR_REASON_NAMESPACE_UNKNOWN"),
            ("Commit", {"reservation_id": 9}, "ERROR_REASON_LEASE_UNKNOWN"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                client.call(method, **fields)
            metadata = {datum.key: datum.value for datum in caught.value.trailing_metadata() or ()}
            detail = client.contract.message("ErrorDetail").FromString(metadata["kvservice-error-bin"])
            assert detail.reason == client.contract.value("ErrorReason", reason)


def test_it_leaves_nothing_behind(daemon_thread: DaemonThread, make_engine: MakeEngine) -> None:
    with ReleasedClient(daemon_thread.socket_dir) as client:
        attach(client)
        save(client, "a", 3)
        client.call("Put", namespace_id=1, hashes=chain("half", 1)[0])
        client.call("Get", namespace_id=1, hashes=chain("a", 1)[0])
        assert daemon_thread.holds() == (1, 1, 0)
    daemon_thread.wait_no_instances()
    engine = make_engine(daemon_thread.socket_dir, OF)
    assert engine.do("load", name="a", blocks=3) == {"blocks": 3, "reason": "ok", "wrong": 0}
    eventually(lambda: engine.do("lookup", name="half", blocks=1)["blocks"] == 0)
