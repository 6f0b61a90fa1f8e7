"""truncation_quality: does a model predict as well from truncated saved KV as from recomputed text?

    python -m benchmarks.truncation_quality [--quick] [--seconds 170] [--corpus FILE] [--out DIR]

Trains a small byte-level Llama (RoPE) from nothing on text that ships with Python and Debian, then compares on
held-out documents and dialogues, at every truncation depth: the text truncated and recomputed; saved KV with shifted
positions (what kvservice does); the same with the first block kept; and saved KV whose keys keep their old positions.
Prints one JSON line per result, tables, and draws truncation_quality.png (with matplotlib). Minutes on a GPU; --quick
shows on a CPU that everything runs, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.measuring import Record, progress
from benchmarks.quality.corpus import Corpus, gather
from benchmarks.quality.judging import Recall, Row, Setting, as_records, perplexity_rows, recall_rows
from benchmarks.quality.training import Recipe, train
from benchmarks.quality.variants import Variant
from kvservice_adapters.transformers.positions import positions_of

_CORPUS_BYTES_MAX = 40_000_000
_QUICK_RECIPE = Recipe(window_tokens=256, layers=2, hidden=128, heads=4, kv_heads=2, batch=16, seconds=20.0)
_QUICK_SETTING = Setting(window_tokens=256, windows=3, documents=8, dialogues=8, batch=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, report. Blocks for minutes."""
    options = _parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = _QUICK_RECIPE if options.quick else Recipe(seconds=options.seconds)
    setting = _QUICK_SETTING if options.quick else Setting(window_tokens=recipe.window_tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.open(options.corpus) if options.corpus else gather(size_bytes_max=_CORPUS_BYTES_MAX)
    if options.save_corpus:
        corpus.save(options.save_corpus)
        return 0
    progress(f"corpus: {len(corpus.training) / 1e6:.1f} MB to train on, {len(corpus.held_out) / 1e6:.2f} MB held out")
    model = train(recipe, corpus, device)
    if device == "cuda":
        model.to(torch.bfloat16)  # type: ignore[arg-type]  # as engines keep KV
    rope = positions_of(model)
    started_s = time.monotonic()
    rows = perplexity_rows(model, corpus, setting, rope)
    recalls = recall_rows(model, corpus, setting, rope)
    progress(f"judging took {time.monotonic() - started_s:.0f} s")
    _report(rows, recalls, options.out)
    return 0


def _report(rows: Sequence[Row], recalls: Sequence[Recall], out: Path) -> None:
    recomputed = next(row for row in rows if row.variant == Variant.RECOMPUTE.value and row.depth == 0)
    for row in rows:
        if row.depth == 0:
            name = f"truncation_perplexity_{Variant(row.variant).name.lower()}"
            print(Record.compared(name, row.perplexity, "perplexity", recomputed.perplexity).to_json(), flush=True)
    for recall in recalls:
        name = f"truncation_recall_{recall.where}_{Variant(recall.variant).name.lower()}"
        reference = next(
            other.accuracy
            for other in recalls
            if other.where == recall.where and other.variant == Variant.RECOMPUTE.value
        )
        if reference:
            print(Record.compared(name, recall.accuracy, "share", reference).to_json(), flush=True)
        else:
            print(Record.absolute(name, recall.accuracy, "share").to_json(), flush=True)
    text = "\n\n".join([_perplexity_table(rows), _recall_table(recalls)])
    progress("\n" + text)
    (out / "truncation_quality.md").write_text(text + "\n")
    (out / "truncation_quality.json").write_text(
        json.dumps({"perplexity": as_records(rows), "recall": as_records(recalls)}, indent=1) + "\n"
    )
    if find_spec("matplotlib") is None:
        progress("no plot: install matplotlib to have it drawn")
        return
    _draw(rows, out / "truncation_quality.png")


def _perplexity_table(rows: Sequence[Row]) -> str:
    lines = [
        "| KV after the truncation | truncations so far | perplexity (95 %) | minus recomputed (95 %) |",
        "|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.depth, [variant.value for variant in Variant].index(row.variant))):
        depth = str(row.depth) if row.depth else "all"
        lines.append(
            f"| {row.variant} | {depth} | {row.perplexity:.4f} ({row.perplexity_low:.4f} to {row.perplexity_high:.4f}) "
            f"| {row.difference:+.4f} ({row.difference_low:+.4f} to {row.difference_high:+.4f}) |"
        )
    return "\n".join(lines)


def _recall_table(recalls: Sequence[Recall]) -> str:
    lines = [
        "| KV after the truncation | the fact's text is | questions | answered right (95 %) |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {recall.variant} | {recall.where} | {recall.questions} "
        f"| {recall.accuracy:.1%} ({recall.accuracy_low:.1%} to {recall.accuracy_high:.1%}) |"
        for recall in sorted(recalls, key=lambda recall: recall.where, reverse=True)
    ]
    return "\n".join(lines)


def _draw(rows: Sequence[Row], file: Path) -> None:
    """Perplexity against truncation depth with its intervals; beside it, the differences from recomputation."""
    import matplotlib as mpl  # noqa: PLC0415  # optional: the tables do without

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (levels, differences) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for variant in Variant:
        own = sorted((row for row in rows if row.variant == variant.value and row.depth), key=lambda row: row.depth)
        depths = [row.depth for row in own]
        line = levels.plot(depths, [row.perplexity for row in own], marker="o", markersize=3, label=variant.value)[0]
        levels.fill_between(
            depths, [row.perplexity_low for row in own], [row.perplexity_high for row in own], alpha=0.15
        )
        if variant in (Variant.SHIFTED, Variant.SHIFTED_WITH_SINKS):
            spread = [
                [row.difference - row.difference_low for row in own],
                [row.difference_high - row.difference for row in own],
            ]
            differences.errorbar(
                depths,
                [row.difference for row in own],
                spread,
                marker="o",
                markersize=3,
                capsize=2,
                color=line.get_color(),
            )
    levels.set_yscale("log")
    levels.set_ylabel("perplexity per byte")
    levels.legend(fontsize=8, loc="center right")
    differences.axhline(0.0, linewidth=0.8, color="gray")
    differences.set_ylabel("perplexity minus recomputed")
    for axes in (levels, differences):
        axes.set_xlabel("truncations so far")
    figure.savefig(file, dpi=100)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.truncation_quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny: does it run, not what comes out")
    parser.add_argument("--seconds", type=float, default=170.0, help="of training (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="text made by --save-corpus on another machine")
    parser.add_argument("--save-corpus", type=Path, metavar="FILE", help="gather the text, write it there, and stop")
    parser.add_argument("--out", type=Path, default=Path("build/quality"), help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
