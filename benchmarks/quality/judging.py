"""judging: perplexity and recall of the variants by truncation depth, with confidence intervals over documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.measuring import progress
from benchmarks.quality import dialogues
from benchmarks.quality.corpus import Corpus
from benchmarks.quality.variants import Prediction, Variant, predict
from kvservice_adapters.positions import Rope

_BOOTSTRAPS = 2000
_SEED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is judged. Documents and dialogues are `windows` windows long."""

    window_tokens: int
    windows: int = 6
    documents: int = 256
    dialogues: int = 256
    batch: int = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One variant at one truncation depth (0: all depths together, from 1).

    Each interval is the middle 95 % of a bootstrap over whole documents. The difference is against recomputation on
    the same tokens, document by document.
    """

    variant: str
    depth: int
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    difference: float
    difference_low: float
    difference_high: float


@dataclass(frozen=True, slots=True)
class Recall:
    """How often the whole answer was the model's first choice, where the fact was said before the last truncation.

    `where` is "kept" (the fact's text is still in the context) or "dropped".
    """

    variant: str
    where: str
    questions: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float


def perplexity_rows(model: LlamaForCausalLM, corpus: Corpus, setting: Setting, rope: Rope) -> list[Row]:
    """Held-out documents through every variant."""
    length = setting.window_tokens * setting.windows + 1
    count = min(setting.documents, len(corpus.held_out) // length)
    texts = [corpus.held_out[number * length : (number + 1) * length] for number in range(count)]
    predictions = {variant: _predict(model, texts, variant, setting, rope) for variant in Variant}
    rows = []
    for depth in range(int(predictions[Variant.RECOMPUTE].depth.max()) + 1):
        at_depth = predictions[Variant.RECOMPUTE].depth
        chosen = at_depth > 0 if depth == 0 else at_depth == depth
        reference = predictions[Variant.RECOMPUTE].loss[:, chosen].mean(dim=1).double().cpu().numpy()
        for variant, prediction in predictions.items():
            losses = prediction.loss[:, chosen].mean(dim=1).double().cpu().numpy()
            rows.append(_row(variant, depth, losses, reference))
    return rows


def recall_rows(model: LlamaForCausalLM, corpus: Corpus, setting: Setting, rope: Rope) -> list[Recall]:
    """New dialogues through every variant."""
    made = [
        dialogues.make(
            seed=10_000_000 + number,
            size_bytes=setting.window_tokens * setting.windows + 1,
            filler=corpus.held_out,
            recall_bytes_max=setting.window_tokens * 3 // 4,
        )
        for number in range(setting.dialogues)
    ]
    rows = []
    for variant in Variant:
        prediction = _predict(model, [dialogue.text for dialogue in made], variant, setting, rope)
        rows += _recalls(variant, made, prediction)
    return rows


def as_records(rows: Sequence[Row | Recall]) -> list[dict[str, object]]:
    """Plain dictionaries, for JSON."""
    return [asdict(row) for row in rows]


def _predict(
    model: LlamaForCausalLM, texts: Sequence[bytes], variant: Variant, setting: Setting, rope: Rope
) -> Prediction:
    parts = []
    for start in range(0, len(texts), setting.batch):
        some = b"".join(texts[start : start + setting.batch])
        tokens = torch.frombuffer(bytearray(some), dtype=torch.uint8).view(-1, len(texts[0])).long().to(model.device)
        parts.append(predict(model, tokens, variant, rope, window_tokens=setting.window_tokens))
        progress(f"judging: {variant.value}: {min(start + setting.batch, len(texts))} of {len(texts)}")
    return Prediction(
        torch.cat([part.loss for part in parts]).cpu(),
        torch.cat([part.is_right for part in parts]).cpu(),
        parts[0].depth,
        parts[0].kept_from,
    )


def _row(variant: Variant, depth: int, losses: np.ndarray, reference: np.ndarray) -> Row:
    drawn = np.random.default_rng(_SEED).integers(len(losses), size=(_BOOTSTRAPS, len(losses)))
    samples = np.exp(losses[drawn].mean(axis=1))
    differences = samples - np.exp(reference[drawn].mean(axis=1))
    value = float(np.exp(losses.mean()))
    return Row(
        variant.value,
        depth,
        value,
        *_interval(samples),
        value - float(np.exp(reference.mean())),
        *_interval(differences),
    )


def _recalls(variant: Variant, made: Sequence[dialogues.Dialogue], prediction: Prediction) -> list[Recall]:
    right: dict[str, list[list[bool]]] = {"kept": [[] for _ in made], "dropped": [[] for _ in made]}
    for number, dialogue in enumerate(made):
        for question in dialogue.questions:
            # Predictions are of the next token: entry i is about token i + 1.
            answer = slice(question.answer_start - 1, question.answer_end - 1)
            depth_then = int(prediction.depth[max(0, question.fact_start - 1)])
            if int(prediction.depth[answer][0]) == depth_then:
                continue  # nothing was truncated since the fact was said
            kept_from = int(prediction.kept_from[answer][0])
            if question.fact_end <= kept_from or question.fact_start >= kept_from:
                where = "kept" if question.fact_start >= kept_from else "dropped"
                right[where][number].append(bool(prediction.is_right[number, answer].all()))
    return [_recall(variant, where, answers) for where, answers in right.items() if any(answers)]


def _recall(variant: Variant, where: str, answers: Sequence[Sequence[bool]]) -> Recall:
    asked = np.array([len(some) for some in answers], dtype=np.float64)
    correct = np.array([sum(some) for some in answers], dtype=np.float64)
    drawn = np.random.default_rng(_SEED).integers(len(asked), size=(_BOOTSTRAPS, len(asked)))
    samples = correct[drawn].sum(axis=1) / np.maximum(1.0, asked[drawn].sum(axis=1))
    return Recall(variant.value, where, int(asked.sum()), float(correct.sum() / asked.sum()), *_interval(samples))


def _interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
