"""The serving loop: batched like alone, resumed like recomputed; its queue, its window, its sampling."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvservice_client as kv
from kvservice_adapters.serving import (
    ArrivalQueue,
    FinishReason,
    QueueFull,
    Request,
    Result,
    Sampling,
    ServingLoop,
    Waiting,
    WindowExceeded,
)
from kvservice_adapters.transformers import AdapterOptions, DrainOutcome, TransformersAdapter, serve_model
from tests.adapters.clients import PassingClient
from tests.daemons import DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]

TIMEOUT_S = 30.0
TOKENS_PER_BLOCK = 16


def draw(seed: int, tokens: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist())


def requests(lengths: Sequence[int], **more: Any) -> list[Request]:
    return [
        Request(f"r{index}", draw(index, length), max_new_tokens=10 + 3 * index, session_id=f"s{index}", **more)
        for index, length in enumerate(lengths)
    ]


def run(loop: ServingLoop, asked: Sequence[Request]) -> dict[str, Result]:
    for request in asked:
        loop.submit(request)
    return {result.request_id: result for result in loop.run_until_idle()}


def alone(model: PreTrainedModel, request: Request) -> tuple[int, ...]:
    ids = torch.tensor([request.tokens])
    output: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, len(request.tokens) :].tolist())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_gives_what_generate_gives_alone(model_dir: Path, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=attention)
    # More requests than rows, of different lengths: rows end, move and are filled again at different times.
    asked = requests([50, 300, 171, 16, 33, 1, 200])
    loop = ServingLoop(model, rows=3, window_tokens=400)
    results = run(loop, asked)
    # Every token but a request's last one went through the model, once.
    assert loop.computed_positions == sum(len(r.tokens) + r.max_new_tokens - 1 for r in asked)
    for request in asked:
        result = results[request.request_id]
        assert result.tokens == alone(model, request), request.request_id
        assert (result.computed_tokens, result.reused_tokens) == (len(request.tokens), 0)
        assert result.finish_reason is FinishReason.LENGTH


def test_conversations_resume_with_the_same_tokens_and_compute_what_is_new(
    model: PreTrainedModel, socket_dir: Path
) -> None:
    recomputing = ServingLoop(model, rows=3, window_tokens=800)
    with TransformersAdapter(model, socket_dir, weights_identity="seeded", salt="conversations") as adapter:
        serving = ServingLoop(model, adapter, rows=3, window_tokens=800)
        histories: dict[str, tuple[int, ...]] = {f"c{index}": () for index in range(5)}
        for turn in range(4):
            asked = [
                Request(
                    name,
                    history + draw(100 * turn + index, 90 + 10 * index),
                    max_new_tokens=12 + index,
                    session_id=name,
                    history_tokens=len(history),
                )
                for index, (name, history) in enumerate(histories.items())
            ]
            recomputed, served = run(recomputing, asked), run(serving, asked)
            assert serving.drain(TIMEOUT_S) is DrainOutcome.DRAINED
            for request in asked:
                result = served[request.request_id]
                assert result.tokens == recomputed[request.request_id].tokens
                new_tokens = len(request.tokens) - request.history_tokens
                assert result.reused_tokens + result.computed_tokens == len(request.tokens)
                assert result.computed_tokens <= new_tokens + TOKENS_PER_BLOCK
                assert recomputed[request.request_id].computed_tokens == len(request.tokens)
                difference = (result.prompt_logits - recomputed[request.request_id].prompt_logits).abs().max()
                assert difference <= 1e-4 * result.prompt_logits.abs().max()
                histories[request.request_id] = request.tokens + result.tokens
        stats = adapter.stats()
        assert (stats.unsaved_blocks, stats.skipped_blocks, stats.failed_loads) == ({}, {}, {})


class HarmfulClient(PassingClient):
    """Zeroes what was loaded: the control that shows that loaded bytes are what the model attends to."""

    def load(self, hashes: Sequence[bytes], destination: torch.Tensor, **more: Any) -> kv.LoadResult:
        done = super().load(hashes, destination, **more)
        destination.zero_()
        return done


def test_zeroed_blocks_give_other_tokens(model: PreTrainedModel, socket_dir: Path) -> None:
    (asked,) = requests([200])
    namespace = serve_model(model, weights_identity="seeded", salt="zeroed").namespace
    with kv.attach(namespace, socket_dir=str(socket_dir)) as client:
        kwargs: dict[str, Any] = {"weights_identity": "seeded", "salt": "zeroed"}
        with TransformersAdapter(model, client, **kwargs) as adapter:
            loop = ServingLoop(model, adapter)
            sound = run(loop, [asked])["r0"]
            assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
            assert run(loop, [asked])["r0"].tokens == sound.tokens
        with TransformersAdapter(model, HarmfulClient(client), **kwargs) as adapter:
            harmed = run(ServingLoop(model, adapter), [asked])["r0"]
            assert harmed.reused_tokens == 192
            assert harmed.tokens != sound.tokens


def test_a_daemon_killed_while_conversations_run_changes_no_token(
    model: PreTrainedModel, daemon: DaemonProcess
) -> None:
    asked = requests([200, 90, 150])
    recomputed = run(ServingLoop(model, window_tokens=800), asked)
    namespace = serve_model(model, weights_identity="seeded").namespace
    with (
        kv.attach(namespace, socket_dir=str(daemon.socket_dir)) as client,
        TransformersAdapter(model, client, weights_identity="seeded") as adapter,
    ):
        loop = ServingLoop(model, adapter, rows=2, window_tokens=800)
        for request in asked:
            loop.submit(request)
        finished = loop.step().finished
        daemon.kill()
        finished += loop.run_until_idle()
        assert {r.request_id: r.tokens for r in finished} == {r.request_id: r.tokens for r in recomputed.values()}
        daemon.restart()
        assert client.wait_attached(TIMEOUT_S), "the client did not attach to the new daemon"
        again = run(loop, asked)
        assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        resumed = run(loop, asked)
    for request in asked:
        assert again[request.request_id].tokens == recomputed[request.request_id].tokens
        assert resumed[request.request_id].tokens == recomputed[request.request_id].tokens
        assert resumed[request.request_id].computed_tokens <= TOKENS_PER_BLOCK


def test_a_daemon_that_hangs_costs_seconds_at_most(model: PreTrainedModel, daemon: DaemonProcess) -> None:
    (asked,) = requests([200])
    options = AdapterOptions(load_deadline_s=1.0, save_deadline_s=1.0)
    with TransformersAdapter(model, daemon.socket_dir, weights_identity="seeded", options=options) as adapter:
        loop = ServingLoop(model, adapter, window_tokens=800)
        recomputed = run(loop, [asked])["r0"]
        assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        daemon.pause()
        try:
            hung = run(loop, [asked])["r0"]
        finally:
            daemon.resume()
    assert hung.tokens == recomputed.tokens
    assert hung.reused_tokens == 0
    assert hung.ttft_s < 5.0


def test_two_equal_prompts_at_once_share_blocks(model: PreTrainedModel, socket_dir: Path) -> None:
    one, two = (Request(name, draw(5, 200), max_new_tokens=8) for name in ("one", "two"))
    with TransformersAdapter(model, socket_dir, weights_identity="seeded", salt="shared") as adapter:
        loop = ServingLoop(model, adapter)
        results = run(loop, [one, two])
        assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        assert results["one"].tokens == results["two"].tokens
        # The second prompt waits for the first one's save of the same blocks instead of computing them.
        assert results["two"].reused_tokens == 192


# --------------------------------------------------------------------- the loop


def test_the_queue_shows_who_waits_in_the_order_of_serving(model: PreTrainedModel) -> None:
    loop = ServingLoop(model, rows=2, window_tokens=64)
    asked = requests([8, 9, 10, 11])
    for request in asked:
        loop.submit(request)
    assert [waiting.request for waiting in loop.waiting] == asked
    assert [waiting.arrived_at_s for waiting in loop.waiting] == sorted(w.arrived_at_s for w in loop.waiting)
    first_tokens = [loop.step().first_tokens[0].request_id for _ in range(2)]
    assert first_tokens == ["r0", "r1"]
    assert (loop.running, [waiting.request for waiting in loop.waiting]) == (tuple(asked[:2]), asked[2:])
    assert loop.step().first_tokens == [], "a third request runs in two rows"
    assert {result.request_id for result in loop.run_until_idle()} == {"r0", "r1", "r2", "r3"}
    assert (loop.running, loop.waiting) == ((), ())


def test_a_full_queue_refuses() -> None:
    queue = ArrivalQueue(length_max=1)
    first, second = (Waiting(request, 0.0) for request in requests([3, 4]))
    queue.push(first)
    with pytest.raises(QueueFull, match="1 requests wait"):
        queue.push(second)
    assert queue.pop() is first
    queue.push(second)
    assert list(queue) == [second]


def test_submitting_from_other_threads_loses_nothing(model: PreTrainedModel) -> None:
    loop = ServingLoop(model, rows=2, window_tokens=64)
    asked = requests([4] * 12)
    start = threading.Barrier(3)

    def submit(part: list[Request]) -> None:
        start.wait()
        for request in part:
            loop.submit(request)

    threads = [threading.Thread(target=submit, args=(part,)) for part in (asked[:6], asked[6:])]
    for thread in threads:
        thread.start()
    start.wait()
    finished: set[str] = set()
    while len(finished) < len(asked):
        finished |= {result.request_id for result in loop.step().finished}
    for thread in threads:
        thread.join()
    assert finished == {request.request_id for request in asked}


def test_what_does_not_fit_into_the_window_is_refused_with_the_numbers(model: PreTrainedModel) -> None:
    loop = ServingLoop(model, rows=1, window_tokens=64)
    with pytest.raises(WindowExceeded, match=r"needs 65 tokens \(60 of prompt, 5 of output\); the window has 64"):
        loop.submit(Request("r", draw(0, 60), max_new_tokens=5))
    with pytest.raises(ValueError, match="no prompt or asks for no token"):
        loop.submit(Request("r", (), max_new_tokens=5))
    with pytest.raises(ValueError, match="no prompt or asks for no token"):
        loop.submit(Request("r", (1,), max_new_tokens=0))
    for stranger in (-1, 512):
        with pytest.raises(ValueError, match="holds ids outside 0 to 511"):
            loop.submit(Request("r", (1, stranger), max_new_tokens=1))
    full = run(loop, [Request("full", draw(0, 60), max_new_tokens=4)])["full"]
    assert full.tokens == alone(model, Request("full", draw(0, 60), max_new_tokens=4))


def test_a_stop_token_ends_a_request(model: PreTrainedModel) -> None:
    loop = ServingLoop(model, rows=1, window_tokens=256)
    tokens = run(loop, [Request("all", draw(3, 40), max_new_tokens=20)])["all"].tokens
    stop = tokens[7]
    stopped = run(loop, [Request("stop", draw(3, 40), max_new_tokens=20, stop_token_ids=frozenset({stop}))])["stop"]
    assert stopped.tokens == tokens[: tokens.index(stop) + 1]
    assert stopped.finish_reason is FinishReason.STOPPED


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_batch(model: PreTrainedModel) -> None:
    loop = ServingLoop(model, rows=4, window_tokens=256)

    def drawn(name: str, seed: int) -> Request:
        return Request(name, draw(4, 40), max_new_tokens=20, sampling=Sampling(temperature=1.0, top_k=50, seed=seed))

    batch = run(loop, [drawn("a", 1), *requests([30, 70]), drawn("b", 2)])
    again = run(loop, [drawn("a", 1)])["a"].tokens
    assert again == batch["a"].tokens
    assert batch["b"].tokens != batch["a"].tokens
    greedy = run(loop, [Request("g", draw(4, 40), max_new_tokens=20)])["g"].tokens
    top_one = run(loop, [Request("t", draw(4, 40), 20, sampling=Sampling(temperature=1.0, top_k=1, seed=9))])["t"]
    assert top_one.tokens == greedy
    assert again != greedy


def test_warming_up_leaves_no_trace(model: PreTrainedModel) -> None:
    asked = requests([50, 30])
    cold, warm = ServingLoop(model, window_tokens=256), ServingLoop(model, window_tokens=256)
    warm.warm_up()
    assert warm.computed_positions == 0
    first, second = run(cold, asked), run(warm, asked)
    assert {name: result.tokens for name, result in first.items()} == {n: r.tokens for n, r in second.items()}
    warm.submit(asked[0])
    warm.step()
    with pytest.raises(RuntimeError, match="runs nothing yet"):
        warm.warm_up()


def test_sampling_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="temperature -1"):
        Sampling(temperature=-1)
