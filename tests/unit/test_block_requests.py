"""Every block that a Get asks for is counted once, whatever becomes of it, and the counts add up to what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import NamespaceKey, NamespaceSpec, Tenant
from kvservice.metrics import Metrics
from kvservice.service.block_requests import BlockRequests, RequestedBlocks
from kvservice.store import Counters
from kvservice.store.outcomes import Granted, Miss
from kvservice_proto.v1 import kvservice_pb2 as pb

pytestmark = pytest.mark.unit

SPEC = NamespaceSpec(NamespaceKey(Tenant("uid:0"), b"f" * 32), "a model", 4096, 16, 32)
REQUESTS = "kvservice_block_requests_total"


def granted(slots: int, *, nvme: int, missed: int) -> Granted:
    """An answer of the store; what is on NVMe only is pending."""
    pool: Any = SimpleNamespace(stride_bytes=4096)
    pending: Mapping[int, Any] = {position: object() for position in range(slots - nvme, slots)}
    from_nvme = np.arange(slots) >= slots - nvme
    numbers = np.arange(slots, dtype=np.int32)
    return Granted(1, 30.0, pool, numbers, numbers, pending, from_nvme, missed, Miss.NOT_HELD)


def requests() -> BlockRequests:
    metrics = Metrics(version="test", prefill_tokens_per_gpu_s=1000, gpu_hour_price=3.6)
    return BlockRequests(metrics, clock=lambda: 5.0)


def value(of: BlockRequests, name: str, **labels: str) -> float:
    found = of.metrics.registry.get_sample_value(name, labels)
    return 0.0 if found is None else found


def total(of: BlockRequests) -> float:
    return sum(
        sample.value for family in of.metrics.registry.collect() for sample in family.samples if sample.name == REQUESTS
    )


def response(handed_out: int = 0, **misses: int) -> pb.GetResponse:
    answer = pb.GetResponse()
    if handed_out:
        answer.runs.add(blocks=handed_out, handles=pb.Handles())
    for reason, blocks in misses.items():
        answer.runs.add(blocks=blocks, miss=pb.MissReason.Value(f"MISS_REASON_{reason.upper()}"))
    return answer


def follow(of: BlockRequests, what: Granted, counters: Counters | None = None) -> RequestedBlocks:
    """The blocks of a Get; `counters` are its namespace's, and take them for hits as the store does."""
    counters = counters or Counters()
    nvme = int(what.from_nvme.sum())
    counters.requested += len(what.slots) + what.missed
    counters.dram_hits += len(what.slots) - nvme
    counters.nvme_hits += nvme
    counters.misses += what.missed
    namespace: Any = SimpleNamespace(spec=SPEC, counters=counters)
    return RequestedBlocks(of, what, namespace, instance_id=3, started_s=0.0)


def test_hits_are_counted_by_tier_and_misses_by_reason() -> None:
    of = requests()
    with follow(of, granted(10, nvme=4, missed=3)) as requested:
        requested.answered(response(6))
        requested.answered(response(4, not_held=1, prefix_missing=2))
    assert value(of, REQUESTS, outcome="dram", reason="") == 6
    assert value(of, REQUESTS, outcome="nvme", reason="") == 4
    assert value(of, REQUESTS, outcome="miss", reason="not_held") == 1
    assert value(of, REQUESTS, outcome="miss", reason="prefix_missing") == 2
    assert of.counts().requested == total(of) == 13
    (miss,) = of.recent
    assert (miss.instance_id, miss.label, miss.missed_blocks, miss.requested_blocks) == (3, "a model", 3, 13)
    assert miss.reason == "not_held"
    slowest = value(
        of, "kvservice_operation_duration_seconds_count", operation="get", tier="nvme", plane="shared_memory"
    )
    assert slowest == 1


def test_a_caller_that_goes_away_leaves_misses_not_a_gap() -> None:
    of = requests()
    with suppress(asyncio.CancelledError), follow(of, granted(8, nvme=5, missed=2)) as requested:
        requested.answered(response(3))
        raise asyncio.CancelledError
    assert value(of, REQUESTS, outcome="miss", reason="cancelled") == 7
    assert value(of, REQUESTS, outcome="dram", reason="") == 3
    assert total(of) == 10


def test_a_read_that_fails_is_not_counted_as_a_hit_as_well() -> None:
    """The block counts as the miss that the engine saw, although it was granted."""
    of = requests()
    with follow(of, granted(8, nvme=0, missed=0)) as requested:
        requested.answered(response(3, corrupt=1, prefix_missing=4))
    assert value(of, REQUESTS, outcome="dram", reason="") == 3
    assert total(of) == 8


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 30)), max_size=8))
def test_outcomes_sum_to_what_was_asked(gets: list[tuple[int, int, int, int]]) -> None:
    of, counters = requests(), Counters()
    asked = 0
    for dram, nvme, missed, answered in gets:
        slots = dram + nvme
        with follow(of, granted(slots, nvme=nvme, missed=missed), counters) as requested:
            handed_out = min(answered, slots)
            requested.answered(response(handed_out, over_limit=min(answered - handed_out, missed)))
        asked += slots + missed
    assert of.counts().requested == total(of) == asked
    assert of.counts().dram + of.counts().nvme + of.counts().missed == asked
    # A namespace's own counters say the same, whatever was taken for a hit before it had landed.
    assert (counters.dram_hits, counters.nvme_hits) == (of.counts().dram, of.counts().nvme)
    assert counters.dram_hits + counters.nvme_hits + counters.misses == counters.requested == asked


def test_a_block_in_dram_behind_one_on_nvme_counts_for_its_own_tier() -> None:
    of, counters = requests(), Counters()
    what = granted(4, nvme=0, missed=0)
    what.from_nvme[:] = [False, True, True, False]
    with follow(of, what, counters) as requested:
        requested.answered(response(3, tier_offline=1))
    assert (of.counts().dram, of.counts().nvme, of.counts().missed) == (1, 2, 1)
    assert (counters.dram_hits, counters.nvme_hits, counters.misses) == (1, 2, 1)


def test_savings_are_tokens_times_what_they_cost() -> None:
    of = requests()
    with follow(of, granted(10, nvme=0, missed=0)) as requested:
        requested.answered(response(10))
    assert value(of, "kvservice_saved_tokens_total") == 160
    assert value(of, "kvservice_saved_prefill_gpu_seconds_total") == pytest.approx(0.16)
    assert value(of, "kvservice_saved_money_total") == pytest.approx(0.16 * 3.6 / 3600)


def test_only_so_many_misses_are_remembered() -> None:
    of = requests()
    for _ in range(100):
        with follow(of, granted(0, nvme=0, missed=1)) as requested:
            requested.answered(response(0, not_held=1))
    assert len(of.recent) == of.recent.maxlen
