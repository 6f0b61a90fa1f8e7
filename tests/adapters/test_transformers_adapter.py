"""The transformers adapter against a real daemon: the same tokens, fewer computed, whatever happens to the daemon."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import kvservice_client as kv
from kvservice.demo.processes import DaemonProcess, EngineProcess
from kvservice.demo.protocol import Finished, Generate
from kvservice.demo.scenario import drain, run_one
from kvservice_adapters.service import KVClient
from kvservice_adapters.serving import ForwardCounter
from kvservice_adapters.transformers import (
    AdapterOptions,
    DrainOutcome,
    PrefixCache,
    TransformersAdapter,
    serve_model,
)

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]

TIMEOUT_S = 30.0
PROMPT_TOKENS, ANSWER_TOKENS, TOKENS_PER_BLOCK = 300, 24, 16
# The largest whole number of blocks that leaves a token of the prompt to compute.
REUSABLE_TOKENS = 288


@pytest.fixture(scope="module")
def load_model(model_dir: Path) -> Callable[[torch.dtype], PreTrainedModel]:
    loaded: dict[torch.dtype, PreTrainedModel] = {}

    def load(dtype: torch.dtype) -> PreTrainedModel:
        if dtype not in loaded:
            loaded[dtype] = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        return loaded[dtype]

    return load


@pytest.fixture(scope="module")
def model(load_model: Callable[[torch.dtype], PreTrainedModel]) -> PreTrainedModel:
    return load_model(torch.float32)


@pytest.fixture
def salt(request: pytest.FixtureRequest) -> str:
    """Of this test's namespace: nothing that another test saved is found."""
    return str(request.node.name)


def prompt(seed: int = 0, tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    return torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
    output: Any = model.generate(  # type: ignore[operator]
        ids,
        past_key_values=cache,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert isinstance(output, torch.Tensor)
    return output


def computed(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None = None) -> tuple[torch.Tensor, int]:
    """Generate; the output and how many prompt positions went through the model."""
    counter = ForwardCounter(model)
    output = generate(model, ids, cache)
    counter.detach()
    # Every generated token but the last one goes through the model once.
    return output, counter.positions - (ANSWER_TOKENS - 1)


def adapter_on(
    model: PreTrainedModel, service: KVClient | Path, salt: str, options: AdapterOptions | None = None
) -> TransformersAdapter:
    return TransformersAdapter(model, service, weights_identity="seeded", salt=salt, options=options)


def attach(model: PreTrainedModel, socket_dir: Path, salt: str, timeout_s: float = TIMEOUT_S) -> kv.Client:
    namespace = serve_model(model, weights_identity="seeded", salt=salt).namespace
    return kv.attach(namespace, socket_dir=str(socket_dir), attach_timeout_s=timeout_s)


def run_and_save(
    adapter: TransformersAdapter, model: PreTrainedModel, ids: torch.Tensor
) -> tuple[torch.Tensor, PrefixCache]:
    cache = adapter.load(ids, session_id="s")
    output = generate(model, ids, cache)
    adapter.save(output, cache)
    assert adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED
    return output, cache


# ------------------------------------------------------------------ resuming


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
        # Prompt and answer, without the last token, which never went through the model: blocks of both are saved.
        assert first.stats().saved_blocks == (PROMPT_TOKENS + ANSWER_TOKENS - 1) // TOKENS_PER_BLOCK
    with adapter_on(model, socket_dir, salt) as second:
        cache = second.load(ids)
        resumed, warm_positions = computed(model, ids, cache)
        assert torch.equal(resumed, recomputed)
        assert (cache.reused_tokens, warm_positions) == (REUSABLE_TOKENS, PROMPT_TOKENS - REUSABLE_TOKENS)
        assert second.stats().loaded_blocks == REUSABLE_TOKENS // TOKENS_PER_BLOCK
        assert second.stats().missed_blocks == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_loaded_are_the_very_bytes_that_were_computed(
    load_model: Callable[[torch.dtype], PreTrainedModel], socket_dir: Path, salt: str, dtype: torch.dtype
) -> None:
    model, ids = load_model(dtype), prompt()
    with adapter_on(model, socket_dir, salt) as adapter:
        _, cold = run_and_save(adapter, model, ids)
        warm = adapter.load(ids)
        assert warm.reused_tokens == REUSABLE_TOKENS
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


# -------------------------------------------------------------- what must miss


@pytest.mark.parametrize("difference", ["weights", "dtype", "tokens_per_block", "rope", "salt"])
def test_another_model_misses(
    load_model: Callable[[torch.dtype], PreTrainedModel],
    model_dir: Path,
    socket_dir: Path,
    salt: str,
    difference: str,
) -> None:
    model, ids = load_model(torch.float32), prompt()
    with adapter_on(model, socket_dir, salt) as adapter:
        run_and_save(adapter, model, ids)
    kwargs: dict[str, Any] = {"weights_identity": "seeded", "salt": salt}
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
    arguments = ["--model", str(model_dir), "--weights-identity", "seeded", "--device", "cpu", "--name", name]
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


# ------------------------------------------------------- a daemon that is not there


class KillsDaemon:
    """A client that kills the daemon after a lookup, before the load that follows it."""

    def __init__(self, client: kv.Client, daemon: DaemonProcess) -> None:
        self._client = client
        self._daemon = daemon

    @property
    def attached(self) -> bool:
        return self._client.attached

    def lookup(self, hashes: Sequence[bytes]) -> kv.LookupResult:
        found = self._client.lookup(hashes)
        os.kill(self._daemon.process_id, signal.SIGKILL)
        return found

    def load(self, hashes: Sequence[bytes], destination: object, **more: Any) -> kv.LoadResult:
        return self._client.load(hashes, destination, **more)

    def save(self, hashes: Sequence[bytes], source: object, **more: Any) -> kv.SaveResult:
        return self._client.save(hashes, source, **more)

    def close(self) -> None:
        self._client.close()


def test_an_absent_daemon_costs_the_reuse_and_nothing_else(
    model: PreTrainedModel, salt: str, tmp_path: Path, start_daemon: Callable[[Path], DaemonProcess]
) -> None:
    ids = prompt()
    recomputed = generate(model, ids)
    with (
        attach(model, tmp_path / "sockets", salt, timeout_s=0.0) as client,
        adapter_on(model, client, salt) as adapter,
    ):
        output, cache = run_and_save(adapter, model, ids)
        assert torch.equal(output, recomputed)
        assert cache.reused_tokens == 0
        assert adapter.stats().missed_blocks == {"UNAVAILABLE": REUSABLE_TOKENS // TOKENS_PER_BLOCK}
        assert adapter.stats().skipped_blocks == {
            "UNAVAILABLE": (PROMPT_TOKENS + ANSWER_TOKENS - 1) // TOKENS_PER_BLOCK
        }
        start_daemon(tmp_path)
        assert client.wait_attached(TIMEOUT_S), "the client did not attach to the daemon that came up"
        run_and_save(adapter, model, ids)
        assert adapter.load(ids).reused_tokens == REUSABLE_TOKENS


def test_a_daemon_that_dies_between_lookup_and_load_is_a_miss_and_its_successor_is_used(
    model: PreTrainedModel, salt: str, tmp_path: Path, start_daemon: Callable[[Path], DaemonProcess]
) -> None:
    ids = prompt()
    daemon = start_daemon(tmp_path)
    with attach(model, tmp_path / "sockets", salt) as client:
        with adapter_on(model, client, salt) as adapter:
            recomputed, _ = run_and_save(adapter, model, ids)
        with adapter_on(model, KillsDaemon(client, daemon), salt) as adapter:
            cache = adapter.load(ids)
            stats = adapter.stats()
            # Bytes that were there already may still arrive, verified; a broken call may not.
            assert cache.reused_tokens + sum(stats.missed_blocks.values()) * TOKENS_PER_BLOCK == REUSABLE_TOKENS
            assert torch.equal(generate(model, ids, cache), recomputed)
        with daemon:
            pass  # reap it, so that its sockets are free
        start_daemon(tmp_path)
        assert client.wait_attached(TIMEOUT_S), "the client did not attach to the new daemon"
        with adapter_on(model, client, salt) as adapter:
            output, cache = run_and_save(adapter, model, ids)
            assert (cache.reused_tokens, adapter.stats().saved_blocks) == (0, 20), "a new daemon's DRAM is empty"
            assert torch.equal(output, recomputed)
            assert adapter.load(ids).reused_tokens == REUSABLE_TOKENS


# ------------------------------------------------------------------- misuse


def test_a_padded_prompt_is_refused(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with adapter_on(model, socket_dir, salt) as adapter:
        cache = adapter.load(ids)
        with pytest.raises(ValueError, match="without padding"):
            model.generate(  # type: ignore[operator]
                ids, past_key_values=cache, attention_mask=mask, max_new_tokens=2, pad_token_id=0
            )


def test_several_sequences_in_one_cache_are_refused(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    with adapter_on(model, socket_dir, salt) as adapter:
        with pytest.raises(ValueError, match="one sequence"):
            adapter.load(torch.zeros(2, 40, dtype=torch.long))
        with pytest.raises(ValueError, match="no token"):
            adapter.load([])
        ids = prompt()
        cache = adapter.load(ids)
        output = generate(model, ids, cache)
        with pytest.raises(ValueError, match="do not begin with"):
            adapter.save(output[:, 1:], cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="2 sequences"):
            adapter.save(output, cache)
        assert adapter.stats().saved_blocks == 0


def test_a_full_save_queue_leaves_blocks_unsaved_and_says_so(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    ids = prompt()
    block_size_bytes = serve_model(model, weights_identity="seeded").layout.block_size_bytes
    options = AdapterOptions(save_queue_size_bytes=4 * block_size_bytes)
    with adapter_on(model, socket_dir, salt, options) as adapter:
        run_and_save(adapter, model, ids)
        stats = adapter.stats()
        assert (stats.saved_blocks, stats.skipped_blocks) == (4, {"QUEUE_FULL": 16})
        assert adapter.load(ids).reused_tokens == 4 * TOKENS_PER_BLOCK


def test_a_loaded_cache_is_made_of_the_layers_transformers_expects(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    with adapter_on(model, socket_dir, salt) as adapter:
        run_and_save(adapter, model, prompt())
        cache = adapter.load(prompt())
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}
        assert cache.get_seq_length() == REUSABLE_TOKENS
