"""lookahead: windows, rates, what to fetch now, load or recompute."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice.lookahead import (
    Fetch,
    Job,
    Plan,
    Planner,
    Speeds,
    Throughput,
    Windows,
    load_or_recompute,
    window_lengths,
)

pytestmark = pytest.mark.unit

BLOCK_BYTES = 100


# -------------------------------------------------------------- windows and rates


def test_window_lengths_are_the_papers() -> None:
    """Figure 9: two blocks of DRAM and four of disk, a session each."""
    assert window_lengths(2, 4, 1.0) == Windows(prefetch=2, eviction=6)
    assert window_lengths(1000, 9000, 3.0) == Windows(333, 3333)
    assert window_lengths(10, 10, 0.0) == Windows(0, 0), "an empty queue has no mean"


def test_throughput_counts_busy_time_only() -> None:
    rate = Throughput()
    assert (rate.bytes_per_s, rate.wait_s) == (0.0, 0.0)
    rate.began(100, 10.0)
    rate.began(100, 10.0)
    rate.ended(100, 100, 11.0)
    rate.ended(100, 100, 12.0)
    rate.began(100, 500.0)  # idle in between
    assert math.isclose(rate.bytes_per_s, 100.0)
    assert math.isclose(rate.wait_s, 1.0)


def test_throughput_follows_a_device_that_slows_down() -> None:
    rate, now_s = Throughput(), 0.0
    for seconds in [0.1] * 50 + [1.0] * 20:
        rate.began(100, now_s)
        now_s += seconds
        rate.ended(100, 100, now_s)
    assert 100 <= rate.bytes_per_s < 160


def test_throughput_forgets_what_was_long_ago() -> None:
    """A device that was slow once is not slow for ever because nobody asks it for anything any more."""
    rate = Throughput()
    rate.began(100, 0.0)
    rate.ended(100, 100, 100.0)
    assert rate.is_current(150.0)
    assert not rate.is_current(200.0)
    rate.began(100, 200.0)
    rate.ended(100, 100, 201.0)
    assert (rate.bytes_per_s, rate.is_current(202.0)) == (100.0, True)
    assert not Throughput().is_current(0.0)


def test_what_failed_or_was_cancelled_moved_nothing() -> None:
    rate = Throughput()
    rate.began(100, 0.0)
    rate.began(900, 0.0)
    rate.ended(900, 0, 0.0)
    rate.ended(100, 100, 1.0)
    assert (rate.bytes_per_s, rate.pending_bytes) == (100.0, 0)


# ----------------------------------------------------------------------- planner


def job(
    name: str,
    order: float,
    missing: Sequence[int],
    *,
    arriving: Sequence[int] = (),
    starts_at_s: float = 0.0,
    group: Hashable = "g",
) -> Job:
    blocks = (np.array(missing, dtype=np.int32), np.array(arriving, dtype=np.int32))
    return Job(name, group, order, starts_at_s, *blocks, BLOCK_BYTES)


def planner(fetch_blocks: int = 2, ahead_blocks: int = 100, ahead_s: float = 1.0) -> Planner:
    return Planner(
        fetch_bytes_max=fetch_blocks * BLOCK_BYTES, bytes_ahead_min=ahead_blocks * BLOCK_BYTES, ahead_s=ahead_s
    )


def planned(of: Planner, *jobs: Job, room: int = 1000, bytes_per_s: float = 0.0, now_s: float = 0.0) -> Plan:
    return of.plan(jobs, room={job.group: room for job in jobs}, bytes_per_s=bytes_per_s, now_s=now_s)


def blocks(fetches: Sequence[Fetch]) -> list[tuple[int, ...]]:
    return [fetch.blocks for fetch in fetches]


def test_fetches_follow_the_queue_and_each_chain_from_its_root() -> None:
    plan = planned(planner(), job("late", 7.0, [5, 6]), job("soon", 1.5, [3, 1, 2]))
    assert blocks(plan.start) == [(3, 1), (2,), (5, 6)]
    assert [fetch.key for fetch in plan.start] == ["soon", "soon", "late"]


def test_a_shared_prefix_is_fetched_once() -> None:
    plan = planned(planner(), job("a", 1, [1, 2, 3]), job("b", 2, [1, 2, 4]))
    assert blocks(plan.start) == [(1, 2), (3,), (4,)]


def test_nothing_is_fetched_twice_while_it_is_on_its_way() -> None:
    of = planner()
    planned(of, job("a", 1, [1, 2]))
    assert planned(of, job("a", 1, [1, 2])).start == []
    of.ended(1)
    assert blocks(planned(of, job("a", 1, [1, 2])).start) == [(1, 2)], "it failed: it may be tried again"


def test_what_nobody_needs_any_more_is_cancelled() -> None:
    of = planner()
    planned(of, job("a", 1, [1, 2]), job("b", 2, [3]))
    plan = planned(of, job("b", 2, [], arriving=[3]))
    assert (plan.cancel, plan.start, plan.reorder) == ([1], [], [])


def test_the_queues_new_order_is_that_of_the_fetches() -> None:
    of = planner()
    planned(of, job("a", 1, [1]), job("b", 2, [2]))
    plan = planned(of, job("a", 5, [], arriving=[1]), job("b", 2, [], arriving=[2]), job("c", 3, [9]))
    assert list(plan.reorder) == [(1, 5)]
    assert [(fetch.blocks, fetch.order) for fetch in plan.start] == [((9,), 3)]


def test_only_so_much_is_on_its_way_and_the_rest_follows() -> None:
    of = planner(ahead_blocks=4)
    jobs = [job(str(number), number, [10 * number, 10 * number + 1]) for number in range(5)]
    assert blocks(planned(of, *jobs).start) == [(0, 1), (10, 11)]
    of.ended(1)
    waiting = [job("1", 1, [], arriving=[10, 11]), *jobs[2:]]
    assert blocks(planned(of, *waiting).start) == [(20, 21)]


def test_the_urgent_overtake_a_full_device_and_the_overtaken_give_way() -> None:
    of = planner(ahead_blocks=2)
    assert blocks(planned(of, job("a", 5, [1, 2])).start) == [(1, 2)]
    first = job("a", 5, [], arriving=[1, 2])
    assert blocks(planned(of, first, job("b", 4, [3, 4])).start) == [(3, 4)]
    plan = planned(of, first, job("b", 4, [], arriving=[3, 4]), job("c", 3, [5, 6]))
    assert blocks(plan.start) == [(5, 6)]
    assert plan.cancel == [1], "the last in the queue's order"


def test_who_can_wait_lets_those_pass_who_cannot() -> None:
    """Two instances: the second of a slow one starts in a minute, the third of a fast one at once."""
    slow, fast = job("slow", 2, [1], starts_at_s=60.0), job("fast", 3, [2], starts_at_s=0.1)
    assert blocks(planned(planner(), slow, fast, bytes_per_s=1000.0).start) == [(2,), (1,)]
    assert blocks(planned(planner(), slow, fast, bytes_per_s=1000.0, now_s=59.5).start) == [(1,), (2,)]


def test_what_takes_long_to_fetch_is_urgent_earlier() -> None:
    long = job("long", 3, list(range(100, 160)), starts_at_s=60.0)
    short = job("short", 2, [1], starts_at_s=60.0)
    assert planned(planner(60), short, long, bytes_per_s=100.0).start[0].key == "long"


def test_room_bounds_what_is_started() -> None:
    assert blocks(planned(planner(), job("a", 1, [1, 2, 3]), job("b", 2, [4]), room=2).start) == [(1, 2)]
    assert planned(planner(), job("a", 1, [1]), room=0).start == []
    assert planner().plan([job("a", 1, [1])], room={}, bytes_per_s=0.0, now_s=0.0).start == []


jobs_strategy = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 6), st.floats(0, 100), st.floats(0, 5)), max_size=6
)


@settings(max_examples=100, deadline=None)
@given(rounds=st.lists(jobs_strategy, min_size=1, max_size=12), room=st.integers(0, 12), data=st.data())
def test_planner_invariants(rounds: list[list[tuple[int, int, float, float]]], room: int, data: st.DataObject) -> None:
    """Whatever the queue and the device do: no block twice, books that add up, bounds kept, nothing left behind."""
    of = planner(ahead_blocks=4)
    in_flight: dict[int, Fetch] = {}
    in_dram: set[int] = set()
    for round_, told in enumerate([*rounds, []]):
        on_the_way = {block for fetch in in_flight.values() for block in fetch.blocks}
        jobs = []
        for talk, length, order, starts_at_s in told:
            needed = [10 * talk + position for position in range(length)]
            jobs.append(
                job(
                    f"{talk}",
                    order,
                    [block for block in needed if block not in on_the_way | in_dram],
                    arriving=[block for block in needed if block in on_the_way],
                    starts_at_s=starts_at_s,
                )
            )
        plan = planned(of, *jobs, room=room, bytes_per_s=300.0, now_s=float(round_))
        fetched = [block for fetch in plan.start for block in fetch.blocks]
        assert len(set(fetched)) == len(fetched) <= room
        assert not set(fetched) & (on_the_way | in_dram)
        assert set(plan.cancel) <= in_flight.keys()
        in_flight |= {fetch.number: fetch for fetch in plan.start}
        assert of.in_flight_bytes == sum(fetch.size_bytes for fetch in in_flight.values())
        wanted = {block for one in jobs for block in (*one.missing.tolist(), *one.arriving.tolist())}
        for number, fetch in in_flight.items():
            assert number in plan.cancel or wanted & set(fetch.blocks)
        some = st.lists(st.sampled_from(sorted(in_flight))) if in_flight else st.just([])
        for number in set(plan.cancel if round_ == len(rounds) else data.draw(some)):
            of.ended(number)
            landed = in_flight.pop(number)
            in_dram |= set(landed.blocks) if number not in plan.cancel else set()
    assert (of.in_flight_bytes, in_flight) == (0, {})


@given(
    sizes=st.lists(st.integers(1, 8), min_size=2, max_size=8),
    gap_s=st.floats(0.1, 3.0),
)
def test_what_is_needed_first_arrives_first(sizes: list[int], gap_s: float) -> None:
    """A device that serves by `order`, under a simulated clock: chains are complete in the order of the queue."""
    of = planner(fetch_blocks=2, ahead_blocks=6)
    left = {name: [100 * name + position for position in range(size)] for name, size in enumerate(sizes)}
    orders: dict[int, tuple[float, Fetch]] = {}
    complete: list[int] = []
    now_s = 0.0
    while any(left.values()):
        on_the_way = {block for _, fetch in orders.values() for block in fetch.blocks}
        jobs = [
            job(
                str(name),
                name,
                [block for block in chain if block not in on_the_way],
                arriving=[block for block in chain if block in on_the_way],
                starts_at_s=(name + 1) * gap_s,
            )
            for name, chain in left.items()
        ]
        plan = planned(of, *jobs, bytes_per_s=200.0, now_s=now_s)
        for number, order in plan.reorder:
            orders[number] = (order, orders[number][1])
        orders |= {fetch.number: (fetch.order, fetch) for fetch in plan.start}
        number = min(orders, key=lambda number: (orders[number][0], number))
        _, fetch = orders.pop(number)
        now_s += fetch.size_bytes / 200.0
        of.ended(number)
        name = fetch.blocks[0] // 100
        left[name] = [block for block in left[name] if block not in fetch.blocks]
        if not left[name]:
            complete.append(name)
    assert complete == sorted(complete)


# -------------------------------------------------------------- load or recompute


def choose(dram: int, held: int, **speeds: float) -> int:
    plan = load_or_recompute(dram, held, block_bytes=1000, tokens_per_block=10, speeds=Speeds(**speeds))
    return plan.blocks


def test_all_is_loaded_where_loading_is_faster() -> None:
    assert choose(4, 10, prefill_tokens_per_s=100, copy_bytes_per_s=1e6, nvme_bytes_per_s=1e5) == 10


def test_a_slow_device_leaves_what_is_in_dram() -> None:
    assert choose(4, 10, prefill_tokens_per_s=100, copy_bytes_per_s=1e6, nvme_bytes_per_s=5e3) == 4


def test_a_long_queue_before_the_device_counts() -> None:
    fast = {"prefill_tokens_per_s": 100.0, "copy_bytes_per_s": 1e6, "nvme_bytes_per_s": 1e6}
    assert choose(4, 10, **fast, nvme_wait_s=0.1) == 10
    assert choose(4, 10, **fast, nvme_wait_s=1.0) == 4


def test_an_engine_faster_than_copies_computes_everything() -> None:
    assert choose(10, 10, prefill_tokens_per_s=1e6, copy_bytes_per_s=1e6) == 0


def test_a_tie_is_computed() -> None:
    """Estimates are never exact: what gains less than 5 % is not waited for."""
    assert choose(0, 10, prefill_tokens_per_s=100, nvme_bytes_per_s=10_200) == 0
    assert choose(0, 10, prefill_tokens_per_s=100, nvme_bytes_per_s=11_000) == 10


def test_what_was_never_measured_is_loaded() -> None:
    assert choose(4, 10, prefill_tokens_per_s=0.0, nvme_bytes_per_s=1.0) == 10
    assert choose(4, 10, prefill_tokens_per_s=100.0) == 10


@given(
    dram=st.integers(0, 20),
    on_nvme=st.integers(0, 20),
    prefill=st.floats(1, 1e6),
    copy=st.floats(1, 1e9),
    nvme=st.floats(1, 1e9),
    wait_s=st.floats(0, 10),
)
def test_the_choice_is_never_worse_than_computing_everything(
    dram: int, on_nvme: int, prefill: float, copy: float, nvme: float, wait_s: float
) -> None:
    speeds = Speeds(prefill, copy, nvme, wait_s)
    plan = load_or_recompute(dram, dram + on_nvme, block_bytes=1000, tokens_per_block=10, speeds=speeds)
    assert plan.blocks in {0, dram, dram + on_nvme}
    assert plan.load_s <= plan.recompute_s
    assert math.isclose(plan.recompute_s, plan.blocks * 10 / prefill)
