"""config: print the effective configuration, each value with its meaning and where it came from."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice.cli.flags import Parser, add_knobs, read_config


def parser() -> Parser:
    """The arguments of `kvservice config`: those of serve."""
    made = Parser(
        "config",
        "Print the configuration that `kvservice serve` with the same arguments, environment and file would use, as a "
        "TOML file that can be used in its place.",
    )
    add_knobs(made)
    return made


def main(argv: Sequence[str]) -> int:
    """Print the configuration. Raises ConfigError where it is wrong."""
    print(read_config(parser().read(argv)).to_toml(), end="")
    return 0
