"""plots: the summary's rows as PNG pictures, where matplotlib is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PLOTS: Sequence[tuple[str, str]] = (
    ("hit_ratio", "blocks found held"),
    ("dram_hit_share", "of these, in DRAM when their request starts"),
    ("ttft_ms_mean", "mean time to first token, ms"),
    ("cost", "dollars per million tokens"),
)


def draw(rows: Sequence[Mapping[str, object]], out: Path) -> bool:
    """One picture per measure, against the size of DRAM, or of NVMe where only that differs.

    Returns:
        False where matplotlib is not installed.
    """
    if not _is_installed():
        return False
    tier = _tier_that_differs(rows)
    figure: Any = importlib.import_module("matplotlib.figure")  # an extra, and slow to load
    for name, title in _PLOTS:
        known = [row for row in rows if row[name] is not None]
        if not known or (name == "dram_hit_share" and not any(row["nvme_blocks"] for row in rows)):
            continue
        picture = figure.Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
        axes = picture.subplots()
        for label, line in _lines(known, name, tier).items():
            sizes, values = zip(*sorted(line), strict=True)
            axes.plot([100 * size for size in sizes], values, marker="o", markersize=4, label=label)
        axes.set_xlabel(f"{tier}, % of the unique blocks")
        axes.set_xscale("log")
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        picture.savefig(out / f"{name}.png")
    return True


def _is_installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _tier_that_differs(rows: Sequence[Mapping[str, object]]) -> str:
    dram_sizes, nvme_sizes = ({row[name] for row in rows} for name in ("dram_blocks", "nvme_blocks"))
    return "NVMe" if len(dram_sizes) == 1 < len(nvme_sizes) else "DRAM"


def _lines(rows: Sequence[Mapping[str, Any]], name: str, tier: str) -> dict[str, list[tuple[Any, Any]]]:
    lines: dict[str, list[tuple[Any, Any]]] = {}
    for row in rows:
        window = {0: "", -1: ", whole queue"}.get(int(str(row["queue_window"])), f", W={row['queue_window']}")
        share = row["dram_share"] * row[f"{tier.lower()}_blocks"] / row["dram_blocks"]
        lines.setdefault(f"{row['policy']}{window}", []).append((share, row[name]))
    return lines
