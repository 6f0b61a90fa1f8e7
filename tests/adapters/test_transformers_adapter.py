"""The transformers adapter against a real daemon: the same tokens, fewer computed; other models miss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvservice.demo.processes import EngineProcess
from kvservice.demo.protocol import Finished, Generate
from kvservice.demo.scenario import drain, run_one
from kvservice_adapters.transformers import TransformersAdapter, serve_model
from tests.adapters.conftest import LoadModel
from tests.adapters.generating import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    REUSABLE_BLOCKS,
    REUSABLE_TOKENS,
    SAVED_BLOCKS,
    TIMEOUT_S,
    TOKENS_PER_BLOCK,
    WEIGHTS,
    adapter_on,
    computed,
    generate,
    prompt,
    run_and_save,
)

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]


def test_a_resumed_prompt_gives_the_same_tokens_and_computes_the_rest(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    ids = prompt()
    recomputed, cold_positions = computed(model, ids)
    assert cold_positions == PROMPT_TOKENS
    with adapter_on(model, socket_dir, salt) as first:
        output, cache = run_and_save(first, model, ids)
        assert torch.equal(output, recomputed)
        assert cache.reused_tokens == 0
        assert first.stats().saved_blocks == SAVED_BLOCKS
    with adapter_on(model, socket_dir, salt) as second:
        assert str(second.plane) == "shared-memory"
        cache = second.load(ids)
        resumed, warm_positions = computed(model, ids, cache)
        assert torch.equal(resumed, recomputed)
        assert (cache.reused_tokens, warm_positions) == (REUSABLE_TOKENS, PROMPT_TOKENS - REUSABLE_TOKENS)
        assert second.stats().loaded_blocks == REUSABLE_BLOCKS
        assert second.stats().missed_blocks == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_loaded_are_the_very_bytes_that_were_computed(
    load_model: LoadModel, socket_dir: Path, salt: str, dtype: torch.dtype
) -> None:
    model, ids = load_model(dtype), prompt()
    with adapter_on(model, socket_dir, salt) as adapter:
        _, cold = run_and_save(adapter, model, ids)
        warm = adapter.load(ids)
        assert warm.reused_tokens == REUSABLE_TOKENS, adapter.stats()
        for (cold_keys, cold_values), (keys, values) in zip(cold.rows(), warm.rows(), strict=True):
            assert keys.dtype is dtype
            assert torch.equal(keys, cold_keys[:, :REUSABLE_TOKENS])
            assert torch.equal(values, cold_values[:, :REUSABLE_TOKENS])
        # Beside a cache that was cut in this process and never left it: equal to the last token, in every dtype.
        kept = DynamicCache(config=model.config)
        for index, (cold_keys, cold_values) in enumerate(cold.rows()):
            kept.update(cold_keys[None, :, :REUSABLE_TOKENS], cold_values[None, :, :REUSABLE_TOKENS], index)
        assert torch.equal(generate(model, ids, warm), generate(model, ids, kept))


def test_the_next_turn_finds_the_blocks_of_the_answer(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    with adapter_on(model, socket_dir, salt) as adapter:
        output, _ = run_and_save(adapter, model, prompt())
        turn = torch.cat([output, prompt(seed=1, tokens=40)], dim=1)
        cache = adapter.load(turn)
        resumed, positions = computed(model, turn, cache)
        assert cache.reused_tokens == (output.shape[1] - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
        assert positions <= 40 + TOKENS_PER_BLOCK
        assert torch.equal(resumed, generate(model, turn))


def test_a_prompt_of_whole_blocks_leaves_its_last_block_to_compute(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    ids = prompt(tokens=4 * TOKENS_PER_BLOCK)
    with adapter_on(model, socket_dir, salt) as adapter:
        output, _ = run_and_save(adapter, model, ids)
        cache = adapter.load(ids)
        resumed, positions = computed(model, ids, cache)
        assert (cache.reused_tokens, positions) == (3 * TOKENS_PER_BLOCK, TOKENS_PER_BLOCK)
        assert torch.equal(resumed, output)


def test_zeroed_keys_and_values_give_other_tokens(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    ids = prompt()
    with adapter_on(model, socket_dir, salt) as adapter:
        output, _ = run_and_save(adapter, model, ids)
        cache = adapter.load(ids)
        for keys, values in cache.rows():
            keys.zero_()
            values.zero_()
        assert not torch.equal(generate(model, ids, cache), output)


def test_a_prompt_that_branches_off_reuses_what_is_common(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    ids = prompt()
    other = ids.clone()
    other[0, 100] = (other[0, 100] + 1) % 512
    with adapter_on(model, socket_dir, salt) as adapter:
        run_and_save(adapter, model, ids)
        cache = adapter.load(other)
        assert cache.reused_tokens == 96
        assert torch.equal(generate(model, other, cache), generate(model, other))
        assert adapter.stats().missed_blocks["NOT_HELD"] >= (REUSABLE_TOKENS - 96) // TOKENS_PER_BLOCK


def test_a_loaded_cache_is_made_of_the_layers_transformers_expects(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    with adapter_on(model, socket_dir, salt) as adapter:
        run_and_save(adapter, model, prompt())
        cache = adapter.load(prompt())
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}
        assert cache.get_seq_length() == REUSABLE_TOKENS


# -------------------------------------------------------------- what must miss


@pytest.mark.parametrize("difference", ["weights", "dtype", "tokens_per_block", "rope", "salt"])
def test_another_model_misses(
    load_model: LoadModel,
    model_dir: Path,
    socket_dir: Path,
    salt: str,
    difference: str,
) -> None:
    model, ids = load_model(torch.float32), prompt()
    with adapter_on(model, socket_dir, salt) as adapter:
        run_and_save(adapter, model, ids)
    kwargs: dict[str, Any] = {"weights_identity": WEIGHTS, "salt": salt}
    if difference == "dtype":
        model = load_model(torch.bfloat16)
    elif difference == "rope":
        rope = {"rope_theta": 20_000.0, "rope_type": "default"}
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, rope_parameters=rope)
    elif difference == "tokens_per_block":
        kwargs["tokens_per_block"] = 32
    else:
        kwargs["weights_identity" if difference == "weights" else "salt"] = "another"
    with TransformersAdapter(model, socket_dir, **kwargs) as other:
        cache = other.load(ids)
        assert cache.reused_tokens == 0
        assert set(other.stats().missed_blocks) == {"NOT_HELD"}
        assert torch.equal(generate(model, ids, cache), generate(model, ids))


def test_without_a_weights_identity_nothing_is_served(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="weights_identity is empty"):
        serve_model(model)


# ------------------------------------------------------------- several processes


def engine(name: str, model_dir: Path, folder: Path, socket_dir: Path | str = "") -> EngineProcess:
    arguments = ["--model", str(model_dir), "--weights-identity", WEIGHTS, "--device", "cpu", "--name", name]
    return EngineProcess(name, [*arguments, "--socket-dir", str(socket_dir)], folder)


def turn(request_id: str, tokens: Sequence[int]) -> Generate:
    return Generate(request_id, session_id="s", tokens=list(tokens), history_tokens=0, max_new_tokens=ANSWER_TOKENS)


def test_a_second_engine_process_resumes_what_the_first_one_saved(
    model_dir: Path, socket_dir: Path, tmp_path: Path
) -> None:
    first_turn, second_turn = prompt().tolist()[0], prompt(seed=1, tokens=40).tolist()[0]
    results: dict[str, Finished] = {}
    with (
        engine("without", model_dir, tmp_path) as without,
        engine("one", model_dir, tmp_path, socket_dir) as one,
        engine("two", model_dir, tmp_path, socket_dir) as two,
    ):
        for process in (without, one, two):
            assert process.wait_ready(TIMEOUT_S).attached is (process is not without)
        results["recomputed 1"] = run_one(without, turn("1", first_turn))
        later = first_turn + results["recomputed 1"].tokens + second_turn
        results["recomputed 2"] = run_one(without, turn("2", later))
        results["saved 1"] = run_one(one, turn("1", first_turn))
        assert drain(one).in_time
        # The first engine is still there: what it saved is for all, not left behind by its end.
        results["resumed 2"] = run_one(two, turn("2", later))
        assert drain(two).in_time
        results["resumed again"] = run_one(one, turn("2", later))
        for process in (without, one, two):
            process.quit()
    assert results["saved 1"].tokens == results["recomputed 1"].tokens
    assert results["resumed 2"].tokens == results["recomputed 2"].tokens
    assert results["resumed again"].tokens == results["recomputed 2"].tokens
    assert results["recomputed 2"].computed_tokens == len(later)
    assert results["resumed 2"].computed_tokens <= len(second_turn) + TOKENS_PER_BLOCK
    assert results["resumed again"].computed_tokens <= TOKENS_PER_BLOCK
    difference = abs(results["resumed 2"].logits - results["recomputed 2"].logits).max()
    assert difference <= 1e-4 * abs(results["recomputed 2"].logits).max()
