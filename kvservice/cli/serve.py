"""serve: run the daemon in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

import os
import sys
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
    _hold_standard_streams()
    config = read_config(parser().read(argv))
    logs.configure(config.log_level)
    # Imported late: wrong arguments are answered before grpc and numpy are loaded.
    from kvservice.server import run  # noqa: PLC0415

    return run(config)


def _hold_standard_streams() -> None:
    """Open those that a supervisor closed: else a file of the disk gets their number, and what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # noqa: FBT003  # the standard library's signature
    os.close(descriptor)
    # Python has None where it found a stream closed. These stay open for as long as the process lives.
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
