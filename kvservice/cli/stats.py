"""stats: print what the daemon holds, who uses it, and what happened since it started."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from kvservice.cli import daemon, panels
from kvservice.cli.flags import Parser, add_daemon, daemon_config
from kvservice.cli.messages import as_plain
from kvservice_proto.v1 import kvservice_pb2 as pb

PLAIN_WIDTH = 160
"""Columns of a frame that goes to a file or a pipe."""


def parser() -> Parser:
    """The arguments of `kvservice stats`."""
    made = Parser("stats", "Print tiers, namespaces and instances with totals since the daemon started.")
    made.add_argument("--json", action="store_true", help="print the daemon's answer as JSON")
    add_daemon(made)
    return made


def main(argv: Sequence[str]) -> int:
    """Print the stats. Raises CommandFailedError where no daemon answers."""
    arguments = parser().read(argv)
    with daemon.admin(daemon_config(arguments)) as connection:
        stats: pb.StatsResponse = connection.stats()
    if arguments.json:
        print(json.dumps(as_plain(stats), indent=2))
    else:
        console().print(panels.totals(stats))
    return 0


def console() -> Console:
    """Standard output: as wide as the terminal, or PLAIN_WIDTH where there is none."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
