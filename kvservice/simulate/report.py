"""report: the summary's rows as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_COLUMNS: Sequence[tuple[str, str, str]] = (
    ("policy", "policy", "{}"),
    ("queue_window", "window", "{}"),
    ("dram_blocks", "DRAM blocks", "{:,}"),
    ("dram_share", "share", "{:.1%}"),
    ("nvme_blocks", "NVMe blocks", "{:,}"),
    ("hit_ratio", "hits", "{:.3f}"),
    ("hit_ratio_second_half", "2nd half", "{:.3f}"),
    ("reusable_hit_ratio", "of reusable", "{:.3f}"),
    ("dram_hit_share", "in DRAM", "{:.3f}"),
    ("recomputed_share", "recomputed", "{:.3f}"),
    ("ttft_ms_mean", "TTFT mean ms", "{:,.0f}"),
    ("ttft_ms_p50", "p50", "{:,.0f}"),
    ("ttft_ms_p99", "p99", "{:,.0f}"),
    ("queue_mean", "queue", "{:.1f}"),
    ("gpu_seconds", "GPU s", "{:,.0f}"),
    ("bytes_moved", "moved GB", "{:,.0f}"),
    ("bytes_written", "written GB", "{:,.0f}"),
    ("cost", "$/1M tokens", "{:.3f}"),
)
_IN_GB = ("bytes_moved", "bytes_written")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """One line per row; columns that no row has a value in are left out."""
    columns = [column for column in _COLUMNS if any(row[column[0]] is not None for row in rows)]
    lines = [[title for _, title, _ in columns]]
    lines += [[_cell(row[name], name, form) for name, _, form in columns] for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: object, name: str, form: str) -> str:
    if value is None:
        return "-"
    if name == "queue_window":
        return "all" if value == -1 else str(value)
    return form.format(value / 1e9 if name in _IN_GB and isinstance(value, (int, float)) else value)
