"""Holds expire but keep their slots, belong to one instance, and are bounded in number and in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from kvservice.blocks import NamespaceKey, Tenant
from kvservice.errors import LeaseExpired, LeaseUnknown, Overloaded, ReservationLost
from kvservice.leases import GIVEN_UP_MAX, Hold, HoldKind, Leases

pytestmark = pytest.mark.unit

KEY = NamespaceKey(Tenant("uid:1"), b"f" * 32)
READS_MAX, WRITES_MAX = 3, 2


@pytest.fixture
def leases() -> Leases:
    return Leases(first_id=1_000, per_instance_max={HoldKind.READ: READS_MAX, HoldKind.WRITE: WRITES_MAX})


def grant(
    leases: Leases,
    kind: HoldKind = HoldKind.READ,
    *,
    instance_id: int = 1,
    request_id: str = "",
    slots: int = 2,
    now_s: float = 0.0,
    duration_s: float = 10.0,
) -> Hold:
    return leases.grant(
        kind,
        instance_id=instance_id,
        request_id=request_id,
        session_id="",
        namespace=KEY,
        slots=np.arange(slots, dtype=np.int32),
        now_s=now_s,
        duration_s=duration_s,
    )


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_a_hold_lasts_until_its_expiry_and_no_longer(leases: Leases) -> None:
    hold = grant(leases, now_s=5.0, duration_s=10.0)
    assert (hold.granted_at_s, hold.expires_at_s) == (5.0, 15.0)
    leases.require_live(hold, 14.999)
    assert leases.expire(14.999) == []
    with pytest.raises(LeaseExpired):
        leases.require_live(hold, 15.0)
    assert leases.expire(15.0) == [hold]
    assert hold.expired
    assert leases.expire(16.0) == []


@pytest.mark.parametrize(("kind", "error"), [(HoldKind.READ, LeaseExpired), (HoldKind.WRITE, ReservationLost)])
def test_what_is_too_late_says_so_by_kind(leases: Leases, kind: HoldKind, error: type[Exception]) -> None:
    hold = grant(leases, kind)
    with pytest.raises(error, match=f"{kind.value} {hold.hold_id} expired"):
        leases.require_live(hold, 12.0)
    with pytest.raises(error):
        leases.renew(hold, now_s=12.0, duration_s=10.0)
    assert hold.expires_at_s == 10.0


def test_an_expired_hold_cannot_be_renewed_even_if_time_is_left(leases: Leases) -> None:
    hold = grant(leases, duration_s=100.0)
    assert leases.expire_instance(1) == [hold]
    with pytest.raises(LeaseExpired):
        leases.renew(hold, now_s=1.0, duration_s=100.0)


def test_renewal_moves_the_expiry_either_way(leases: Leases) -> None:
    longer, shorter = grant(leases), grant(leases)
    leases.renew(longer, now_s=5.0, duration_s=10.0)
    leases.renew(shorter, now_s=5.0, duration_s=1.0)
    assert leases.expire(6.0) == [shorter]
    assert leases.expire(10.0) == []
    leases.renew(longer, now_s=14.0, duration_s=10.0)
    assert leases.expire(23.9) == []
    assert leases.expire(24.0) == [longer]


def test_holds_expire_in_order_and_once(leases: Leases) -> None:
    durations = [7.0, 3.0, 5.0]
    holds = [grant(leases, duration_s=duration_s) for duration_s in durations]
    assert leases.expire(5.0) == [holds[1], holds[2]]
    assert leases.expire(100.0) == [holds[0]]


def test_an_ended_hold_does_not_expire(leases: Leases) -> None:
    hold = grant(leases)
    leases.end(hold)
    assert leases.expire(100.0) == []
    assert list(leases) == []


def test_ids_follow_from_the_first_and_are_never_used_again(leases: Leases) -> None:
    first = grant(leases)
    leases.end(first)
    second = grant(leases)
    assert (first.hold_id, second.hold_id) == (1_000, 1_001)
    with pytest.raises(LeaseUnknown):
        leases.find(HoldKind.READ, instance_id=1, hold_id=1_000)


def test_a_hold_is_found_by_its_own_instance_and_kind_only(leases: Leases) -> None:
    hold = grant(leases, HoldKind.WRITE)
    assert leases.find(HoldKind.WRITE, instance_id=1, hold_id=hold.hold_id) is hold
    for kind, instance_id, hold_id in [
        (HoldKind.WRITE, 2, hold.hold_id),
        (HoldKind.READ, 1, hold.hold_id),
        (HoldKind.WRITE, 1, hold.hold_id + 1),
        (HoldKind.WRITE, 1, 0),
    ]:
        with pytest.raises(LeaseUnknown, match=f"no {kind.value} {hold_id} for this instance"):
            leases.find(kind, instance_id=instance_id, hold_id=hold_id)


def test_an_expired_hold_is_still_found(leases: Leases) -> None:
    hold = grant(leases)
    leases.expire(100.0)
    assert leases.find(HoldKind.READ, instance_id=1, hold_id=hold.hold_id) is hold


@pytest.mark.parametrize(("kind", "bound"), [(HoldKind.READ, READS_MAX), (HoldKind.WRITE, WRITES_MAX)])
def test_each_kind_is_bounded_for_each_instance(leases: Leases, kind: HoldKind, bound: int) -> None:
    holds = [grant(leases, kind) for _ in range(bound)]
    with pytest.raises(Overloaded, match=f"already has {bound} {kind.value}s"):
        leases.require_room(kind, 1)
    with pytest.raises(Overloaded):
        grant(leases, kind)
    assert leases.count(kind, instance_id=1) == bound
    grant(leases, kind, instance_id=2)
    other = HoldKind.WRITE if kind is HoldKind.READ else HoldKind.READ
    grant(leases, other)
    # An expired hold counts until it is ended: its slots are still out of use.
    leases.expire(100.0)
    with pytest.raises(Overloaded):
        grant(leases, kind, now_s=100.0)
    leases.end(holds[0])
    grant(leases, kind, now_s=100.0)


def test_holds_are_found_by_request_and_by_instance(leases: Leases) -> None:
    read = grant(leases, request_id="r")
    write = grant(leases, HoldKind.WRITE, request_id="r")
    other = grant(leases, request_id="s")
    foreign = grant(leases, instance_id=2, request_id="r")
    assert leases.of_request(1, "r") == [read, write]
    assert leases.of_request(2, "r") == [foreign]
    assert leases.of_request(3, "r") == []
    assert leases.of_instance(1) == [read, write, other]
    leases.end(read)
    assert leases.of_request(1, "r") == [write]


def test_a_broken_stream_expires_the_live_holds_of_its_instance_only(leases: Leases) -> None:
    early = grant(leases, duration_s=1.0)
    late = grant(leases, HoldKind.WRITE)
    foreign = grant(leases, instance_id=2)
    leases.expire(1.0)
    assert leases.expire_instance(1) == [late]
    assert (early.expired, late.expired, foreign.expired) == (True, True, False)
    assert leases.expire_instance(1) == []
    assert leases.expire(100.0) == [foreign]


def test_slots_of_expired_holds_are_in_quarantine_until_they_end(leases: Leases) -> None:
    first = grant(leases, slots=3, duration_s=1.0)
    second = grant(leases, HoldKind.WRITE, instance_id=2, slots=5, duration_s=2.0)
    assert leases.quarantined_slots() == 0
    leases.expire(1.0)
    assert leases.quarantined_slots() == 3
    leases.expire(2.0)
    assert leases.quarantined_slots() == 8
    assert leases.quarantined_slots(instance_id=1) == 3
    assert leases.quarantined_slots(instance_id=2) == 5
    assert leases.quarantined_slots(instance_id=3) == 0
    leases.end(first)
    assert leases.quarantined_slots() == 5
    leases.end(second)
    assert leases.quarantined_slots() == 0


def test_counts_are_by_kind_of_one_instance_or_of_all(leases: Leases) -> None:
    hold = grant(leases)
    grant(leases, HoldKind.WRITE)
    grant(leases, instance_id=2)
    assert leases.count(HoldKind.READ) == 2
    assert leases.count(HoldKind.WRITE) == 1
    assert leases.count(HoldKind.READ, instance_id=2) == 1
    leases.end(hold)
    assert leases.count(HoldKind.READ) == 1
    assert leases.count(HoldKind.READ, instance_id=1) == 0


def test_positions_number_the_granted_slots(leases: Leases) -> None:
    assert grant(leases, slots=4).positions.tolist() == [0, 1, 2, 3]


def test_holds_that_ended_long_before_their_expiry_take_no_memory(leases: Leases, traced: None) -> None:
    stays = grant(leases, duration_s=1e9)
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(20_000):
        leases.end(grant(leases, duration_s=1e9))
    after, _ = tracemalloc.get_traced_memory()
    # An entry of the heap takes about 120 bytes: 20,000 of them would be 2.4 MB.
    assert after - before < 500_000
    assert leases.expire(2e9) == [stays]


def test_holds_that_are_renewed_all_the_time_take_no_memory(leases: Leases, traced: None) -> None:
    holds = [grant(leases, duration_s=1e9) for _ in range(READS_MAX)]
    before, _ = tracemalloc.get_traced_memory()
    for number in range(20_000):
        leases.renew(holds[number % READS_MAX], now_s=float(number), duration_s=1e9)
    after, _ = tracemalloc.get_traced_memory()
    assert after - before < 500_000
    assert leases.expire(1e9 + 19_996) == []
    assert len(leases.expire(1e9 + 20_000)) == READS_MAX


def test_instances_that_left_take_no_memory(leases: Leases, traced: None) -> None:
    before, _ = tracemalloc.get_traced_memory()
    for instance_id in range(20_000):
        leases.end(grant(leases, instance_id=instance_id))
    after, _ = tracemalloc.get_traced_memory()
    assert after - before < 500_000
    assert leases.count(HoldKind.READ) == 0


# ------------------------------------------------------------------- attempts


def attempt(leases: Leases, attempt_id: int, kind: HoldKind = HoldKind.READ, *, instance_id: int = 1) -> Hold:
    return leases.grant(
        kind,
        instance_id=instance_id,
        request_id="",
        session_id="",
        namespace=KEY,
        slots=np.arange(2, dtype=np.int32),
        now_s=0.0,
        duration_s=10.0,
        attempt_id=attempt_id,
    )


def test_what_attempts_were_granted_is_found_by_them(leases: Leases) -> None:
    read, write, other = attempt(leases, 1), attempt(leases, 2, HoldKind.WRITE), attempt(leases, 3)
    attempt(leases, 1, instance_id=2)
    assert leases.give_up(1, [1, 2]) == [read, write]
    assert leases.give_up(1, [3]) == [other]
    assert leases.give_up(9, [1]) == []


def test_an_attempt_given_up_before_is_never_granted(leases: Leases) -> None:
    assert leases.give_up(1, [5]) == []
    with pytest.raises(LeaseExpired, match="attempt 5 was released before it was granted"):
        leases.require_room(HoldKind.READ, 1, attempt_id=5)
    with pytest.raises(LeaseExpired):
        attempt(leases, 5)
    assert leases.count(HoldKind.READ) == 0
    attempt(leases, 6)
    attempt(leases, 5, instance_id=2)


def test_attempts_that_were_granted_need_not_be_remembered(leases: Leases) -> None:
    (hold,) = leases.give_up(1, [attempt(leases, 5).attempt_id])
    leases.end(hold)
    leases.require_room(HoldKind.READ, 1, attempt_id=5)


def test_no_attempt_is_not_everybodys(leases: Leases) -> None:
    grant(leases)
    assert leases.give_up(1, [0]) == []
    grant(leases)


def test_attempts_given_up_are_bounded_and_go_with_their_process(leases: Leases) -> None:
    for attempt_id in range(1, GIVEN_UP_MAX + 3):
        leases.give_up(1, [attempt_id])
    leases.require_room(HoldKind.READ, 1, attempt_id=2)
    with pytest.raises(LeaseExpired):
        leases.require_room(HoldKind.READ, 1, attempt_id=3)
    leases.forget_instance(1)
    leases.require_room(HoldKind.READ, 1, attempt_id=3)
