"""Series have units and few labels, count what they say, and cost the hot path next to nothing."""

from __future__ import annotations

import re

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from kvservice.blocks import DropReason, Tier
from kvservice.metrics import MISS_REASONS, PUT_OUTCOMES, Metrics, Snapshot, TierGauge
from kvservice_proto.v1 import kvservice_pb2 as pb

pytestmark = pytest.mark.unit


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="1.2.3")


def snapshot(*, blocks: int = 7, online: bool = True) -> Snapshot:
    return Snapshot(
        tiers=[TierGauge(Tier.DRAM, capacity_bytes=4096, used_bytes=1024, online=online)],
        blocks=blocks,
        sessions=2,
        instances=3,
        namespaces=4,
        leases=5,
        reservations=6,
        quarantined_slots=8,
        unchecksummed_blocks=9,
        draining=True,
    )


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"no series {name}{labels}"
    return found


def test_blocks_are_counted_by_outcome(metrics: Metrics) -> None:
    metrics.dram_hit_blocks.inc(3)
    metrics.miss_blocks["not_held"].inc(2)
    metrics.put_blocks["held"].inc(4)
    metrics.dropped_blocks[DropReason.CAPACITY].inc()
    metrics.lookup_held_blocks.inc(5)
    metrics.committed_blocks.inc(6)
    metrics.expired_leases.inc()
    assert value(metrics, "kvservice_block_requests_total", outcome="dram", reason="") == 3
    assert value(metrics, "kvservice_block_requests_total", outcome="nvme", reason="") == 0
    assert value(metrics, "kvservice_block_requests_total", outcome="miss", reason="not_held") == 2
    assert value(metrics, "kvservice_block_puts_total", outcome="held") == 4
    assert value(metrics, "kvservice_block_drops_total", reason="capacity") == 1
    assert value(metrics, "kvservice_block_lookups_total", outcome="held") == 5
    assert value(metrics, "kvservice_block_commits_total") == 6
    assert value(metrics, "kvservice_expirations_total", held="lease") == 1
    assert value(metrics, "kvservice_expirations_total", held="reservation") == 0


def test_calls_are_timed_by_method_and_code(metrics: Metrics) -> None:
    lookups = metrics.rpc("Lookup")
    lookups.observe(60e-6, "OK")
    lookups.observe(3.0, "OK")
    lookups.observe(0.001, "RESOURCE_EXHAUSTED")
    assert metrics.rpc("Lookup") is lookups
    name = "kvservice_rpc_duration_seconds"
    assert value(metrics, f"{name}_count", method="Lookup", code="OK") == 2
    assert value(metrics, f"{name}_sum", method="Lookup", code="OK") == pytest.approx(3.00006)
    assert value(metrics, f"{name}_bucket", method="Lookup", code="OK", le="5e-05") == 0
    assert value(metrics, f"{name}_bucket", method="Lookup", code="OK", le="0.0001") == 1
    assert value(metrics, f"{name}_count", method="Lookup", code="RESOURCE_EXHAUSTED") == 1


def test_state_is_read_at_every_scrape_and_not_before(metrics: Metrics) -> None:
    reads: list[int] = []

    def read() -> Snapshot:
        reads.append(len(reads))
        return snapshot(blocks=len(reads), online=len(reads) < 2)

    metrics.watch(read)
    assert reads == []
    first, second = generate_latest(metrics.registry).decode(), generate_latest(metrics.registry).decode()
    assert "kvservice_blocks 1.0" in first
    assert "kvservice_blocks 2.0" in second
    assert 'kvservice_tier_capacity_bytes{tier="dram"} 4096.0' in first
    assert 'kvservice_tier_used_bytes{tier="dram"} 1024.0' in first
    assert 'kvservice_tier_online{tier="dram"} 1.0' in first
    assert 'kvservice_tier_online{tier="dram"} 0.0' in second
    assert "kvservice_quarantined_slots 8.0" in first
    assert "kvservice_draining 1.0" in first


def test_a_background_task_is_up_until_it_is_not(metrics: Metrics) -> None:
    metrics.background_task("upkeep").set(1)
    assert value(metrics, "kvservice_background_task_up", task="upkeep") == 1
    metrics.background_task("upkeep").set(0)
    assert value(metrics, "kvservice_background_task_up", task="upkeep") == 0


def test_two_daemons_in_one_process_do_not_share_series(metrics: Metrics) -> None:
    other = Metrics(version="2")
    other.dram_hit_blocks.inc()
    assert value(metrics, "kvservice_block_requests_total", outcome="dram", reason="") == 0
    assert "kvservice_build_info" in generate_latest(other.registry).decode()


def test_every_series_is_ours_and_named_with_its_unit(metrics: Metrics) -> None:
    metrics.watch(snapshot)
    metrics.rpc("Get").observe(0.1, "OK")
    text = generate_latest(metrics.registry).decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 20
    for family in families:
        assert re.fullmatch(r"kvservice_[a-z_]+", family.name), family.name
        assert len(family.documentation) > 10 or "process" in family.name, family.name
        assert not family.name.endswith(("_ms", "_mb", "_kb", "_percent")), family.name
    assert text.count("\n") < 500, "that many lines for one method: some label is not from a short list"


def test_the_lists_written_down_here_are_the_contracts() -> None:
    """Counting by a number from the wire relies on it."""
    names = pb.MissReason.keys()[1:]
    assert tuple(name.removeprefix("MISS_REASON_").lower() for name in names) == MISS_REASONS
    outcomes = pb.PutRun.DESCRIPTOR.oneofs_by_name["outcome"].fields
    assert tuple(field.name for field in outcomes) == PUT_OUTCOMES


def test_counting_a_call_looks_up_no_label(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup takes a lock and makes a tuple: what every call counts is bound once."""
    calls = metrics.rpc("Lookup")
    calls.observe(3e-4, "ABORTED")

    def labels(*_: object, **__: object) -> None:
        raise AssertionError("a label was looked up on the hot path")

    monkeypatch.setattr(MetricWrapperBase, "labels", labels)
    calls.observe(3e-4, "OK")
    calls.observe(3e-4, "ABORTED")
    metrics.lookup_held_blocks.inc(17)
    metrics.miss_blocks["not_held"].inc(3)
    metrics.operations.get[Tier.DRAM].observe(1e-3)
    metrics.savings.count(16)
    metrics.evictions.evicted(DropReason.CAPACITY, age_s=1, idle_s=1)
