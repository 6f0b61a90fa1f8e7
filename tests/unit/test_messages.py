"""Outcomes become the contract's runs, which always add up; declared namespaces are checked field by field."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvservice.blocks import DropReason, NamespaceKey, NamespaceSpec, Tenant, Tier
from kvservice.dram import PAGE_BYTES, Arena, SlotPool
from kvservice.errors import InvalidRequest
from kvservice.service import messages
from kvservice.service.reports import stats
from kvservice.store import outcomes
from kvservice.store.outcomes import Committed, Miss, Written
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.stores import Workplace, chain, spec_of

pytestmark = pytest.mark.unit

NO_SLOTS = np.zeros(0, dtype=np.int32)
NO_NVME = np.zeros(2, dtype=bool)


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    """Two segments of 4 slots, all of generation 1."""
    arena = Arena(capacity_bytes=8 * PAGE_BYTES, huge_pages=False, numa_node=-1)
    made = SlotPool(PAGE_BYTES, slots_per_segment=4)
    for _ in range(2):
        made.add(arena.make_segment(arena.promise(4 * PAGE_BYTES), stride_bytes=PAGE_BYTES, slots=4))
    made.allocate(8)
    yield made
    for _, segment in made.live_segments():
        segment.close()


def handles(segment_id: int, slots: list[int], generation: int = 1) -> pb.Handles:
    return pb.Handles(
        shared_memory=pb.SharedMemoryHandles(segment_id=segment_id, slots=slots, generations=[generation] * len(slots))
    )


# --------------------------------------------------------------------- what comes in


def declared(**fields: object) -> pb.Namespace:
    good: dict[str, object] = {
        "fingerprint": b"f" * 32,
        "label": "llama",
        "block_size_bytes": 1024,
        "tokens_per_block": 16,
        "hash_size_bytes": 32,
    }
    return pb.Namespace(**{**good, **fields})  # type: ignore[arg-type]  # the tests choose wrong ones on purpose


def spec(message: pb.Namespace) -> NamespaceSpec:
    return messages.namespace_spec(message, Tenant("uid:7"), block_size_bytes_max=4096)


def test_a_declared_namespace_belongs_to_the_peers_tenant() -> None:
    assert spec(declared()) == NamespaceSpec(NamespaceKey(Tenant("uid:7"), b"f" * 32), "llama", 1024, 16, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": b"f" * 15}, "fingerprint length is 15, must be 16 to 64"),
        ({"fingerprint": b"f" * 65}, "fingerprint length is 65, must be 16 to 64"),
        ({"fingerprint": b""}, "fingerprint length is 0, must be 16 to 64"),
        ({"label": "x" * 201}, "label has 201 characters, at most 200"),
        ({"block_size_bytes": 0}, "block_size_bytes is 0, must be 1 to 4096"),
        ({"block_size_bytes": 4097}, "block_size_bytes is 4097, must be 1 to 4096"),
        ({"block_size_bytes": 2**64 - 1}, "must be 1 to 4096"),
        ({"tokens_per_block": 0}, "tokens_per_block is 0, must be 1 to 1048576"),
        ({"tokens_per_block": 2**20 + 1}, "must be 1 to 1048576"),
        ({"hash_size_bytes": 7}, "hash_size_bytes is 7, must be 8 to 64"),
        ({"hash_size_bytes": 65}, "hash_size_bytes is 65, must be 8 to 64"),
    ],
)
def test_a_field_out_of_bounds_is_refused_by_name_and_bound(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refusal:
        spec(declared(**fields))
    assert refusal.value.field.startswith(next(iter(fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"fingerprint": b"f" * 16},
        {"fingerprint": b"f" * 64},
        {"label": "ü" * 200},
        {"label": ""},
        {"block_size_bytes": 1},
        {"block_size_bytes": 4096},
        {"tokens_per_block": 1 << 20},
        {"hash_size_bytes": 8},
        {"hash_size_bytes": 64},
    ],
)
def test_the_bounds_themselves_are_allowed(fields: dict[str, object]) -> None:
    assert spec(declared(**fields)).key.tenant == "uid:7"


def test_a_text_may_be_as_long_as_its_bound() -> None:
    assert messages.require_text("x" * 200, "session_id") == "x" * 200
    assert messages.require_text("x" * 5, "instance_name", length_max=5) == "x" * 5
    with pytest.raises(InvalidRequest, match="instance_name has 6 characters, at most 5") as refusal:
        messages.require_text("x" * 6, "instance_name", length_max=5)
    assert refusal.value.field == "instance_name"


# -------------------------------------------------------------------- what goes out


def test_every_reason_and_tier_has_its_word_in_the_contract() -> None:
    assert set(messages.MISSES) == set(Miss)
    assert set(messages.DROPS) == set(DropReason)
    assert set(messages.TIERS) == set(Tier)
    for miss, reason in messages.MISSES.items():
        assert pb.MissReason.Name(reason) == f"MISS_REASON_{miss.name}"
    for dropped, why in messages.DROPS.items():
        assert pb.DropReason.Name(why) == f"DROP_REASON_{dropped.name}"
    for tier, word in messages.TIERS.items():
        assert pb.Tier.Name(word) == f"TIER_{tier.name}"


@pytest.mark.parametrize(("held", "asked"), [(0, 1), (0, 5), (3, 5), (4, 5), (5, 5), (1, 1)])
def test_lookup_and_prefetch_say_what_is_held_why_it_ends_and_what_is_cut_off(held: int, asked: int) -> None:
    looked = outcomes.Looked(held, held, asked, Miss.BEING_WRITTEN)
    expected: list[tuple[int, object]] = [(held, pb.TIER_DRAM)] if held else []
    if held < asked:
        expected.append((1, pb.MISS_REASON_BEING_WRITTEN))
    if held + 1 < asked:
        expected.append((asked - held - 1, pb.MISS_REASON_PREFIX_MISSING))
    looked_up = messages.lookup_response(looked)
    assert looked_up.hit_blocks == held
    assert [(run.blocks, run.held or run.miss) for run in looked_up.runs] == expected
    prefetched = messages.prefetch_response(outcomes.Prefetched(held, 0, asked - held, Miss.BEING_WRITTEN))
    assert [(run.blocks, run.held or run.miss) for run in prefetched.runs] == expected


def test_handles_are_runs_of_one_segment_each(pool: SlotPool) -> None:
    slots = np.array([3, 4, 5, 0], dtype=np.int32)
    pool.live_segments()[0][1].generations[3] = 9
    first, second = (segment.segment_id for _, segment in pool.live_segments())
    assert list(messages.handles(pool, slots)) == [
        (1, handles(first, [3], 9)),
        (2, handles(second, [0, 1])),
        (1, handles(first, [0])),
    ]
    assert list(messages.handles(pool, NO_SLOTS)) == []


def test_a_get_hands_out_the_prefix_and_says_why_it_ends(pool: SlotPool) -> None:
    slots = np.array([0, 1], dtype=np.int32)
    first = pool.live_segments()[0][1].segment_id
    response = messages.get_response(outcomes.Granted(77, 30.5, pool, slots, slots, {}, NO_NVME, 3, Miss.NOT_HELD))
    assert (response.lease_id, response.lease_ms) == (77, 30_500)
    assert list(response.runs) == [
        pb.GetRun(blocks=2, handles=handles(first, [0, 1])),
        pb.GetRun(blocks=1, miss=pb.MISS_REASON_NOT_HELD),
        pb.GetRun(blocks=2, miss=pb.MISS_REASON_PREFIX_MISSING),
    ]


def test_blocks_over_the_callers_limit_are_all_over_the_limit(pool: SlotPool) -> None:
    slots = np.array([0], dtype=np.int32)
    response = messages.get_response(outcomes.Granted(77, 30.0, pool, slots, slots, {}, NO_NVME, 3, Miss.OVER_LIMIT))
    assert [(run.blocks, run.miss) for run in response.runs[1:]] == [(3, pb.MISS_REASON_OVER_LIMIT)]


def test_a_get_of_nothing_has_no_lease(pool: SlotPool) -> None:
    response = messages.get_response(outcomes.Granted(0, 0.0, pool, NO_SLOTS, NO_SLOTS, {}, NO_NVME, 1, Miss.NOT_HELD))
    assert response == pb.GetResponse(runs=[pb.GetRun(blocks=1, miss=pb.MISS_REASON_NOT_HELD)])


def test_a_full_hit_has_no_miss(pool: SlotPool) -> None:
    slots = np.array([4, 5], dtype=np.int32)
    response = messages.get_response(outcomes.Granted(5, 1.0, pool, slots, slots, {}, NO_NVME, 0, Miss.NOT_HELD))
    assert [(run.blocks, run.WhichOneof("outcome")) for run in response.runs] == [(2, "handles")]


def test_a_put_says_for_each_block_what_to_do(pool: SlotPool) -> None:
    known = [(2, Written.HELD), (1, Written.BEING_WRITTEN)]
    response = messages.put_response(outcomes.Reserved(9, 12.0, known, pool, np.array([6, 7], dtype=np.int32)))
    second = pool.live_segments()[1][1].segment_id
    assert (response.reservation_id, response.lease_ms) == (9, 12_000)
    assert list(response.runs) == [
        pb.PutRun(blocks=2, held=pb.Held()),
        pb.PutRun(blocks=1, being_written=pb.BeingWritten()),
        pb.PutRun(blocks=2, reserved=handles(second, [2, 3])),
    ]


def test_a_put_behind_a_missing_block_is_refused_as_such(pool: SlotPool) -> None:
    response = messages.put_response(outcomes.Reserved(0, 0.0, [(4, Written.PARENT_MISSING)], pool, NO_SLOTS))
    refused = pb.Refused(reason=pb.REFUSED_REASON_PARENT_MISSING)
    assert response == pb.PutResponse(runs=[pb.PutRun(blocks=4, refused=refused)])


def test_a_commit_says_what_became_of_each_block() -> None:
    response = messages.commit_response(
        [(2, Committed.PUBLISHED), (1, Committed.AWAITING_PARENT), (3, DropReason.PREFIX_LOST)]
    )
    assert list(response.runs) == [
        pb.CommitRun(blocks=2, published=pb.Published()),
        pb.CommitRun(blocks=1, awaiting_parent=pb.AwaitingParent()),
        pb.CommitRun(blocks=3, dropped=pb.DROP_REASON_PREFIX_LOST),
    ]


def test_each_finding_of_explain_has_its_message() -> None:
    of = spec(declared())
    held = outcomes.Held((Tier.DRAM,), depth=3, children=2, idle_s=1.5, uses=4, holders=1, is_checksummed=True)
    response = messages.explain_response(
        [
            outcomes.Explanation(of, held),
            outcomes.Explanation(of, outcomes.BeingStored(2.5, is_written=True)),
            outcomes.Explanation(of, outcomes.Dropped(DropReason.QUOTA, ago_s=9.0, idle_s=3.0)),
            outcomes.Explanation(None, outcomes.Elsewhere(("one", "two"))),
            outcomes.Explanation(None, outcomes.NotRemembered(100, 60.0)),
        ]
    )
    findings = [explanation.WhichOneof("finding") for explanation in response.explanations]
    assert findings == ["held", "reserved", "dropped", "namespace_mismatch", "not_remembered"]
    first, second, third, fourth, fifth = response.explanations
    assert [(found.label, found.fingerprint) for found in response.explanations] == [
        *[("llama", b"f" * 32)] * 3,
        ("", b""),
        ("", b""),
    ]
    assert first.held == pb.HeldFinding(
        tiers=[pb.TIER_DRAM], depth=3, children=2, idle_s=1.5, uses=4, holders=1, checksummed=True
    )
    assert second.reserved == pb.ReservedFinding(age_s=2.5, written=True)
    assert third.dropped == pb.DroppedFinding(reason=pb.DROP_REASON_QUOTA, ago_s=9.0, idle_s=3.0)
    assert list(fourth.namespace_mismatch.held_under_labels) == ["one", "two"]
    assert fifth.not_remembered == pb.NotRemembered(history_blocks=100, horizon_s=60.0)


# ------------------------------------------------------------------------- stats


def test_stats_count_the_daemon_and_show_the_callers_tenant_only() -> None:
    with Workplace() as workplace:
        mine = workplace.engine(spec_of("mine", tenant="uid:1"), uid=1)
        theirs = workplace.engine(spec_of("theirs", tenant="uid:2"), uid=2)
        workplace.save(mine, chain("a", 3), session_id="talk")
        workplace.save(theirs, chain("b", 1))
        granted = mine.get(chain("a", 3), duration_s=5.0)
        mine.get(chain("x", 2))
        workplace.put(theirs, chain("c", 1))
        workplace.clock.advance(6.0)
        workplace.upkeep()
        message = stats(workplace.store, Tenant("uid:1"), epoch="e", started_at_s=1000.0, state="serving")
        assert (message.daemon_epoch, message.uptime_s, message.state) == ("e", 6.0, "serving")
        assert message.planes == "shared-memory (no cuda-ipc: turned off (device_plane))"
        assert (message.instances, message.leases, message.reservations) == (2, 1, 1)
        assert message.quarantined_slots == len(granted.slots) == 3
        (tier,) = message.tiers
        assert (tier.tier, tier.state) == (pb.TIER_DRAM, "online")
        assert (tier.capacity_bytes, tier.used_bytes) == (16 * PAGE_BYTES, 8 * PAGE_BYTES)
        (namespace,) = message.namespaces
        assert (namespace.label, namespace.tenant, namespace.policy) == ("mine", "uid:1", "lru")
        assert (namespace.blocks, namespace.slots_free, namespace.sessions) == (3, 1, 1)
        assert namespace.dram_bytes == 4 * PAGE_BYTES
        assert (namespace.requested_blocks, namespace.dram_hit_blocks, namespace.miss_blocks) == (5, 3, 2)
        assert (namespace.committed_blocks, namespace.evicted_blocks) == (3, 0)
        (instance,) = message.attached_instances
        assert (instance.name, instance.process_id, instance.tenant) == ("engine of 1", 1, "uid:1")
        assert (instance.leases, instance.reservations, instance.quarantined_slots) == (1, 0, 3)
        assert instance.attached_s == 6.0


def test_evicted_blocks_in_stats_are_those_that_had_to_make_room() -> None:
    with Workplace() as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 16))
        workplace.save(engine, chain("b", 3))
        workplace.store.forget_namespace(engine.peer, 1)
        message = stats(workplace.store, Tenant("uid:1"), epoch="", started_at_s=0.0, state="")
        assert message.namespaces[0].evicted_blocks == 3
