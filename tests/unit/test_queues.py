"""queues: each queue stays in step with its engine whatever happens to the messages, and all merge fairly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice.errors import InvalidRequest
from kvservice.queues import (
    Bounds,
    Entry,
    MergedQueues,
    Moved,
    QueueDelta,
    QueueSnapshot,
    QueueUpdate,
    UpdateOutcome,
)
from kvservice.queues.waiting import WaitingQueue
from kvservice.service.hints import queue_update
from kvservice_client.waiting import QueueLimits, QueueMirror, WaitingRequest
from tests.stores import HASH_BYTES, chain

pytestmark = pytest.mark.unit

BOUNDS = Bounds(entries_max=50, blocks_max=400, hashes_per_entry_max=20)
LIMITS = QueueLimits(BOUNDS.entries_max, BOUNDS.blocks_max, BOUNDS.hashes_per_entry_max)


def queue_of(*names: str, bounds: Bounds = BOUNDS) -> WaitingQueue:
    queue = WaitingQueue(hash_size_bytes=HASH_BYTES, bounds=bounds)
    assert queue.replace(QueueSnapshot(1, [entry(name) for name in names])) is UpdateOutcome.APPLIED
    return queue


def entry(name: str, blocks: int = 3) -> Entry:
    return Entry(name, b"".join(chain(name, blocks)))


def names(queue: WaitingQueue) -> list[str]:
    return [request.request_id for request in queue.requests]


def applied(queue: WaitingQueue, update: QueueUpdate) -> UpdateOutcome:
    return queue.replace(update) if isinstance(update, QueueSnapshot) else queue.change(update, 0.0)


# ------------------------------------------------------------ one queue, in order


def test_a_delta_changes_what_it_names() -> None:
    queue = queue_of("a", "b", "c", "d")
    delta = QueueDelta(
        1, 1, started=["a"], removed=["c"], moved=[Moved("d", 0)], added=[(1, entry("e")), (3, entry("f"))]
    )
    assert queue.change(delta, 0.0) is UpdateOutcome.APPLIED
    assert names(queue) == ["d", "e", "b", "f"]


def test_what_stays_is_the_same_object() -> None:
    queue = queue_of("a", "b")
    a, b = queue.requests
    queue.replace(QueueSnapshot(2, [entry("b"), entry("a", 5)]))
    assert queue.requests[0] is b
    assert queue.requests[1] is not a


def test_a_chain_begins_with_one_that_was_told_before() -> None:
    queue = queue_of("a", "b")
    tail = chain("a", 5)[3:]
    queue.change(QueueDelta(1, 1, started=["a"]), 0.0)
    added = Entry("next", b"".join(tail), prefix_request_id="a", prefix_blocks=3)
    assert queue.change(QueueDelta(1, 2, added=[(1, added)]), 0.0) is UpdateOutcome.APPLIED
    assert queue.requests[1].chain.hashes() == chain("a", 5)


@pytest.mark.parametrize(("prefix", "blocks"), [("nobody", 1), ("a", 4)])
def test_an_unknown_chain_asks_for_everything(prefix: str, blocks: int) -> None:
    queue = queue_of("a")
    added = Entry("next", prefix_request_id=prefix, prefix_blocks=blocks)
    assert queue.change(QueueDelta(1, 1, added=[(0, added)]), 0.0) is UpdateOutcome.SNAPSHOT_WANTED
    assert names(queue) == ["a"]


@pytest.mark.parametrize(
    "delta",
    [
        QueueDelta(1, 1, started=["x"]),
        QueueDelta(1, 1, removed=["x"]),
        QueueDelta(1, 1, moved=[Moved("x", 0)]),
        QueueDelta(1, 1, added=[(0, entry("a"))]),
        QueueDelta(1, 2),
        QueueDelta(2, 1),
    ],
)
def test_a_queue_that_disagrees_keeps_what_it_has_until_a_snapshot(delta: QueueDelta) -> None:
    queue = queue_of("a", "b")
    assert queue.change(delta, 0.0) is UpdateOutcome.SNAPSHOT_WANTED
    assert queue.change(QueueDelta(1, 1, started=["a"]), 0.0) is UpdateOutcome.SNAPSHOT_WANTED
    assert names(queue) == ["a", "b"]
    assert queue.replace(QueueSnapshot(3, [entry("c")])) is UpdateOutcome.APPLIED
    assert queue.change(QueueDelta(3, 1, started=["c"]), 0.0) is UpdateOutcome.APPLIED


def test_a_delta_before_any_snapshot_asks_for_one() -> None:
    queue = WaitingQueue(hash_size_bytes=HASH_BYTES, bounds=BOUNDS)
    assert queue.change(QueueDelta(1, 1, added=[(0, entry("a"))]), 0.0) is UpdateOutcome.SNAPSHOT_WANTED


def test_what_was_seen_before_changes_nothing() -> None:
    queue = queue_of("a", "b")
    delta = QueueDelta(1, 1, started=["a"])
    queue.change(delta, 0.0)
    assert queue.change(delta, 0.0) is UpdateOutcome.OUTDATED
    assert queue.replace(QueueSnapshot(1, [entry("z")])) is UpdateOutcome.OUTDATED
    assert queue.replace(QueueSnapshot(2, [entry("b")])) is UpdateOutcome.APPLIED
    assert queue.change(QueueDelta(1, 2, removed=["b"]), 0.0) is UpdateOutcome.OUTDATED
    assert names(queue) == ["b"]


# ----------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (QueueSnapshot(2, [entry("a"), entry("a")]), "named twice"),
        (QueueSnapshot(2, [entry(str(number), 1) for number in range(51)]), "queue_entries_max"),
        (QueueSnapshot(2, [entry(str(number), 20) for number in range(21)]), "queue_blocks_max"),
        (QueueSnapshot(2, [entry("a", 21)]), "at most 20"),
        (QueueSnapshot(2, [Entry("a", b"short")]), "multiple"),
        (QueueSnapshot(2, [Entry("", b"")]), "no id"),
        (QueueSnapshot(2, [Entry("a", prefix_blocks=1)]), "prefix_request_id"),
        (QueueDelta(1, 1, started=["a"], removed=["a"]), "named twice"),
        (QueueDelta(1, 1, moved=[Moved("a", 0), Moved("a", 1)]), "named twice"),
        (QueueDelta(1, 1, moved=[Moved("a", 1), Moved("b", 1)]), "same position"),
        (QueueDelta(1, 1, moved=[Moved("a", 2)]), "position 2"),
        (QueueDelta(1, 1, moved=[Moved("a", -1)]), "position"),
        (QueueDelta(1, 1, added=[(9, entry("c"))]), "position 9"),
        (QueueDelta(1, 1, added=[(number + 2, entry(str(number), 1)) for number in range(49)]), "queue_entries_max"),
    ],
)
def test_a_contradictory_or_endless_update_is_refused_and_changes_nothing(update: QueueUpdate, message: str) -> None:
    queue = queue_of("a", "b")
    before = (names(queue), queue.epoch, queue.sequence)
    with pytest.raises(InvalidRequest, match=message):
        applied(queue, update)
    assert (names(queue), queue.epoch, queue.sequence) == before
    assert queue.change(QueueDelta(1, 1, started=["a"]), 0.0) is UpdateOutcome.APPLIED


def test_an_endless_churn_is_remembered_within_the_bounds() -> None:
    queue = queue_of()
    for number in range(500):
        queue.change(QueueDelta(1, 2 * number + 1, added=[(0, entry(str(number), 20))]), 0.0)
        queue.change(QueueDelta(1, 2 * number + 2, started=[str(number)]), 0.0)
    assert len(queue._left) <= BOUNDS.entries_max
    assert queue._left_blocks == sum(map(len, queue._left.values())) <= BOUNDS.blocks_max


# ---------------------------------------------- convergence over a bad connection

requests = st.integers(0, 11)
queues = st.lists(requests, unique=True, max_size=9)


@settings(max_examples=300, deadline=None)
@given(
    wanted=st.lists(queues, min_size=1, max_size=8),
    fates=st.lists(st.sampled_from(["arrives", "lost", "twice", "late"]), min_size=40, max_size=40),
    grown=st.lists(st.integers(1, 25), min_size=12, max_size=12),
)
def test_client_and_daemon_converge_whatever_happens_to_the_messages(
    wanted: list[list[int]], fates: list[str], grown: list[int]
) -> None:
    """The client's own differ against the room; what is lost, doubled or late is healed by the answers."""
    queue = WaitingQueue(hash_size_bytes=HASH_BYTES, bounds=BOUNDS)
    mirror = QueueMirror(LIMITS)
    late: list[QueueUpdate] = []
    before: list[int] = []
    for round_, numbers in enumerate([*wanted, wanted[-1]]):
        is_last = round_ == len(wanted)
        waiting = [of(number, grown[number] + round_ // 3) for number in numbers]
        started = [str(number) for number in before if number not in numbers and number % 2]
        for _ in range(3):
            is_told = True
            for message in mirror.updates(waiting, started):
                fate = fates.pop() if fates and not is_last else "arrives"
                update = queue_update(message)
                while late and fate == "arrives":
                    applied(queue, late.pop())
                if fate == "late":
                    late.append(update)
                outcome = applied(queue, update) if fate in {"arrives", "twice"} else None
                if fate == "twice":
                    assert applied(queue, update) is not UpdateOutcome.APPLIED
                if outcome is not UpdateOutcome.APPLIED:
                    mirror.lost()
                    is_told = False
                    break
            if is_told:
                assert names(queue) == [str(number) for number in numbers]
                for request, asked in zip(queue.requests, waiting, strict=True):
                    assert request.chain.hashes() == list(asked.hashes)[: BOUNDS.hashes_per_entry_max]
                break
        assert is_told or not is_last
        before = numbers


def of(number: int, blocks: int) -> WaitingRequest:
    # Two conversations share all chains: references to another request's chain occur.
    return WaitingRequest(str(number), chain(f"talk {number % 2}", blocks), session_id=f"talk {number % 2}")


@given(before=queues, after=queues)
def test_a_delta_moves_as_few_as_can_be(before: list[int], after: list[int]) -> None:
    mirror = QueueMirror(LIMITS)
    list(mirror.updates([of(number, 2) for number in before]))
    messages = list(mirror.updates([of(number, 2) for number in after]))
    assert len(messages) == (before != after)
    both = [number for number in before if number in after]
    stay = longest_common_subsequence(both, [number for number in after if number in both])
    assert sum(len(message.delta.moves) for message in messages) == len(both) - stay


def longest_common_subsequence(one: Sequence[int], other: Sequence[int]) -> int:
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, first in enumerate(one):
        for j, second in enumerate(other):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if first == second else max(lengths[i][j + 1], lengths[i + 1][j])
    return lengths[-1][-1]


def test_the_client_sends_no_more_than_the_daemon_takes() -> None:
    mirror = QueueMirror(LIMITS)
    endless = [of(number, 30) for number in range(1000)]
    queue = WaitingQueue(hash_size_bytes=HASH_BYTES, bounds=BOUNDS)
    for message in mirror.updates([*endless, endless[0], WaitingRequest("x" * 300, [])]):
        assert applied(queue, queue_update(message)) is UpdateOutcome.APPLIED
    assert len(queue) == BOUNDS.entries_max
    assert sum(len(request.chain) for request in queue.requests) == BOUNDS.blocks_max


# ---------------------------------------------------------------- the common order


def merged_of(**queues: Sequence[str]) -> MergedQueues:
    merged = MergedQueues(bounds=BOUNDS)
    for owner, waiting in queues.items():
        merged.apply(owner, QueueSnapshot(1, [entry(name) for name in waiting]), hash_size_bytes=HASH_BYTES, now_s=0.0)
    return merged


def ordered(merged: MergedQueues, requests_max: int = 100) -> list[str]:
    arranged, _ = merged.arrange(list(merged.owners()), requests_max=requests_max, now_s=0.0)
    return [one.request.request_id for one in arranged]


def test_queues_take_turns() -> None:
    merged = merged_of(one=["a1", "a2", "a3"], other=["b1", "b2"])
    assert ordered(merged) == ["a1", "b1", "a2", "b2", "a3"]
    assert ordered(merged, 3) == ["a1", "b1", "a2"]


def test_a_start_renumbers_nobody() -> None:
    merged = merged_of(one=["a", "b", "c", "d"])
    ordered(merged)
    for sequence, name in enumerate("abc", 1):
        change = QueueDelta(1, sequence, started=[name])
        assert [of_start.request_id for of_start in start(merged, "one", change).started] == [name]
        assert merged.arrange(["one"], requests_max=100, now_s=0.0)[1] == 0


def start(merged: MergedQueues, owner: str, delta: QueueDelta, now_s: float = 0.0):  # type: ignore[no-untyped-def]
    return merged.apply(owner, delta, hash_size_bytes=HASH_BYTES, now_s=now_s)


def test_the_end_of_an_instance_takes_its_queue_along() -> None:
    merged = merged_of(one=["a"], other=["b", "c"])
    assert [request.request_id for request in merged.remove("other")] == ["b", "c"]
    assert merged.remove("nobody") == ()
    assert (len(merged), ordered(merged)) == (1, ["a"])


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 15), min_size=2, max_size=4),
    starting=st.lists(st.integers(0, 3), max_size=30),
)
def test_no_queue_gets_far_ahead_of_another(lengths: list[int], starting: list[int]) -> None:
    """Whoever starts how much how fast: positions in the common order are those of turns, about."""
    merged = MergedQueues(bounds=BOUNDS)
    waiting = {owner: [f"{owner}/{number}" for number in range(length)] for owner, length in enumerate(lengths)}
    sequences = dict.fromkeys(waiting, 0)
    for owner, of_owner in waiting.items():
        snapshot = QueueSnapshot(1, [entry(name, 1) for name in of_owner])
        merged.apply(owner, snapshot, hash_size_bytes=HASH_BYTES, now_s=0.0)
    for owner in starting:
        if waiting.get(owner):
            sequences[owner] += 1
            delta = QueueDelta(1, sequences[owner], started=[waiting[owner].pop(0)])
            merged.apply(owner, delta, hash_size_bytes=HASH_BYTES, now_s=0.0)
        order = ordered(merged)
        assert sorted(order) == sorted(name for of_owner in waiting.values() for name in of_owner)
        for of_owner in waiting.values():
            places = [order.index(name) for name in of_owner]
            assert places == sorted(places)
            for position, place in enumerate(places):
                in_turn = sum(min(len(other), position + 1) for other in waiting.values())
                slack = len(waiting) * (2 + position / 3)
                assert place <= in_turn + slack


def test_start_times_follow_the_pace_of_the_queue() -> None:
    merged = merged_of(one=[str(number) for number in range(10)])
    assert start_times(merged, 7.0)[:2] == [("0", 8.0), ("1", 9.0)], "a second each until one is seen"
    for number in range(8):
        start(merged, "one", QueueDelta(1, number + 1, started=[str(number)]), now_s=10.0 + number / 2)
    (next_, next_s), (last, last_s) = start_times(merged, 13.6)
    assert (next_, last) == ("8", "9")
    assert math.isclose(next_s, 14.0)
    assert math.isclose(last_s, 14.5)
    assert start_times(merged, 99.0)[0] == ("8", 99.0), "never in the past"


def start_times(merged: MergedQueues, now_s: float) -> list[tuple[str, float]]:
    arranged, _ = merged.arrange(["one"], requests_max=100, now_s=now_s)
    return [(one.request.request_id, one.starts_at_s) for one in arranged]
