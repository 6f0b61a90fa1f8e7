"""demo: hand over to the demo, which has arguments of its own."""

from __future__ import annotations

import signal
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the demo with its arguments; returns its exit status."""
    from kvservice.demo import main as run_demo  # noqa: PLC0415  # it loads torch, which takes seconds

    # SIGTERM ends it like Ctrl-C: its daemon and its engines end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_demo(argv)
