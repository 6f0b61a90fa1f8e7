"""surveys: what the commands that read a directory of the NVMe tier have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvservice.cli.failures import USAGE, CommandFailedError
from kvservice.cli.flags import Parser
from kvservice.errors import StartupError
from kvservice.nvme import Survey


def directory_parser(command: str, about: str) -> Parser:
    """The arguments of a command that reads one directory."""
    made = Parser(command, about)
    made.add_argument("directory", metavar="DIR", help="one of the daemon's nvme_dirs")
    made.add_argument("--json", action="store_true", help="print what was found as JSON")
    return made


@contextmanager
def surveyed(directory: str) -> Iterator[Survey]:
    """The directory's survey. Raises CommandFailedError where it is a running daemon's, none, or cannot be read."""
    try:
        with Survey(directory) as survey:
            yield survey
    except (StartupError, OSError) as error:
        raise CommandFailedError(str(error), status=USAGE) from error
