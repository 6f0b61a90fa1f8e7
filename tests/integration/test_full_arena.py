"""Where no space can be made the call is told so, and nothing that was there is lost for it."""

from __future__ import annotations

import psutil
import pytest

import kvservice_client as kv
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, contents, namespace
from tests.daemons import MIB, DaemonThread
from tests.integration.books import Code, books, refused
from tests.integration.conftest import MakeClient, MakeConnection, MakeDaemon, MakeDaemonThread
from tests.waiting import eventually

pytestmark = pytest.mark.integration

CAPACITY = (Code.RESOURCE_EXHAUSTED, pb.ERROR_REASON_CAPACITY_EXHAUSTED)
QUOTA = (Code.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUOTA_EXCEEDED)

BLOCK_BYTES = 64 * 1024
ARENA_BLOCKS = 4 * MIB // BLOCK_BYTES
OF = namespace("blocks", block_size_bytes=BLOCK_BYTES)


@pytest.mark.parametrize("held_by", ["leases", "reservations", "quarantine"])
def test_a_full_arena_with_everything_in_use_refuses_and_loses_nothing(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, held_by: str
) -> None:
    daemon = make_daemon_thread(high_watermark=1.0, low_watermark=0.9)
    holder, other = (make_connection(daemon.socket_dir, OF) for _ in range(2))
    lease_ms = 50 if held_by == "quarantine" else 0
    if held_by == "reservations":
        reservation = holder.put(chain("a", ARENA_BLOCKS)).reservation_id
    else:
        holder.save(chain("a", ARENA_BLOCKS))
        lease = holder.get(chain("a", ARENA_BLOCKS), lease_ms=lease_ms).lease_id
    if held_by == "quarantine":
        eventually(lambda: daemon.holds() == (1, 0, ARENA_BLOCKS))
    before = books(daemon)
    for connection in (holder, other):
        refused(lambda c=connection: c.put(chain("b", 1)), *CAPACITY, says="in use")  # type: ignore[misc]  # bound now
        refused(lambda c=connection: c.put(chain("c", ARENA_BLOCKS + 1)), *CAPACITY)  # type: ignore[misc]  # bound now
    newcomer = make_connection(daemon.socket_dir)
    refused(lambda: newcomer.attach(namespace("another")), *CAPACITY)
    newcomer.close()
    eventually(lambda: books(daemon)["instances"] == before["instances"])
    assert books(daemon)["namespaces"]["blocks"] == before["namespaces"]["blocks"]
    assert books(daemon)["holds"] == before["holds"]
    daemon.check()
    if held_by == "reservations":
        holder.commit(reservation)
    else:
        holder.release(lease)
    assert other.lookup(chain("a", ARENA_BLOCKS)).hit_blocks == ARENA_BLOCKS
    # The checksums of the last commit keep their blocks for a moment.
    daemon.wait_checksummed()
    other.save(chain("b", 1))
    assert other.lookup(chain("a", ARENA_BLOCKS)).hit_blocks == ARENA_BLOCKS - 1, "the deepest block makes place"
    assert other.lookup(chain("b", 1)).hit_blocks == 1


def test_leased_blocks_stay_and_the_rest_makes_place(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread(high_watermark=1.0, low_watermark=0.9)
    connection = make_connection(daemon.socket_dir, OF)
    half = ARENA_BLOCKS // 2
    connection.save(chain("kept", half))
    connection.save(chain("cold", half))
    lease = connection.get(chain("kept", half)).lease_id
    daemon.wait_checksummed()
    before = books(daemon)
    refused(lambda: connection.put(chain("new", half + 1)), *CAPACITY, says=f"{half + 1} blocks wanted")
    assert books(daemon) == before, "a refusal evicts nothing"
    connection.save(chain("new", half))
    assert connection.lookup(chain("kept", half)).hit_blocks == half
    assert connection.lookup(chain("cold", half)).hit_blocks == 0
    assert connection.lookup(chain("new", half)).hit_blocks == half
    found = connection.call("Explain", pb.ExplainRequest(hash=chain("cold", 1)[0])).explanations[0]
    assert found.dropped.reason == pb.DROP_REASON_CAPACITY
    assert connection.release(lease).released == 1


def test_a_quota_has_a_refusal_of_its_own_and_evicts_its_own(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    quota_blocks = 8
    daemon = make_daemon_thread(
        dram_quota_bytes=quota_blocks * BLOCK_BYTES, dram_segment_bytes=quota_blocks * BLOCK_BYTES
    )
    connection = make_connection(daemon.socket_dir, OF, namespace("neighbour", block_size_bytes=BLOCK_BYTES))
    connection.save(chain("n", 4), namespace_id=2)
    connection.save(chain("a", quota_blocks))
    lease = connection.get(chain("a", quota_blocks)).lease_id
    before = books(daemon)
    refused(lambda: connection.put(chain("b", 1)), *QUOTA, says="quota")
    assert books(daemon) == before
    connection.release(lease)
    connection.save(chain("b", 2))
    assert connection.lookup(chain("a", quota_blocks)).hit_blocks == quota_blocks - 2
    found = connection.call("Explain", pb.ExplainRequest(hash=chain("a", quota_blocks)[-1])).explanations[0]
    assert found.dropped.reason == pb.DROP_REASON_QUOTA
    assert connection.lookup(chain("n", 4), namespace_id=2).hit_blocks == 4


def test_a_block_larger_than_the_quota_says_so(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread(dram_quota_bytes=BLOCK_BYTES // 2)
    connection = make_connection(daemon.socket_dir)
    refused(
        lambda: connection.attach(OF),
        Code.INVALID_ARGUMENT,
        pb.ERROR_REASON_INVALID_REQUEST,
        field="block_size_bytes",
        says="dram_quota_bytes",
    )


def test_a_save_into_a_full_arena_is_an_outcome_and_not_an_error(
    daemon_thread: DaemonThread, make_client: MakeClient, make_connection: MakeConnection
) -> None:
    client = make_client(daemon_thread.socket_dir, OF)
    holder = make_connection(daemon_thread.socket_dir, OF)
    holder.save(chain("a", ARENA_BLOCKS))
    lease = holder.get(chain("a", ARENA_BLOCKS)).lease_id
    saved = client.save(chain("b", 3), bytes(3 * BLOCK_BYTES))
    assert (saved.saved, saved.refused, saved.reason) == (0, 3, kv.Reason.CAPACITY)
    with pytest.raises(kv.CapacityExhausted):
        client.put(chain("b", 3))
    late = kv.attach(namespace("late"), socket_dir=daemon_thread.socket_dir, attach_timeout_s=0.3)
    assert late.status is kv.Status.RECONNECTING
    assert late.save(chain("b", 1), bytes(4096)).reason is kv.Reason.UNAVAILABLE
    holder.release(lease)
    assert late.wait_attached(10.0), "it goes on trying, and there is space now"
    assert late.save(chain("b", 1), bytes(4096)).saved == 1
    late.close()
    whole = contents(chain("b", 3), BLOCK_BYTES)
    eventually(lambda: client.save(chain("b", 3), whole).saved + client.lookup(chain("b", 3)).blocks >= 3)
    assert client.load(chain("b", 3), bytearray(len(whole))).blocks == 3


def test_memory_that_the_system_does_not_give_is_made_do_without(
    make_daemon: MakeDaemon, make_connection: MakeConnection
) -> None:
    daemon = make_daemon(dram_segment_bytes=1 * MIB, dram_grow_ahead_bytes=2 * MIB)
    connection = make_connection(daemon.socket_dir, OF)
    had_blocks = 2 * MIB // BLOCK_BYTES
    eventually(lambda: connection.call("Stats", pb.StatsRequest()).namespaces[0].dram_bytes >= 2 * MIB)
    # From now on the kernel refuses files of more than a page to this process, memfds included.
    daemon.process.rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
    connection.save(chain("a", had_blocks // 2))
    # Growing ahead of need fails now; that is no reason to be unhealthy, nor to refuse what eviction makes place for.
    daemon.wait_event("system_refused_memory")
    eventually(lambda: connection.is_checksummed(chain("a", had_blocks // 2)[-1]))
    connection.save(chain("b", had_blocks))
    assert connection.lookup(chain("b", had_blocks)).hit_blocks == had_blocks
    assert connection.lookup(chain("a", 1)).hit_blocks == 0
    refused(lambda: connection.put(chain("c", ARENA_BLOCKS)), *CAPACITY)
    refused(lambda: make_connection(daemon.socket_dir).attach(namespace("another")), *CAPACITY)
    assert daemon.get("/livez") == (200, "ok\n")
    assert not daemon.errors
