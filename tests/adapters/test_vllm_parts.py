"""The vLLM adapter's parts that need no vLLM: options, the view of the queue, lookups, saves that must not read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import kvservice_client as kv
from kvservice_adapters.speed import PrefillSpeed
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.lookups import Held, Lookups
from kvservice_adapters.vllm.options import AdapterOptions
from kvservice_adapters.vllm.queue import QueueTeller
from kvservice_adapters.vllm.waiting import TrackedRequest, WaitingRequests, tags_of
from tests.blocks import chain
from tests.waiting import eventually

pytestmark = pytest.mark.integration

ENGINE_BLOCKS = 64
BLOCK_BYTES = 1024


# --------------------------------------------------------------------- options


def test_options_have_names_types_and_bounds() -> None:
    options = AdapterOptions.from_extra_config({"salt": "x", "load_timeout_s": 3, "copy_threads": 4})
    assert (options.salt, options.load_timeout_s, options.copy_threads) == ("x", 3.0, 4)
    for wrong in ({"slat": "x"}, {"salt": 3}, {"load_timeout_s": -1.0}, {"copy_threads": 0}, {"copy_threads": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AdapterOptions.from_extra_config(wrong)


# ------------------------------------------------------------------- the queue


def request(
    name: str, *, status: str = "WAITING", priority: int = 0, at_s: float = 0.0, preemptions: int = 0, tokens: int = 0
) -> Any:
    return SimpleNamespace(
        request_id=name,
        status=SimpleNamespace(name=status),
        is_finished=lambda: False,
        priority=priority,
        arrival_time=at_s,
        num_preemptions=preemptions,
        num_tokens=tokens,
        num_computed_tokens=0,
        session_id=None,
        kv_transfer_params=None,
    )


@pytest.mark.parametrize(("by_priority", "order"), [(False, ["p", "a", "b"]), (True, ["b", "p", "a"])])
def test_waiting_requests_are_in_the_order_in_which_they_will_run(by_priority: bool, order: list[str]) -> None:
    waiting = WaitingRequests(by_priority=by_priority)
    for one in (
        request("a", at_s=1.0, priority=5),
        request("running", status="RUNNING"),
        request("b", at_s=3.0, priority=1),
        request("p", status="PREEMPTED", at_s=2.0, priority=2, preemptions=1),
    ):
        waiting.add(TrackedRequest(one, "", {}))
    assert [tracked.request_id for tracked in waiting.in_order()] == order
    assert waiting.pop("a") is not None
    assert waiting.pop("a") is None
    assert len(waiting) == 3


def test_the_session_is_what_the_client_says() -> None:
    one = request("a")
    assert tags_of(one) == ("", {})
    one.kv_transfer_params = {"session_id": "from params"}
    assert tags_of(one) == ("from params", one.kv_transfer_params)
    one.session_id = "from the API"
    assert tags_of(one)[0] == "from the API"
    one.session_id = "x" * 500
    long = tags_of(one)[0]
    one.session_id = "x" * 501
    assert len(long) <= 200
    assert tags_of(one)[0] != long


class Told:
    """A client that remembers what it was told of the queue."""

    def __init__(self) -> None:
        self.queues: list[tuple[list[str], set[str]]] = []

    def update_queue(self, waiting: Sequence[kv.WaitingRequest], *, started: set[str]) -> None:
        self.queues.append(([request.request_id for request in waiting], started))


def test_the_daemon_is_told_of_the_queue_when_it_changes() -> None:
    told = Told()
    teller = QueueTeller([told], tokens_per_block=16)  # type: ignore[list-item]  # what it needs of a client
    tracked = {name: TrackedRequest(request(name, tokens=40), "", {}, chain(name, 2)) for name in "abcd"}
    a, b, c, d = tracked.values()
    d.hashes = []  # shorter than a block
    teller.tell([a, b, c, d], tracked.values())
    teller.tell([a, b, c, d], tracked.values())
    a.loading_ids = frozenset({1})  # its load has begun
    teller.tell([a, c, b], tracked.values())
    a.loading_ids, a.request.num_computed_tokens = frozenset(), 32  # it was loaded, and runs with the next step
    teller.tell([a, c, b], tracked.values())
    teller.tell([b], [a, b])  # c was aborted
    b.hashes = chain("b", 3)  # preempted, with more tokens than before
    teller.tell([b], [a, b])
    assert told.queues == [(["a", "b", "c"], set()), (["c", "b"], {"a"}), (["b"], set()), (["b"], set())]


def test_speed_is_measured_where_there_is_enough_to_measure() -> None:
    speed = PrefillSpeed()
    speed.computed(1, 0.01)
    assert speed.tokens_per_s == 0.0
    speed.computed(1000, 1.0)
    assert speed.tokens_per_s == 1000.0
    for _ in range(50):
        speed.computed(500, 1.0)
    assert 500.0 <= speed.tokens_per_s < 510.0


# --------------------------------------------------------------------- lookups


class Answers:
    """A client whose lookups are answered from a list of (blocks to load, in DRAM); the last answer stays."""

    def __init__(self, *answers: tuple[int, int], held: int = 0) -> None:
        self._answers = list(answers)
        self._held = held
        self.prefetched = 0

    def plan_load(self, hashes: Sequence[bytes], *, prefill_tokens_per_s: float, deadline_s: float) -> kv.LoadPlan:
        blocks, in_dram = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        blocks = min(blocks, len(hashes))
        return kv.LoadPlan(blocks, max(blocks, min(self._held, len(hashes))), in_dram)

    def prefetch(self, hashes: Sequence[bytes], *, session_id: str, request_id: str) -> kv.PrefetchResult:
        self.prefetched += 1
        return kv.PrefetchResult()


def asked(*clients: Answers, promotion_wait_s: float = 5.0, is_due: bool = True) -> Held:
    waits = {"lookup_wait_s": 1.0, "promotion_wait_s": promotion_wait_s}
    lookups = Lookups(clients, Counters(), speed=PrefillSpeed(), **waits)  # type: ignore[arg-type]
    lookups.ask("r", "", chain("c", 9), is_due=is_due)
    eventually(lambda: not lookups.is_pending("r"))
    held = lookups.answer("r")
    lookups.forget("r")
    assert lookups.answer("r") is None
    lookups.stop()
    assert held is not None
    return held


class Late(Answers):
    """A client whose answer comes when the test says so."""

    def __init__(self, *answers: tuple[int, int]) -> None:
        super().__init__(*answers)
        self.may_answer = threading.Event()

    def plan_load(self, hashes: Sequence[bytes], *, prefill_tokens_per_s: float, deadline_s: float) -> kv.LoadPlan:
        assert self.may_answer.wait(60)
        return super().plan_load(hashes, prefill_tokens_per_s=prefill_tokens_per_s, deadline_s=deadline_s)


def test_an_idle_engine_waits_for_an_answer_and_for_nothing_else() -> None:
    client = Late((9, 9))
    lookups = Lookups([client], Counters(), speed=PrefillSpeed(), lookup_wait_s=1.0, promotion_wait_s=5.0)  # type: ignore[list-item]
    lookups.wait_for_any(timeout_s=1000)  # nobody asked
    lookups.ask("r", "", chain("c", 9))
    lookups.wait_for_any(timeout_s=0.001)  # the time is over
    assert lookups.is_pending("r")
    waiting = threading.Thread(target=lookups.wait_for_any, args=(1000,))
    waiting.start()
    client.may_answer.set()
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    assert lookups.answer("r") is not None
    lookups.wait_for_any(timeout_s=1000)  # it is there
    lookups.stop()


def test_a_chain_is_held_as_far_as_every_rank_holds_it() -> None:
    held = asked(Answers((7, 7)), Answers((5, 5)), Answers((9, 9)))
    assert (held.blocks, held.ready_blocks, held.asked_blocks) == (5, 5, 9)


def test_blocks_on_their_way_from_nvme_are_waited_for() -> None:
    slow = Answers((6, 2), (6, 4), (6, 6))
    held = asked(slow, Answers((6, 6)))
    assert (held.blocks, held.is_ready, slow.prefetched) == (6, True, 1)


def test_what_is_not_due_yet_is_neither_fetched_nor_waited_for() -> None:
    slow = Answers((6, 2), (6, 6))
    held = asked(slow, is_due=False)
    assert (held.blocks, held.is_ready, slow.prefetched) == (6, False, 0)


def test_what_is_not_worth_loading_is_asked_for_again_when_it_is_due() -> None:
    """The queue may have had it fetched by then."""
    early = asked(Answers((0, 0), held=6), is_due=False)
    assert (early.blocks, early.held_blocks, early.is_early) == (0, 6, True)
    due = asked(Answers((0, 0), held=6), Answers((9, 9)))
    assert (due.blocks, due.held_blocks, due.is_early) == (0, 6, False)
    assert not asked(Answers((6, 2)), is_due=False).is_early, "all that is held is to be loaded"


def test_blocks_that_do_not_come_in_time_are_left_out() -> None:
    held = asked(Answers((6, 2)), promotion_wait_s=0.05)
    assert (held.blocks, held.is_ready) == (2, True)
