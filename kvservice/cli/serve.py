"""serve: run the daemon in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice import logs
from kvservice.cli.flags import Parser, add_knobs, read_config


def parser() -> Parser:
    """The arguments of `kvservice serve`."""
    made = Parser("serve", "Run the daemon of this node in the foreground. SIGTERM drains it.")
    add_knobs(made)
    return made


def main(argv: Sequence[str]) -> int:
    """Run the daemon; returns its exit status. Raises StartupError where it cannot start."""
    config = read_config(parser().read(argv))
    logs.configure(config.log_level)
    # Imported late: wrong arguments are answered before grpc and numpy are loaded.
    from kvservice.server import run  # noqa: PLC0415

    return run(config)
