"""What the daemon counts adds up: series exist, hits and misses are what was asked for, every drop has its reason."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, namespace
from tests.connections import Connection
from tests.daemons import MIB, DaemonProcess
from tests.integration.books import Code, refused
from tests.integration.conftest import MakeConnection, MakeDaemon, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration

BLOCK_BYTES = 16_384
ARENA_BLOCKS = 4 * MIB // BLOCK_BYTES
OF = namespace("counted", block_size_bytes=BLOCK_BYTES)

SERIES = (
    "kvservice_rpc_duration_seconds_count",
    "kvservice_rpc_duration_seconds_bucket",
    "kvservice_block_requests_total",
    "kvservice_block_lookups_total",
    "kvservice_block_puts_total",
    "kvservice_block_commits_total",
    "kvservice_block_drops_total",
    "kvservice_leased_bytes_total",
    "kvservice_committed_bytes_total",
    "kvservice_expirations_total",
    "kvservice_checksums_total",
    "kvservice_checksum_failures_total",
    "kvservice_refused_peers_total",
    "kvservice_background_task_up",
    "kvservice_build_info",
    "kvservice_process_resident_memory_bytes",
    "kvservice_process_open_fds",
    "kvservice_blocks",
    "kvservice_sessions",
    "kvservice_instances",
    "kvservice_namespaces",
    "kvservice_leases",
    "kvservice_reservations",
    "kvservice_quarantined_slots",
    "kvservice_unchecksummed_blocks",
    "kvservice_draining",
    "kvservice_tier_capacity_bytes",
    "kvservice_tier_used_bytes",
    "kvservice_tier_online",
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(daemon: DaemonProcess) -> Samples:
    families = text_string_to_metric_families(daemon.get("/metrics")[1])
    return {(sample.name, frozenset(sample.labels.items())): sample.value for of in families for sample in of.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples of that name that carry at least these labels."""
    wanted = set(labels.items())
    found = [number for (named, carried), number in samples.items() if named == name and wanted <= carried]
    assert found, f"no sample {name} {labels}"
    return sum(found)


def names(samples: Samples) -> Iterable[str]:
    return {name for name, _ in samples}


def stats_of(connection: Connection) -> pb.NamespaceStats:
    stats: pb.StatsResponse = connection.call("Stats", pb.StatsRequest())
    return next(of for of in stats.namespaces if of.label == OF.label)


def test_every_series_is_there_from_the_first_scrape(daemon: DaemonProcess) -> None:
    samples = scrape(daemon)
    assert not set(SERIES) - set(names(samples))
    for reason in ("capacity", "reclaimed", "quota", "forgotten", "expired", "corrupt", "prefix_lost", "aborted"):
        assert value(samples, "kvservice_block_drops_total", reason=reason) == 0
    for outcome in ("reserved", "held", "being_written", "refused"):
        assert value(samples, "kvservice_block_puts_total", outcome=outcome) == 0
    assert value(samples, "kvservice_tier_capacity_bytes", tier="dram") == 4 * MIB


def test_hits_and_misses_are_what_was_requested(daemon: DaemonProcess, make_connection: MakeConnection) -> None:
    connection = make_connection(daemon.socket_dir, OF)
    connection.save(chain("a", 10))
    connection.put(chain("b", 4))
    connection.release(
        connection.get(chain("a", 10)).lease_id,
        connection.get(chain("a", 16)).lease_id,
        connection.get(chain("a", 10), max_blocks=3).lease_id,
    )
    assert connection.get(chain("b", 4)).lease_id == 0
    assert connection.get(chain("nothing", 5)).lease_id == 0
    refused(lambda: connection.get([b"x"]), Code.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_REQUEST, field="hashes")
    connection.lookup(chain("a", 12))
    samples = scrape(daemon)
    requests = "kvservice_block_requests_total"
    assert value(samples, requests, outcome="dram") == 10 + 10 + 3
    assert value(samples, requests, outcome="miss", reason="not_held") == 1 + 1
    assert value(samples, requests, outcome="miss", reason="prefix_missing") == 5 + 3 + 4
    assert value(samples, requests, outcome="miss", reason="being_written") == 1
    assert value(samples, requests, outcome="miss", reason="over_limit") == 7
    assert value(samples, requests) == 10 + 16 + 10 + 4 + 5
    of = stats_of(connection)
    assert of.requested_blocks == value(samples, requests)
    assert (of.dram_hit_blocks, of.miss_blocks) == (23, 22)
    assert of.requested_blocks == of.dram_hit_blocks + of.nvme_hit_blocks + of.miss_blocks
    assert value(samples, "kvservice_leased_bytes_total") == 23 * BLOCK_BYTES
    assert value(samples, "kvservice_block_lookups_total", outcome="held") == 10
    assert value(samples, "kvservice_block_lookups_total", outcome="miss") == 2
    assert value(samples, "kvservice_rpc_duration_seconds_count", method="Get", code="OK") == 5
    assert value(samples, "kvservice_rpc_duration_seconds_count", method="Get", code="INVALID_ARGUMENT") == 1


def test_puts_commits_and_states_are_counted(daemon: DaemonProcess, make_connection: MakeConnection) -> None:
    connection = make_connection(daemon.socket_dir, OF)
    connection.save(chain("a", 10))
    connection.put(chain("b", 4), session_id="talk", request_id="r")
    connection.put(chain("a", 12))
    connection.put(chain("b", 4))
    connection.put(chain("orphan", 3, start=1), parent=chain("orphan", 1)[0])
    connection.get(chain("a", 10))
    samples = scrape(daemon)
    puts = "kvservice_block_puts_total"
    assert value(samples, puts, outcome="reserved") == 10 + 4 + 2
    assert value(samples, puts, outcome="held") == 10
    assert value(samples, puts, outcome="being_written") == 4
    assert value(samples, puts, outcome="refused") == 3
    assert value(samples, "kvservice_block_commits_total") == 10
    assert value(samples, "kvservice_committed_bytes_total") == 10 * BLOCK_BYTES
    assert value(samples, "kvservice_leases") == 1
    assert value(samples, "kvservice_reservations") == 2
    assert value(samples, "kvservice_instances") == 1
    assert value(samples, "kvservice_namespaces") == 1
    stats: pb.StatsResponse = connection.call("Stats", pb.StatsRequest())
    assert (stats.leases, stats.reservations, stats.instances) == (1, 2, 1)
    (shown,) = stats.attached_instances
    assert (shown.leases, shown.reservations) == (1, 2)
    of = stats_of(connection)
    assert of.committed_blocks == 10
    assert of.dram_bytes == stats.tiers[0].used_bytes == value(samples, "kvservice_tier_used_bytes", tier="dram")
    eventually(lambda: value(scrape(daemon), "kvservice_checksums_total") == 10)
    eventually(lambda: value(scrape(daemon), "kvservice_unchecksummed_blocks") == 0)


def test_every_drop_has_its_reason(
    make_daemon: MakeDaemon, make_connection: MakeConnection, make_engine: MakeEngine
) -> None:
    daemon = make_daemon(high_watermark=1.0, low_watermark=0.9)
    connection = make_connection(daemon.socket_dir, OF)

    def dropped(reason: str) -> float:
        return value(scrape(daemon), "kvservice_block_drops_total", reason=reason)

    connection.save(chain("full", ARENA_BLOCKS))
    eventually(lambda: connection.is_checksummed(chain("full", ARENA_BLOCKS)[-1]))
    connection.save(chain("more", 10))
    assert dropped("capacity") == 10
    assert stats_of(connection).evicted_blocks == 10
    connection.abort(connection.put(chain("given up", 3)).reservation_id)
    assert dropped("aborted") == 3
    assert dropped("capacity") == 13
    connection.put(chain("expires", 2), lease_ms=20)
    connection.get(chain("more", 4), lease_ms=20)
    eventually(lambda: value(scrape(daemon), "kvservice_expirations_total", held="reservation") == 1)
    eventually(lambda: value(scrape(daemon), "kvservice_expirations_total", held="lease") == 1)
    assert dropped("aborted") == 5
    assert value(scrape(daemon), "kvservice_quarantined_slots") == 2 + 4
    # Whose holder is killed is aborted too; what waited behind it lost its prefix.
    victim = make_engine(daemon.socket_dir, OF)
    assert victim.do("put", name="chain", blocks=2) == 2
    behind = connection.put(chain("chain", 5)).reservation_id
    connection.commit(behind)
    victim.kill()
    eventually(lambda: dropped("aborted") == 7)
    assert dropped("prefix_lost") == 3
    forgotten = connection.call("Forget", pb.ForgetRequest(namespace_id=1, whole_namespace=pb.WholeNamespace()))
    assert forgotten.blocks_dropped == dropped("forgotten") > 0
    assert value(scrape(daemon), "kvservice_blocks") == 0
    connection.save(chain("again", 240))
    eventually(lambda: connection.is_checksummed(chain("again", 240)[-1]))
    taker = make_connection(daemon.socket_dir, namespace("taker", block_size_bytes=BLOCK_BYTES))
    taker.save(chain("t", 64))
    assert dropped("reclaimed") > 0
    total = value(scrape(daemon), "kvservice_block_drops_total")
    assert total == sum(dropped(r) for r in ("capacity", "reclaimed", "forgotten", "prefix_lost", "aborted"))
    assert not daemon.errors


def test_labels_never_carry_what_a_client_chose(daemon: DaemonProcess, make_connection: MakeConnection) -> None:
    connection = make_connection(daemon.socket_dir, namespace("secret label"))
    connection.put(chain("a", 2), session_id="secret session", request_id="secret request")
    text = daemon.get("/metrics")[1]
    assert "secret" not in text
    assert len(text) < 100_000
