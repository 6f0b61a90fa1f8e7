"""The truncation benchmark compares what it says it compares."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import dialogues
from benchmarks.quality.variants import Prediction, Variant, predict
from kvservice_adapters.transformers.positions import positions_of

_WINDOW = 64


def _predictions(*, layers: int, tokens: int) -> dict[Variant, Prediction]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4
    )
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    text = torch.randint(64, (3, tokens), generator=torch.Generator().manual_seed(1))
    rope = positions_of(model)
    return {
        variant: predict(model, text, variant, rope, window_tokens=_WINDOW, step_tokens=8, block_tokens=4)
        for variant in Variant
    }


def test_before_the_first_overflow_nothing_differs() -> None:
    predictions = _predictions(layers=2, tokens=_WINDOW + 1)
    for prediction in predictions.values():
        assert int(prediction.depth.max()) == 0
        torch.testing.assert_close(prediction.loss, predictions[Variant.RECOMPUTE].loss)


def test_in_one_layer_shifted_keys_are_recomputed_keys() -> None:
    # The first layer's keys depend on their token and its position alone: only there the two must be equal.
    predictions = _predictions(layers=1, tokens=5 * _WINDOW + 1)
    recomputed = predictions[Variant.RECOMPUTE]
    assert int(recomputed.depth.max()) > 5
    torch.testing.assert_close(predictions[Variant.SHIFTED].loss, recomputed.loss, rtol=1e-3, atol=1e-3)
    for other in (Variant.NAIVE, Variant.SHIFTED_WITH_SINKS):
        truncated = recomputed.depth > 0
        assert not torch.allclose(predictions[other].loss[:, truncated], recomputed.loss[:, truncated], atol=0.1)


def test_recomputing_is_a_forward_over_the_kept_text() -> None:
    predictions = _predictions(layers=2, tokens=3 * _WINDOW + 1)
    for prediction in predictions.values():
        context = torch.arange(len(prediction.kept_from)) - prediction.kept_from
        assert int(context.max()) < _WINDOW
        assert (prediction.kept_from % 4 == 0).all(), "cut inside a block"
    shifted, recomputed = predictions[Variant.SHIFTED], predictions[Variant.RECOMPUTE]
    assert shifted.kept_from.equal(recomputed.kept_from)
    truncated = recomputed.depth > 0
    assert not torch.allclose(shifted.loss[:, truncated], recomputed.loss[:, truncated], atol=1e-3), (
        "in deeper layers saved keys remember what was dropped: if not, something was recomputed"
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_was_said_before(seed: int) -> None:
    filler = bytes(random.Random(seed).choices(b"abcdef \n", k=5_000))
    dialogue = dialogues.make(seed=seed, size_bytes=4_000, filler=filler, recall_bytes_max=600)
    assert len(dialogue.text) == 4_000
    assert len(dialogue.questions) >= 5
    for question in dialogue.questions:
        answer = dialogue.text[question.answer_start : question.answer_end]
        assert answer.isdigit()
        assert answer in dialogue.text[question.fact_start : question.fact_end]
        assert question.fact_end <= question.answer_start <= question.fact_start + 600 + 100
