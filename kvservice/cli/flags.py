"""flags: one command line flag per knob, and the flags with which a command finds its daemon."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kvservice.cli.failures import USAGE
from kvservice.config import CONFIG_VARIABLE, KNOBS, Config, Kind, nearest_name


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and suggests the nearest flag for an unknown one.

    Args:
        command: the name after `kvservice`.
        about: what the command does, for its help.
    """

    def __init__(self, command: str, about: str) -> None:
        super().__init__(prog=f"kvservice {command}", description=about, allow_abbrev=False)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; a wrong one ends the process with status 2 and a message."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{nearest_name(flag, known)}")
        return arguments

    def error(self, message: str) -> NoReturn:
        """End the process with status 2, the message, and where to read more; not with the whole usage."""
        self.exit(USAGE, f"{self.prog}: {message}\n{self.prog} --help lists the arguments\n")


def add_knobs(parser: Parser) -> None:
    """--config, and a flag for every knob that can be written as text."""
    parser.usage = f"{parser.prog} [--config FILE] [--KNOB VALUE ...]"
    parser.add_argument("--config", metavar="FILE", default="", help=f"TOML file; without it ${CONFIG_VARIABLE}")
    knobs = [knob for knob in KNOBS.values() if knob.kind is not Kind.RULES]
    for section in dict.fromkeys(knob.section for knob in knobs):
        group = parser.add_argument_group(section)
        for knob in knobs:
            if knob.section == section:
                about = f"{knob.about} [{knob.facts()}]".replace("%", "%%")
                group.add_argument(knob.flag, dest=knob.name, metavar=knob.kind.name, help=about)


def read_config(arguments: argparse.Namespace) -> Config:
    """The effective configuration of a command whose parser has the knobs. Raises ConfigError."""
    given = {name: getattr(arguments, name, None) for name in KNOBS}
    flags = {name: text for name, text in given.items() if text is not None}
    if flags.get("socket_dir"):
        flags["socket_dir"] = str(Path(flags["socket_dir"]).absolute())
    return Config.load(flags, os.environ, config_file=arguments.config)


def add_daemon(parser: Parser) -> None:
    """The flags with which a command finds the daemon."""
    parser.add_argument("--socket-dir", metavar="DIR", default="", help="the daemon's socket directory")
    parser.add_argument(
        "--config", metavar="FILE", default="", help="the daemon's TOML file, to find its socket directory in"
    )


def daemon_config(arguments: argparse.Namespace) -> Config:
    """A configuration whose socket_dir is the daemon's, found in the way in which the daemon finds it.

    With --socket-dir nothing else is read: a broken file must not stop anybody from asking a running daemon.

    Raises:
        ConfigError: the file or the environment is wrong.
    """
    if arguments.socket_dir:
        return Config.load({"socket_dir": str(Path(arguments.socket_dir).absolute())}, {})
    return Config.load({}, os.environ, config_file=arguments.config)
