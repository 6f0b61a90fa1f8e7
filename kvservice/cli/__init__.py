"""cli: the `kvservice` command: serve, demo, stats, top, explain, check, inspect, simulate, config.

One file per command, imported only when that command runs, so that help is there at once. Exit statuses: 0 done,
1 failed, 2 wrong usage or no daemon answers, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvservice import __version__
from kvservice.cli.failures import FAILED, INTERRUPTED, USAGE, CommandFailedError
from kvservice.errors import StartupError

COMMANDS: Mapping[str, str] = {
    "serve": "run the daemon of this node",
    "demo": "watch conversations resume from the service with the same tokens",
    "stats": "print what the daemon holds and who uses it",
    "top": "watch the same live",
    "explain": "say why a block is a hit or a miss",
    "check": "verify every block in a directory of the NVMe tier, offline",
    "inspect": "print what is in a directory of the NVMe tier, offline",
    "simulate": "replay a trace against the eviction policies",
    "config": "print the effective configuration as TOML",
}


class Command(Protocol):
    """What each module of a command offers."""

    def main(self, argv: Sequence[str]) -> int:
        """Run with the arguments after the command's name; returns the exit status."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` without the program's name, sys.argv's when None."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_usage())
        return 0 if arguments else USAGE
    if arguments[0] in {"-V", "--version", "version"}:
        print(f"kvservice {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(COMMANDS)}"
        print(f"kvservice: {name!r} is not a command{hint}", file=sys.stderr)
        return USAGE
    return _run(name, rest)


def _run(name: str, arguments: Sequence[str]) -> int:
    command: Command = importlib.import_module(f"kvservice.cli.{name}")
    try:
        status = command.main(arguments)
        sys.stdout.flush()
    except CommandFailedError as failed:
        print(f"kvservice {name}: {failed}", file=sys.stderr)
        return failed.status
    except StartupError as error:
        print(f"kvservice {name}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough (| head). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _usage() -> str:
    lines = ["usage: kvservice COMMAND [ARGUMENTS]", ""]
    lines += [f"  {name:<9}{about}" for name, about in COMMANDS.items()]
    lines += ["", "kvservice COMMAND --help says more. docs/OPERATIONS.md says what to do when something is wrong."]
    return "\n".join(lines)
