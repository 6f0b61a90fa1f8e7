"""Conversations that outgrow the window, on a real vLLM: only what is new is computed, rightly, and for nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvservice_adapters.positions import Rope
from kvservice_adapters.positions import moved as once
from tests.adapters.conftest import TINY
from tests.adapters.vllm_engine import TOKENS_PER_BLOCK, VllmEngine
from tests.adapters.vllm_scenes import ANSWER_TOKENS, answer, prompt, two_tiers, wait_attached
from tests.daemons import DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]

SINKS, STEP, WINDOW = TOKENS_PER_BLOCK, 5 * TOKENS_PER_BLOCK, 11 * TOKENS_PER_BLOCK
TURN_TOKENS = 40
Keep = list[list[int]]


@pytest.fixture
def engine(vllm_process: VllmEngine, model_dir: Path, served_daemon: DaemonProcess) -> Iterator[VllmEngine]:
    """An attached engine that these tests share: each has conversations of its own, and leaves the engine empty."""
    if vllm_process.opened != "for truncated conversations":
        vllm_process.close()
        vllm_process.open_attached(model_dir, served_daemon)
        vllm_process.opened = "for truncated conversations"
    yield vllm_process
    vllm_process.do("heal")
    vllm_process.do("settle")
    vllm_process.do("drop_cache")


@dataclass
class Talk:
    """A conversation as an application keeps it: all tokens, its session, its salt, and how it was cut."""

    name: str
    seed: str
    tokens: list[int] = field(default_factory=list)
    dropped: int = 0
    sinks: int = SINKS
    step: int = STEP
    turns: int = 0
    kept_before: Keep = field(default_factory=list)

    @property
    def salt(self) -> str:
        """The conversation's own, from its first turn on."""
        return f"salt of {self.name}"

    @property
    def keep(self) -> Keep:
        """What fits, as ranges of the conversation."""
        sinks = [[0, self.sinks]] if self.sinks else []
        return [*sinks, [self.sinks + self.dropped, len(self.tokens)]] if self.dropped else [[0, len(self.tokens)]]

    @property
    def prompt(self) -> list[int]:
        return [token for start, end in self.keep for token in self.tokens[start:end]]

    def said(self, **changes: Any) -> dict[str, Any]:
        """kv_transfer_params of the next request."""
        truncation: dict[str, Any] = {"conversation": self.tokens, "keep": self.keep}
        if self.kept_before:
            truncation["kept_before"] = self.kept_before
        said: dict[str, Any] = {"session_id": self.name}
        return said | ({"truncation": truncation | changes} if self.dropped else {})

    def turn(self, engine: VllmEngine, question: list[int] | None = None) -> dict[str, Any]:
        """Another question and its answer. The engine keeps nothing of its own."""
        before = self.keep if self.tokens else []
        self.turns += 1
        self.tokens += question or prompt(f"{self.seed} {self.turns}", tokens=TURN_TOKENS)
        while len(self.prompt) + ANSWER_TOKENS > WINDOW:
            self.dropped += self.step
            self.kept_before = before
        engine.do("drop_cache")
        outcome = answer(engine, self.prompt, cache_salt=self.salt, params=self.said())
        self.tokens += outcome["tokens"]
        return outcome


def overflown(engine: VllmEngine, name: str, **how: Any) -> Talk:
    """A conversation that fills its window and has not been cut: its next turn overflows."""
    talk = Talk(name, how.pop("seed", name), **how)
    talk.turn(engine, prompt(talk.seed, tokens=WINDOW - ANSWER_TOKENS))
    return talk


def keys_of(engine: VllmEngine, folder: Path) -> torch.Tensor:
    """Keys of the last request's blocks as the engine holds them: [layers, kv_heads, tokens, head_dim]."""
    path = folder / "keys.npy"
    places = engine.do("keys", path=str(path))
    assert places == list(range(len(places)))
    blocks = torch.from_numpy(np.load(path))
    return blocks.transpose(1, 2).flatten(2, 3)


def rotated(keys: torch.Tensor, shift_tokens: int) -> torch.Tensor:
    """Keys [..., head_dim] of half-split pairs, rotated in float64 by the formula of RoFormer (arXiv 2104.09864)."""
    half = TINY.head_dim // 2
    angle = shift_tokens * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = keys.double()[..., :half], keys.double()[..., half:]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(turned, dim=-1).float()


def test_a_conversation_that_outgrows_its_window_computes_only_what_is_new(engine: VllmEngine) -> None:
    talk, dropped = Talk("talk", "talk"), set()
    for turn in range(14):
        outcome = talk.turn(engine)
        # The last token of the last answer was never computed.
        assert outcome["computed"] <= TURN_TOKENS + 1 + TOKENS_PER_BLOCK, f"turn {turn}"
        if talk.dropped:
            told = outcome["told"]["truncation"]
            assert told["reason"] == "ok", told
            assert told["usable_tokens"] - told["held_tokens"] <= TURN_TOKENS + 1 + TOKENS_PER_BLOCK, told
            assert told["reused_tokens"] == len(talk.prompt) - ANSWER_TOKENS - outcome["computed"]
        dropped.add(talk.dropped)
    assert len(dropped) >= 4, "the window overflowed again and again"
    counts = engine.do("counts")
    assert counts["truncated_requests"] == 1, "counts begin anew with every turn"
    assert not [name for name in counts if name.startswith(("unloaded_blocks:c", "hook_errors", "refused"))]


def test_loaded_keys_stand_where_their_tokens_stand_now(engine: VllmEngine, tmp_path: Path) -> None:
    step = 3 * TOKENS_PER_BLOCK
    talk = overflown(engine, "keys", step=step)
    original = keys_of(engine, tmp_path)
    held = original.shape[2]
    for cuts in (1, 2):
        while talk.dropped < cuts * step:
            talk.turn(engine)
        moved = cuts * step
        now = keys_of(engine, tmp_path)
        assert torch.equal(now[:, :, :SINKS], original[:, :, :SINKS]), "sinks do not move: bit for bit"
        kept = original[:, :, SINKS + moved :]
        loaded = now[:, :, SINKS : held - moved]
        torch.testing.assert_close(loaded, rotated(kept, -moved), atol=2e-4, rtol=0)
        assert (loaded - kept).abs().max() > 0.1
        # Two cuts are one to where the tokens stand now: nothing was rounded in between.
        places = torch.arange(SINKS, held - moved)
        rope = Rope(tuple(10_000.0 ** (-2 * pair / TINY.head_dim) for pair in range(TINY.head_dim // 2)))
        assert torch.equal(loaded, once(kept, rope, computed_at=places + moved, now_at=places))


@torch.inference_mode()
def test_the_answer_is_that_of_the_kept_cache_at_its_old_positions(engine: VllmEngine, model: PreTrainedModel) -> None:
    """Rotary positions are relative: a cache that was only cut, run on where it stands, must say the same."""
    talk = overflown(engine, "answer", sinks=0)
    before = list(talk.tokens)
    outcome = talk.turn(engine)
    whole, cut = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(input_ids=torch.tensor([before]), past_key_values=whole, use_cache=True)
    end = (len(before) - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
    for layer, (keys, values, _) in enumerate(whole):
        cut.update(keys[:, :, talk.dropped : end], values[:, :, talk.dropped : end], layer)
    ids, expected, position = torch.tensor([talk.tokens[end:-ANSWER_TOKENS]]), [], end
    for _ in range(ANSWER_TOKENS):
        places = torch.arange(position, position + ids.shape[1])[None]
        output: Any = model(input_ids=ids, position_ids=places, past_key_values=cut, use_cache=True)
        position += ids.shape[1]
        ids = output.logits[:, -1:].argmax(-1)
        expected.append(int(ids))
    assert outcome["tokens"] == expected
    # And not that of anything: with keys that are left where they were the answer is another one.
    control = overflown(engine, "control", seed="answer", sinks=0)
    assert control.tokens == before
    engine.do("leave_keys")
    spoilt = control.turn(engine)
    assert spoilt["computed"] == outcome["computed"]
    assert spoilt["tokens"] != expected


@pytest.mark.parametrize("engine_forgets", [False, True], ids=["engine's own cache", "store"])
def test_nobody_else_is_served_what_a_truncated_session_computed(engine: VllmEngine, engine_forgets: bool) -> None:
    talk = overflown(engine, f"mine {engine_forgets}")
    for _ in range(2):
        talk.turn(engine)
    ids, salt = talk.prompt, talk.salt
    session = {"session_id": talk.name}
    # What begins both, the sinks, is the conversation's own under its own salt.
    for cache_salt, params, shared in (("", {}, 0), ("another", session, 0), (salt, session, SINKS)):
        if engine_forgets:
            engine.do("drop_cache")
        outcome = answer(engine, ids, cache_salt=cache_salt, params=params)
        assert (outcome["computed"], outcome["told"]) == (len(ids) - shared, None), cache_salt
    # The same tokens, kept of another conversation: only the sinks are the same, with all that was before them.
    talk.tokens[SINKS : SINKS + STEP] = prompt("another past", tokens=STEP)
    assert talk.prompt == ids
    if engine_forgets:
        engine.do("drop_cache")
    outcome = answer(engine, ids, cache_salt=salt, params=talk.said())
    assert outcome["computed"] == len(ids) - SINKS
    assert outcome["told"]["truncation"]["held_tokens"] == SINKS


def test_another_session_shares_only_what_was_computed_before_the_cut(engine: VllmEngine) -> None:
    talk = overflown(engine, "first")
    for _ in range(2):
        talk.turn(engine)
    engine.do("drop_cache")
    outcome = answer(engine, talk.prompt, cache_salt=talk.salt, params=talk.said() | {"session_id": "second"})
    assert outcome["computed"] == len(talk.prompt) - (
        WINDOW // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK - TOKENS_PER_BLOCK - STEP
    )


NOT_CUT = {"keep": [[0, WINDOW]]}
REFUSALS: list[tuple[str, dict[str, Any], str, str]] = [
    ("missing_salt", {}, "", "needs a cache_salt of its own"),
    ("missing_session", {"session_id": ""}, "salt", "name it with session_id"),
    ("bad_request", {"truncation": "half of it"}, "salt", "is a mapping"),
    ("bad_request", {"truncation": {"keep": [[0, 32]]}}, "salt", "conversation"),
    ("bad_request", {"truncation": {"conversation": [1, -2], "keep": [[0, 1]]}}, "salt", "no token id"),
    ("bad_request", {"keep": [[192, 500]]}, "salt", "inside"),
    ("bad_request", {"keep": [[192, 300], [100, 352]]}, "salt", "behind 300"),
    ("bad_request", {"keep": [[-1, 300]]}, "salt", "behind 0"),
    ("bad_request", {"keep": []}, "salt", "1 to 64"),
    ("bad_request", {"kept_before": [[3]]}, "salt", "kept_before"),
    ("nothing_dropped", NOT_CUT, "salt", "leaves nothing out"),
    ("tokens_differ", {"keep": [[191, 352]]}, "salt", "does not begin"),
]


def test_what_cannot_be_right_is_refused_with_the_reason_and_computed(engine: VllmEngine) -> None:
    talk = overflown(engine, "refused")
    talk.dropped = STEP
    asked = {reason: 0 for reason, *_ in REFUSALS}
    for reason, change, salt, message in REFUSALS:
        ids = [*talk.prompt, *prompt(message, tokens=8)]
        said = talk.said(**{name: value for name, value in change.items() if name in {"keep", "kept_before"}})
        said |= {name: value for name, value in change.items() if name in {"session_id", "truncation"}}
        outcome = answer(engine, ids, cache_salt=f"{salt} {message}" if salt else "", params=said)
        told = outcome["told"]["truncation"]
        assert told["reason"] == reason
        assert message in told["message"]
        assert outcome["computed"] == len(ids)
        asked[reason] += 1
    counts = engine.do("counts")
    assert {reason: counts[f"refused_truncations:{reason}"] for reason in asked} == asked


def test_a_cut_that_is_not_between_blocks_is_rounded_to_what_is_and_told(engine: VllmEngine) -> None:
    talk = overflown(engine, "misaligned")
    talk.tokens += prompt("misaligned", tokens=TURN_TOKENS)
    talk.dropped = STEP + 5
    engine.do("drop_cache")
    outcome = answer(engine, talk.prompt, cache_salt=talk.salt, params=talk.said())
    told = outcome["told"]["truncation"]
    assert (told["usable_tokens"], told["held_tokens"], outcome["computed"]) == (SINKS, SINKS, len(talk.prompt) - SINKS)
    assert "token 197 of the conversation is token 32 of the prompt: both must be multiples of 32" in told["message"]
    # An unknown session has nothing: a miss.
    talk.dropped = STEP
    engine.do("drop_cache")
    outcome = answer(engine, talk.prompt, cache_salt="nobody's", params=talk.said() | {"session_id": "nobody"})
    assert outcome["computed"] == len(talk.prompt)
    assert outcome["told"]["truncation"]["reason"] == "not_held"


def test_a_truncated_session_outlives_the_daemon_and_its_time_on_nvme(
    vllm: VllmEngine, model_dir: Path, tmp_path: Path
) -> None:
    with DaemonProcess(tmp_path / "s", **two_tiers(tmp_path / "nvme")) as daemon:
        vllm.open_attached(model_dir, daemon)
        talk = overflown(vllm, "outlives")
        for _ in range(2):
            talk.turn(vllm)
        # Everything is on NVMe once it has drained, and nothing in DRAM when it is back.
        assert daemon.stop() == 0
        daemon.restart()
        daemon.wait_event("recovered")
        wait_attached(vllm)
        for _ in range(6):
            outcome = talk.turn(vllm)
            assert outcome["computed"] <= TURN_TOKENS + 1 + TOKENS_PER_BLOCK
            assert outcome["told"]["truncation"]["reason"] == "ok"
        assert talk.dropped > STEP
        assert vllm.do("counts")["shifted_blocks"] > 0
        vllm.do("close")
        assert daemon.stop() == 0
