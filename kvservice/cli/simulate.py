"""simulate: replay a trace or a generated workload against the daemon's own policies."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice.cli.flags import Parser


def main(argv: Sequence[str]) -> int:
    """Run the simulator with its arguments; returns its exit status."""
    from kvservice.simulate import add_arguments, read_options, run  # noqa: PLC0415  # loads half of the daemon

    about = "Replay a trace or a generated workload against the daemon's own index, policies and planner."
    parser = Parser("simulate", about)
    add_arguments(parser)
    run(read_options(parser, parser.read(argv)))
    return 0
