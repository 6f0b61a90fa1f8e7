"""words: quantities and foreign text as people read them."""

from __future__ import annotations


def size(size_bytes: float) -> str:
    """1536 is "1.5 KiB": three digits that matter."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """3725 is "1h 2m": the two largest units; below a minute with a digit after the point."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m {int(seconds) % 60}s"


def count(number: int, noun: str) -> str:
    """1 is "1 block", 2 is "2 blocks"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def share(part: float, whole: float) -> str:
    """A percentage; "-" where there is nothing to take a part of."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def foreign(text: str) -> str:
    """Text that a client chose, safe for a terminal: control characters are replaced by "?"."""
    return "".join(character if character.isprintable() else "?" for character in text)
