"""The last hour as an SVG: one column a minute, hits below, misses above."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice.status.board import HOUR_S, SAMPLE_S, Sample

WIDTH, HEIGHT = 600, 120
_COLUMN = WIDTH / (HOUR_S / SAMPLE_S)


def hit_chart(minutes: Sequence[Sample], now_s: float) -> str:
    """Columns of equal height share out what a minute's Gets asked for; a minute without any is empty."""
    columns: list[str] = []
    for minute in minutes:
        counts = minute.counts
        ago_s = now_s - minute.at_s
        if not counts.requested or ago_s > HOUR_S:
            continue
        left = WIDTH * (1 - ago_s / HOUR_S) if ago_s > SAMPLE_S else WIDTH - _COLUMN
        bottom = float(HEIGHT)
        title = f"{ago_s / 60:.0f} min ago: {counts.dram:,} DRAM, {counts.nvme:,} NVMe, {counts.missed:,} missed"
        parts = []
        for kind, blocks in (("dram", counts.dram), ("nvme", counts.nvme), ("miss", counts.missed)):
            height = HEIGHT * blocks / counts.requested
            bottom -= height
            if height > 0:
                parts.append(
                    f'<rect class="{kind}" x="{left:.1f}" y="{bottom:.1f}" width="{_COLUMN - 1:.1f}" '
                    f'height="{height:.1f}"/>'
                )
        columns.append(f"<g><title>{title}</title>{''.join(parts)}</g>")
    grid = "".join(f'<line x1="0" x2="{WIDTH}" y1="{y}" y2="{y}"/>' for y in (0, HEIGHT / 2, HEIGHT))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="share of hits in each minute of the last hour">{grid}{"".join(columns)}</svg>'
        '<div class="axis"><span>60 min ago</span><span>30</span><span>now</span></div>'
    )
