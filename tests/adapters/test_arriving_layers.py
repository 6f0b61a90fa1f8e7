"""Prefixes that arrive layer by layer while the model computes, and those that do not arrive after all."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import kvservice_client as kv
from kvservice_adapters.serving import GREEDY, Request, Result, Sampling, ServingLoop
from kvservice_adapters.transformers import AdapterOptions, DrainOutcome, TransformersAdapter, serve_model
from kvservice_adapters.transformers.paths import Arrived, Joined
from tests.adapters.generating import (
    PROMPT_TOKENS,
    REUSABLE_BLOCKS,
    REUSABLE_TOKENS,
    SAVED_BLOCKS,
    TIMEOUT_S,
    WEIGHTS,
    attach,
    computed,
    generate,
    prompt,
    run_and_save,
)
from tests.adapters.lazy_path import LazyArrival, LazyPath
from tests.adapters.test_serving import draw

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]

LAYERS = [0, 1, 2]


@contextmanager
def lazy_adapter(model: PreTrainedModel, socket_dir: Path, salt: str) -> Iterator[tuple[TransformersAdapter, LazyPath]]:
    served = serve_model(model, weights_identity=WEIGHTS, salt=salt)
    options = AdapterOptions(recompute_if_faster=False)
    with attach(model, socket_dir, salt) as client:
        path = LazyPath(client, served.layout)
        with TransformersAdapter(
            model, client, weights_identity=WEIGHTS, salt=salt, options=options, path=path
        ) as adapter:
            yield adapter, path


def test_each_layer_is_waited_for_where_the_model_first_needs_it(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    ids = prompt()
    recomputed = generate(model, ids)
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        run_and_save(adapter, model, ids)
        cache = adapter.load(ids)
        assert (cache.reused_tokens, cache.get_seq_length(), path.loads[0].waited) == (REUSABLE_TOKENS,) * 2 + ([],)
        seen: list[list[int]] = []
        hooks = [
            layer.register_forward_hook(lambda *_: seen.append(list(path.loads[0].waited)))
            for layer in model.model.layers
        ]
        output, positions = computed(model, ids, cache)
        for hook in hooks:
            hook.remove()
        assert seen[: len(LAYERS)] == [[0], [0, 1], [0, 1, 2]]
        assert seen[-1] == LAYERS, "a layer is waited for once"
        assert torch.equal(output, recomputed)
        assert positions == PROMPT_TOKENS - REUSABLE_TOKENS
        assert (adapter.stats().loaded_blocks, adapter.stats().failed_loads) == (REUSABLE_BLOCKS, {})


def test_what_did_not_arrive_is_computed_before_a_token_is_chosen(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    ids = prompt()
    recomputed = generate(model, ids)
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        run_and_save(adapter, model, ids)
        saved = adapter.stats()
        path.fails = True
        cache = adapter.load(ids)
        output, positions = computed(model, ids, cache)
        assert torch.equal(output, recomputed)
        # The last 12 tokens twice: once with what did not arrive.
        assert (cache.reused_tokens, positions) == (0, PROMPT_TOKENS + PROMPT_TOKENS - REUSABLE_TOKENS)
        stats = adapter.stats()
        assert (stats.loaded_blocks, stats.failed_loads) == (0, {"CHANGED": 1})
        assert stats.missed_blocks["CHANGED"] == REUSABLE_BLOCKS
        # What the service may have lost is saved again.
        adapter.save(output, cache)
        assert adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        assert adapter.stats().already_held_blocks == saved.already_held_blocks + SAVED_BLOCKS


def test_a_cache_read_before_it_is_used_has_what_was_saved(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    ids = prompt()
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        _, saved = run_and_save(adapter, model, ids)
        read = adapter.load(ids)
        for (keys, values), (saved_keys, saved_values) in zip(read.rows(), saved.rows(), strict=True):
            assert torch.equal(keys, saved_keys[:, :REUSABLE_TOKENS])
            assert torch.equal(values, saved_values[:, :REUSABLE_TOKENS])
        assert torch.equal(generate(model, ids, read), generate(model, ids))
        path.fails = True
        failed = adapter.load(ids)
        with pytest.raises(RuntimeError, match="did not arrive"):
            failed.batch_repeat_interleave(2)
        assert (failed.rows(), failed.reused_tokens) == ([], 0)
        assert torch.equal(generate(model, ids, failed), generate(model, ids))


def test_a_cache_that_nobody_uses_gives_its_load_up(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    ids = prompt()
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        run_and_save(adapter, model, ids)
        cache = adapter.load(ids)
        assert not path.loads[0].is_cancelled
        gc.disable()  # it does not have to be collected
        try:
            del cache
            assert path.loads[0].is_cancelled
        finally:
            gc.enable()


# ------------------------------------------------------------------ the serving loop


def requests(turns: int = 4, sampling: Sampling = GREEDY) -> list[Request]:
    return [
        Request(
            f"r{index}", draw(index, 200 + 20 * index), max_new_tokens=12, session_id=f"s{index}", sampling=sampling
        )
        for index in range(turns)
    ]


def run(loop: ServingLoop, asked: list[Request]) -> dict[str, Result]:
    for request in asked:
        loop.submit(request)
    results = {result.request_id: result for result in loop.run_until_idle()}
    assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
    return results


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=20, seed=3)])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("ahead_blocks", [0, 100])
def test_the_loop_gives_the_same_tokens_however_its_prefixes_arrive(
    model: PreTrainedModel, socket_dir: Path, salt: str, sampling: Sampling, fails: bool, ahead_blocks: int
) -> None:
    asked = requests(sampling=sampling)
    expected = run(ServingLoop(model, rows=2, window_tokens=400), asked)
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        loop = ServingLoop(model, adapter, rows=2, window_tokens=400)
        assert {name: result.tokens for name, result in run(loop, asked).items()} == {
            name: result.tokens for name, result in expected.items()
        }
        assert not path.loads
        path.fails = fails
        path.ahead_blocks_max = path.ahead_blocks_now = ahead_blocks
        resumed = run(loop, asked)
        assert len(path.loads) == len(asked)
        # The first request is not waited with; what waits behind it is loaded while it is computed.
        assert path.loads_ahead == (path.loads[1:] if ahead_blocks else [])
        for name, result in resumed.items():
            assert result.tokens == expected[name].tokens
            assert result.reused_tokens == (0 if fails else (result.prompt_tokens - 1) // 16 * 16)
        stats = adapter.stats()
        assert stats.failed_loads == ({"CHANGED": len(asked)} if fails else {})
        assert (stats.unsaved_blocks, stats.skipped_blocks) == ({}, {})


@pytest.mark.parametrize("fails", [False, True])
def test_behind_what_was_loaded_ahead_is_loaded_what_is_held_by_then(
    model: PreTrainedModel, socket_dir: Path, salt: str, fails: bool
) -> None:
    common = draw(0, 160)
    short = Request("short", common, max_new_tokens=2)
    first, second = (Request(name, common + draw(1, 100), max_new_tokens=40) for name in ("first", "second"))
    expected = run(ServingLoop(model, rows=1, window_tokens=400), [first])["first"].tokens
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        loop = ServingLoop(model, adapter, rows=1, window_tokens=400)
        run(loop, [short])
        path.ahead_blocks_max = path.ahead_blocks_now = 100
        begin = path.begin
        if fails:  # the rest only

            def failing(hashes: Sequence[bytes], *, first: int = 0) -> LazyArrival | None:
                path.fails = first > 0
                return begin(hashes, first=first)

            path.begin = failing  # type: ignore[method-assign]
        results = run(loop, [first, second])
        assert results["first"].tokens == results["second"].tokens == expected
        assert results["first"].reused_tokens == 160
        # Begun while the first request had saved nothing of what is its own, and not what the second one used.
        assert [load.blocks for load in path.loads_ahead] == [10]
        assert not path.loads_ahead[0].is_cancelled
        assert path.loads[-1].blocks == 6
        assert results["second"].reused_tokens == (0 if fails else (260 - 1) // 16 * 16)
        assert adapter.stats().failed_loads == ({"CHANGED": 1} if fails else {})


def test_as_much_is_loaded_ahead_as_there_is_room_for_if_that_is_worth_it(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    asked = [Request(f"r{index}", draw(index, tokens), max_new_tokens=8) for index, tokens in enumerate((40, 300, 90))]
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        loop = ServingLoop(model, adapter, rows=1, window_tokens=400)
        run(loop, asked)
        for room, ahead in (((10, 10), [10, 5]), ((30, 10), [10, 5]), ((30, 6), []), ((30, 30), [18, 5])):
            path.loads_ahead.clear()
            path.ahead_blocks_max, path.ahead_blocks_now = room
            for request in asked:
                loop.submit(request)
            loop.step()
            assert [load.blocks for load in path.loads_ahead] == ahead
            loop.run_until_idle()


def test_closing_gives_up_what_was_loaded_ahead(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    asked = requests(2)
    with lazy_adapter(model, socket_dir, salt) as (adapter, path):
        loop = ServingLoop(model, adapter, rows=1, window_tokens=400)
        run(loop, asked)
        path.ahead_blocks_max = path.ahead_blocks_now = 100
        for request in asked:
            loop.submit(request)
        loop.step()
        assert [load.is_cancelled for load in path.loads_ahead] == [False]
    assert path.loads_ahead[0].is_cancelled


def test_what_is_joined_counts_the_blocks_of_both() -> None:
    leading = Arrived(kv.LoadResult(2, kv.Reason.OK, (kv.ShiftedBlocks(1, 1, -16),)))
    rest = Arrived(kv.LoadResult(3, kv.Reason.NOT_HELD, (kv.ShiftedBlocks(0, 2, -16),)))
    joined = Joined(leading, rest)
    assert joined.blocks == 5
    moved = (kv.ShiftedBlocks(1, 1, -16), kv.ShiftedBlocks(2, 2, -16))
    assert joined.finish() == kv.LoadResult(5, kv.Reason.NOT_HELD, moved)
    assert Joined(leading, Arrived(kv.LoadResult(0, kv.Reason.TIMEOUT))).finish().blocks == 2
    assert Joined(Arrived(kv.LoadResult(0, kv.Reason.CHANGED)), rest).finish() == kv.LoadResult(0, kv.Reason.CHANGED)
