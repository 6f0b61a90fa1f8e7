"""Conversations that outgrow the window, on a real model and a real daemon: only what is new is computed, rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from kvservice_adapters.positions import UnsupportedPositions
from kvservice_adapters.serving import Request, ServingLoop, WindowExceeded
from kvservice_adapters.transformers import AdapterOptions, DrainOutcome, TransformersAdapter
from kvservice_adapters.truncation import TruncationPolicy
from tests.adapters.generating import ANSWER_TOKENS, TIMEOUT_S, TOKENS_PER_BLOCK, WEIGHTS, computed, generate, prompt
from tests.daemons import DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]

WINDOW = 256
TURN_TOKENS = 40
POLICY = TruncationPolicy(window_tokens=WINDOW)
SINKS = TruncationPolicy(window_tokens=WINDOW, sink_tokens=16)


def adapter_on(
    model: PreTrainedModel, socket_dir: Path | str, salt: str, policy: TruncationPolicy | None = POLICY
) -> TransformersAdapter:
    options = AdapterOptions(recompute_if_faster=False)  # no speed decides what it loads
    return TransformersAdapter(
        model, socket_dir, weights_identity=WEIGHTS, salt=salt, options=options, truncation=policy
    )


class Talk:
    """A conversation that an application keeps: all of its tokens, whatever the window."""

    def __init__(self, session_id: str = "talk") -> None:
        self.session_id = session_id
        self.tokens = torch.zeros((1, 0), dtype=torch.long)
        self.turns = 0
        self.dropped = 0

    def turn(self, adapter: TransformersAdapter, model: PreTrainedModel) -> tuple[int, int]:
        """Another question and its answer; tokens reused, and computed before the answer."""
        self.turns += 1
        self.tokens = torch.cat([self.tokens, prompt(seed=self.turns, tokens=TURN_TOKENS)], dim=1)
        fitted = adapter.fit(self.tokens, session_id=self.session_id, max_new_tokens=ANSWER_TOKENS)
        cache = adapter.load(fitted)
        ids = torch.tensor([fitted.tokens])
        output, positions = computed(model, ids, cache)
        adapter.save(output, cache)
        assert adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        self.tokens = torch.cat([self.tokens, output[:, ids.shape[1] :]], dim=1)
        self.dropped = fitted.dropped_tokens
        assert output.shape[1] <= WINDOW
        return cache.reused_tokens, positions


@pytest.mark.parametrize("policy", [POLICY, SINKS], ids=["plain", "sinks"])
def test_every_turn_computes_its_new_tokens_and_at_most_a_block(
    model: PreTrainedModel, socket_dir: Path, salt: str, policy: TruncationPolicy
) -> None:
    talk, overflows = Talk(), set()
    with adapter_on(model, socket_dir, salt, policy) as adapter:
        for _ in range(14):
            _, positions = talk.turn(adapter, model)
            # The last token of the last answer was never run.
            assert positions <= TURN_TOKENS + 1 + TOKENS_PER_BLOCK
            overflows.add(talk.dropped)
        stats = adapter.stats()
    assert len(overflows) > 5, "the window overflowed again and again"
    assert stats.shifted_blocks > 20
    assert stats.failed_loads == {}


@torch.inference_mode()
def test_the_answer_is_that_of_the_kept_cache_at_its_old_positions(
    model: PreTrainedModel, socket_dir: Path, salt: str
) -> None:
    """Rotary positions are relative: a cache that was only cut, run on where it stands, must say the same."""
    talk = Talk()
    with adapter_on(model, socket_dir, salt) as adapter:
        while talk.dropped == 0:
            before = talk.tokens
            talk.turn(adapter, model)
    whole = DynamicCache(config=model.config)
    model(input_ids=before, past_key_values=whole, use_cache=True)
    # What is saved are whole blocks, and the last token of an answer is never run.
    cut, dropped, end = DynamicCache(config=model.config), talk.dropped, (before.shape[1] - 1) // 16 * 16
    for layer, (keys, values, _) in enumerate(whole):
        cut.update(keys[:, :, dropped:end], values[:, :, dropped:end], layer)
    asked = talk.tokens[:, :-ANSWER_TOKENS]
    ids, answer, position = asked[:, end:], [], end
    for _ in range(ANSWER_TOKENS):
        position_ids = torch.arange(position, position + ids.shape[1])[None]
        output: Any = model(input_ids=ids, position_ids=position_ids, past_key_values=cut, use_cache=True)
        position += ids.shape[1]
        ids = output.logits[:, -1:].argmax(-1)
        answer.append(int(ids))
    assert talk.tokens[0, -ANSWER_TOKENS:].tolist() == answer
    # And not that of anything: with keys that were not rotated the answer is another one.
    ours = torch.tensor([POLICY.fit(asked[0].tolist(), session_id="talk", max_new_tokens=ANSWER_TOKENS).tokens])
    wrong = DynamicCache(config=model.config)
    for layer, (keys, values, _) in enumerate(whole):
        wrong.update(keys[:, :, dropped:end], values[:, :, dropped:end], layer)
    assert generate(model, ours, wrong)[0, -ANSWER_TOKENS:].tolist() != answer


def test_another_engine_resumes_a_truncated_session(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    talk = Talk()
    with adapter_on(model, socket_dir, salt) as first:
        for _ in range(6):
            talk.turn(first, model)
    assert talk.dropped
    with adapter_on(model, socket_dir, salt) as second:
        reused, positions = talk.turn(second, model)
        assert reused > 0
        assert positions <= TURN_TOKENS + 1 + TOKENS_PER_BLOCK


def test_nobody_else_is_served_a_truncated_session(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    talk = Talk()
    with adapter_on(model, socket_dir, salt) as adapter:
        for _ in range(6):
            talk.turn(adapter, model)
        fitted = adapter.fit(talk.tokens, session_id="talk", max_new_tokens=ANSWER_TOKENS)
        assert fitted.dropped_tokens
        assert adapter.load(fitted).reused_tokens > 0
        same_tokens = torch.tensor([fitted.tokens])
        assert adapter.load(same_tokens, session_id="talk").reused_tokens == 0
        assert adapter.load(same_tokens).reused_tokens == 0
        stranger = adapter.fit(talk.tokens, session_id="stranger", max_new_tokens=ANSWER_TOKENS)
        assert stranger.tokens == fitted.tokens
        # What the stranger may share is the beginning that was never truncated, under its own names.
        names = fitted.chain(adapter.served.namespace.fingerprint, TOKENS_PER_BLOCK).hashes
        theirs = stranger.chain(adapter.served.namespace.fingerprint, TOKENS_PER_BLOCK).hashes
        assert set(names).isdisjoint(theirs)
        adapter.load(stranger)
    with adapter_on(model, socket_dir, salt, policy=None) as plain:
        assert plain.load(same_tokens, session_id="talk").reused_tokens == 0


def test_without_a_daemon_a_truncated_conversation_is_recomputed(
    model: PreTrainedModel, salt: str, daemon: DaemonProcess
) -> None:
    talk = Talk()
    with adapter_on(model, daemon.socket_dir, salt) as adapter:
        for _ in range(5):
            talk.turn(adapter, model)
        assert talk.dropped
        daemon.kill()
        reused, positions = talk.turn(adapter, model)
        assert reused == 0
        assert positions == talk.tokens.shape[1] - ANSWER_TOKENS - talk.dropped


def test_a_model_whose_keys_cannot_move_is_refused(socket_dir: Path, model_dir: Path) -> None:
    rope = {"rope_theta": 10_000.0, "rope_type": "default", "mrope_section": [4, 6, 6]}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.config.rope_parameters = {**model.config.rope_parameters, **rope, "rope_theta": 77.0}
    with pytest.raises(UnsupportedPositions, match=r"M-RoPE|several dimensions"):
        TransformersAdapter(model, socket_dir, weights_identity="x", truncation=POLICY)
    learned = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=2, n_layer=1, vocab_size=64))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="no rotary position"):
        TransformersAdapter(learned, socket_dir, weights_identity="x", truncation=POLICY)


def test_cuts_are_made_between_the_adapters_blocks(model: PreTrainedModel, socket_dir: Path) -> None:
    with pytest.raises(ValueError, match="no multiple"):
        TransformersAdapter(
            model, socket_dir, weights_identity=WEIGHTS, tokens_per_block=32, truncation=TruncationPolicy(256)
        )
    plain = TransformersAdapter(model, socket_dir, weights_identity=WEIGHTS)
    with plain as adapter, pytest.raises(ValueError, match="without a truncation"):
        adapter.fit([1, 2, 3], session_id="s", max_new_tokens=1)


# ------------------------------------------------------------------ serving loop


def ask(loop: ServingLoop, talk: Talk, turn: int) -> Any:
    talk.tokens = torch.cat([talk.tokens, prompt(seed=turn, tokens=TURN_TOKENS)], dim=1)
    loop.submit(
        Request(f"{talk.session_id} {turn}", tuple(talk.tokens[0].tolist()), ANSWER_TOKENS, session_id=talk.session_id)
    )


def test_a_loop_goes_on_where_the_window_ends(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    talks = {name: Talk(name) for name in ("a", "b")}
    dropped = set()
    with adapter_on(model, socket_dir, salt) as adapter:
        loop = ServingLoop(model, adapter, rows=2, window_tokens=WINDOW)
        for turn in range(9):
            for talk in talks.values():
                ask(loop, talk, turn)
            for result in loop.run_until_idle():
                talk = talks[result.session_id]
                talk.tokens = torch.cat([talk.tokens, torch.tensor([result.tokens])], dim=1)
                dropped.add(result.dropped_tokens)
                assert result.prompt_tokens + len(result.tokens) <= WINDOW
                assert result.computed_tokens <= TURN_TOKENS + 1 + TOKENS_PER_BLOCK
            assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        loop.close()
    assert len(dropped) > 3


def test_a_loop_without_a_service_recomputes_what_is_kept(model: PreTrainedModel) -> None:
    talk = Talk()
    talk.tokens = prompt(seed=1, tokens=400)
    loop = ServingLoop(model, rows=1, window_tokens=WINDOW, truncation=POLICY)
    ask(loop, talk, 1)
    (result,) = loop.run_until_idle()
    assert (result.dropped_tokens, result.prompt_tokens, result.computed_tokens) == (256, 184, 184)
    with pytest.raises(WindowExceeded):
        loop.submit(Request("r", tuple(talk.tokens[0].tolist()), ANSWER_TOKENS))  # no session: it is not cut
    with pytest.raises(WindowExceeded, match="whatever is dropped"):
        loop.submit(Request("r", (1, 2, 3), WINDOW, session_id="s"))
    loop.close()


def test_a_loop_cuts_as_its_adapter_does(model: PreTrainedModel, socket_dir: Path, salt: str) -> None:
    with adapter_on(model, socket_dir, salt) as adapter, pytest.raises(ValueError, match="different ways"):
        ServingLoop(model, adapter, rows=1, window_tokens=WINDOW, truncation=SINKS)
    with pytest.raises(ValueError, match="rows have 128"):
        ServingLoop(model, rows=1, window_tokens=128, truncation=POLICY)
