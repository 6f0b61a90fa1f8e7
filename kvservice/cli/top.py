"""top: watch tiers, hit rates, instances and leases live."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvservice.cli import daemon, panels
from kvservice.cli.failures import CommandFailedError
from kvservice.cli.flags import Parser, add_daemon, daemon_config
from kvservice.cli.rates import rates_between
from kvservice.cli.stats import console
from kvservice.config import Config
from kvservice_proto.v1 import kvservice_pb2 as pb

INTERVAL_S_MIN = 0.1
INTERVAL_S_MAX = 3600.0


def parser() -> Parser:
    """The arguments of `kvservice top`."""
    made = Parser("top", "Watch tiers, hit rates, instances and leases live. q or ctrl-c ends it.")
    made.add_argument(
        "--interval", type=_interval_s, default=1.0, metavar="SECONDS", help="seconds between frames (default 1)"
    )
    made.add_argument(
        "--once",
        action="store_true",
        help="print one plain frame with one interval's rates",
    )
    add_daemon(made)
    return made


def main(argv: Sequence[str]) -> int:
    """Show frames until q or ctrl-c. Raises CommandFailedError where no daemon answers at the start."""
    arguments = parser().read(argv)
    screen = console()
    config = daemon_config(arguments)
    if arguments.once or not screen.is_terminal:
        with daemon.admin(config) as connection:
            before = connection.stats()
            time.sleep(arguments.interval)
            stats = connection.stats()
        screen.print(panels.activity(stats, rates_between(before, stats)))
        return 0
    # SIGTERM ends it like Ctrl-C: the terminal is left as it was.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _single_keys(), Live(console=screen, screen=True, auto_refresh=False) as live:
            _watch(config, live, arguments.interval)
    except KeyboardInterrupt:
        pass  # the documented way out, like q
    return 0


def _watch(config: Config, live: Live, interval_s: float) -> None:
    """Draw frames until q is pressed. A daemon that goes away is waited for, with its last frame on the screen."""
    previous: pb.StatsResponse | None = None
    frame: RenderableType = ""
    while True:
        try:
            with daemon.admin(config) as connection:
                while True:
                    stats: pb.StatsResponse = connection.stats()
                    frame = panels.activity(stats, rates_between(previous or stats, stats))
                    previous = stats
                    live.update(Group(frame, "", _footer(interval_s)), refresh=True)
                    if _quit_pressed_within(interval_s):
                        return
        except CommandFailedError as failed:
            if previous is None:
                raise
            lost = Text(f"{failed}\n\nTrying again. The last frame:\n", style="bold red")
            live.update(Group(lost, frame, "", _footer(interval_s)), refresh=True)
            if _quit_pressed_within(interval_s):
                return


def _footer(interval_s: float) -> Text:
    return Text(f"every {interval_s:g} s; q ends", style="dim")


@contextmanager
def _single_keys() -> Iterator[None]:
    """Deliver keys one by one instead of line by line, while standard input is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _quit_pressed_within(interval_s: float) -> bool:
    """Wait for the interval; True as soon as q is pressed."""
    until_s = time.monotonic() + interval_s
    watched = [sys.stdin] if sys.stdin.isatty() else []
    while (left_s := until_s - time.monotonic()) > 0:
        readable, _, _ = select.select(watched, [], [], left_s)
        # Past Python's buffer, which select does not see. Nothing to read means that the terminal is gone.
        if readable and b"q" in (os.read(sys.stdin.fileno(), 64).lower() or b"q"):
            return True
    return False


def _interval_s(text: str) -> float:
    try:
        interval_s = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of seconds") from None
    if not INTERVAL_S_MIN <= interval_s <= INTERVAL_S_MAX:
        raise argparse.ArgumentTypeError(f"{text} is out of bounds: {INTERVAL_S_MIN} to {INTERVAL_S_MAX:g} seconds")
    return interval_s
