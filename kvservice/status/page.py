"""The page: one self-contained HTML document, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from kvservice.status.board import HOUR_S, HitCounts, MissLine, Sample, Status, TierLine
from kvservice.status.chart import hit_chart
from kvservice.status.style import STYLE

REFRESH_S = 10
STALE_S = 10.0
"""An event loop that has published nothing for so long is stuck."""

_FOOTER = (
    '<footer><a href="metrics">/metrics</a> <a href="livez">/livez</a> <a href="readyz">/readyz</a> '
    f"Counts of this daemon only; reloads every {REFRESH_S} s.</footer>"
)

MISS_MEANINGS: Mapping[str, str] = {
    "not_held": "nobody saved it, or it left; a prompt's new tail is always one",
    "being_written": "a writer has reserved it and has not committed",
    "prefix_missing": "a block before it is missing, and a chain is read from its start",
    "corrupt": "its bytes did not match their checksum; it was dropped",
    "tier_offline": "it is on a disk that is offline",
    "over_limit": "the caller's own limit, or no DRAM was free to read it into",
    "other_session": "it belongs to a truncated session that the call did not name, or whose shifts it does not accept",
    "cancelled": "the caller ended the call before the block had arrived",
}


def render(latest: tuple[Status, Sequence[Sample]] | None, now_s: float) -> str:
    """The document. `latest` is None while the daemon starts; `now_s` on the clock of the status."""
    if latest is None:
        return _document("starting", "<p>The daemon is starting.</p>")
    status, minutes = latest
    hour = _total(minutes)
    parts = (
        _headline(status, now_s),
        _cards(status, hour),
        _section("Block requests, last hour", hit_chart(minutes, now_s), _legend(hour)),
        _section("Tiers", _tiers(status.tiers)),
        _section("Why blocks were missed, last hour", _reasons(hour)),
        _section("Last misses", _misses(status.misses, now_s)),
        _section("Instances", _instances(status)),
        _section("Namespaces", _namespaces(status)),
        _FOOTER,
    )
    return _document(status.state, "".join(parts))


def _document(state: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="refresh" content="{REFRESH_S}">'
        f"<title>kvservice: {escape(state)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>"
    )


def _headline(status: Status, now_s: float) -> str:
    age_s = now_s - status.at_s
    stuck = age_s > STALE_S
    state = f"stuck: the event loop has not come round for {_duration(age_s)}" if stuck else status.state
    kind = "good" if state == "serving" else "bad" if stuck or "died" in state else "warn"
    return (
        f'<header><h1>kvservice</h1><span class="state {kind}">{escape(state)}</span>'
        f"<span>{escape(status.version)}, up {_duration(status.uptime_s)}</span></header>"
    )


def _cards(status: Status, hour: HitCounts) -> str:
    hits = hour.dram + hour.nvme
    cards = [
        ("Hit rate, last hour", _share(hits, hour.requested), f"of {hour.requested:,} blocks"),
        ("Instances", f"{status.instances_attached:,}", "engine processes attached"),
    ]
    for tier in status.tiers:
        used = f"{_size(tier.used_bytes)} of {_size(tier.capacity_bytes)}"
        cards.append((f"{_tier_name(tier.name)} in use", _share(tier.used_bytes, tier.capacity_bytes), used))
    return '<div class="cards">' + "".join(
        f'<div class="card"><div class="about">{escape(title)}</div><div class="figure">{figure}</div>'
        f'<div class="about">{about}</div></div>'
        for title, figure, about in cards
    ) + "</div>"  # fmt: skip


def _legend(hour: HitCounts) -> str:
    entries = (("dram", "from DRAM", hour.dram), ("nvme", "from NVMe", hour.nvme), ("miss", "missed", hour.missed))
    return '<div class="legend">' + "".join(
        f'<span><i class="{kind}"></i>{about}: {count:,} ({_share(count, hour.requested)})</span>'
        for kind, about, count in entries
    ) + "</div>"  # fmt: skip


def _tiers(tiers: Sequence[TierLine]) -> str:
    rows = [
        (
            _tier_name(tier.name),
            f'<span class="state {"good" if tier.state == "online" else "bad"}">{escape(tier.state)}</span>',
            f'<meter min="0" max="{max(tier.capacity_bytes, 1)}" value="{tier.used_bytes}"></meter>',
            _size(tier.used_bytes),
            _size(tier.capacity_bytes),
        )
        for tier in tiers
    ]
    return _table(("Tier", "State", "", "Used#", "Capacity#"), rows)


def _reasons(hour: HitCounts) -> str:
    rows = [
        (f"<code>{escape(reason)}</code>", f"{count:,}", _share(count, hour.missed), escape(MISS_MEANINGS[reason]))
        for reason, count in sorted(hour.misses.items(), key=lambda item: -item[1])
        if count
    ]
    return _table(("Reason", "Blocks#", "Share#", "Meaning"), rows, nothing="No block was missed.")


def _misses(misses: Sequence[MissLine], now_s: float) -> str:
    rows = [
        (
            f"{_duration(now_s - miss.at_s)} ago",
            f"<code>{escape(miss.reason)}</code>",
            f"{miss.missed_blocks:,} of {miss.requested_blocks:,}",
            _foreign(miss.label),
            f"{miss.instance_id}",
        )
        for miss in misses
    ]
    header = ("When", "First missed because", "Blocks#", "Namespace", "Instance#")
    return _table(header, rows, nothing="None since the start.")


def _instances(status: Status) -> str:
    rows = [
        (
            f"{line.instance_id}",
            _foreign(line.name),
            _duration(line.attached_s),
            f"{line.leases:,}",
            f"{line.reservations:,}",
        )
        for line in status.instances
    ]
    header = ("Instance", "Name", "Attached#", "Leases#", "Reservations#")
    return _table(header, rows, nothing="No engine is attached.", all_there_are=status.instances_attached)


def _namespaces(status: Status) -> str:
    rows = [
        (
            _foreign(line.label),
            f"{line.blocks:,}",
            _size(line.dram_bytes),
            f"{line.requested_blocks:,}",
            _share(line.hit_blocks, line.requested_blocks),
        )
        for line in status.namespaces
    ]
    header = ("Namespace", "Blocks#", "DRAM#", "Asked for#", "Hit#")
    return _table(header, rows, nothing="None yet.", all_there_are=status.namespaces_known)


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _table(
    header: Sequence[str], rows: Sequence[Iterable[str]], *, nothing: str = "", all_there_are: int | None = None
) -> str:
    """Cells are HTML. A column whose title ends in "#" holds numbers."""
    if not rows:
        return f"<p>{escape(nothing)}</p>"
    marks = [' class="number"' if title.endswith("#") else "" for title in header]
    titles = [title.removesuffix("#") for title in header]
    head = "".join(f"<th{mark}>{escape(title)}</th>" for mark, title in zip(marks, titles, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{mark} data-title="{escape(title)}">{cell}</td>'
            for mark, title, cell in zip(marks, titles, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    hidden = 0 if all_there_are is None else all_there_are - len(rows)
    more = f"<p>and {hidden:,} more: <code>kvservice stats</code></p>" if hidden > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _total(minutes: Sequence[Sample]) -> HitCounts:
    misses: dict[str, int] = {}
    for minute in minutes:
        for reason, count in minute.counts.misses.items():
            misses[reason] = misses.get(reason, 0) + count
    return HitCounts(sum(m.counts.dram for m in minutes), sum(m.counts.nvme for m in minutes), misses)


def _foreign(text: str) -> str:
    """Text that a client chose."""
    return escape("".join(character if character.isprintable() else "?" for character in text)) or "-"


def _tier_name(name: str) -> str:
    return {"dram": "DRAM", "nvme": "NVMe"}.get(name, escape(name))


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _size(size_bytes: float) -> str:
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def _duration(seconds: float) -> str:
    for unit, length_s in (("d", 86_400.0), ("h", HOUR_S), ("min", 60.0)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
