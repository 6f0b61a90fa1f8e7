"""run: the benchmarks' front door: `python -m benchmarks.run [--only NAME,...] [--out FILE] [--quick]`.

One JSON line per result on stdout and in the file, progress and a table with the bounds on stderr. Exit status 0 when
everything that was asked for was measured or skipped with a reason, whether or not it meets its bound; 1 when a
benchmark failed or bytes were wrong; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import (
    index_memory,
    lookup,
    mooncake_reference,
    nvme,
    policies,
    recovery,
    redis_reference,
    shared_memory,
    shift_load,
    vllm_reuse,
)
from benchmarks.figures import FIGURES, table
from benchmarks.measuring import Record, Skipped, progress
from benchmarks.settings import FULL, QUICK, Settings

SUBJECTS: Mapping[str, Callable[[Settings], Iterator[Record]]] = {
    "shared_memory": shared_memory.measure,
    "lookup": lookup.measure,
    "redis_reference": redis_reference.measure,
    "mooncake_reference": mooncake_reference.measure,
    "index_memory": index_memory.measure,
    "vllm_reuse": vllm_reuse.measure,
    "shift_load": shift_load.measure,
    "nvme": nvme.measure,
    "recovery": recovery.measure,
    "policies": policies.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for. Blocks until done: several minutes for everything."""
    options = _parser().parse_args(arguments)
    wanted: list[str] = options.only or list(SUBJECTS)
    settings = QUICK if options.quick else FULL
    options.out.parent.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    skipped: list[tuple[str, str]] = []
    failed: list[str] = []
    with options.out.open("w", encoding="utf-8") as out:
        for name in wanted:
            started_s = time.monotonic()
            progress(f"== {name}")
            try:
                for record in SUBJECTS[name](settings):
                    records.append(record)
                    for stream in (out, sys.stdout):
                        print(record.to_json(), file=stream, flush=True)
            except Skipped as reason:
                skipped.append((name, str(reason)))
            except Exception:  # noqa: BLE001  # the other benchmarks still run; the exit status and the trace tell
                traceback.print_exc()
                failed.append(name)
            progress(f"== {name}: {time.monotonic() - started_s:.0f} s")
    progress("\n" + table(records, skipped))
    if options.quick:
        progress("--quick: small sizes and few repetitions; these are not the figures.")
    for name in failed:
        progress(f"{name}: FAILED, see the traceback above")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure what the project promises.")
    parser.add_argument(
        "--only",
        type=_subjects,
        metavar="NAME,...",
        help=f"subjects ({', '.join(SUBJECTS)}) or figures; a figure stands for its subject",
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench.jsonl"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small and few: does it run, not how fast is it")
    return parser


def _subjects(text: str) -> list[str]:
    by_figure = {figure.name: figure.subject for figure in FIGURES}
    found: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        subject = by_figure.get(name, name)
        if subject not in SUBJECTS:
            known = ", ".join([*SUBJECTS, *by_figure])
            raise argparse.ArgumentTypeError(f"unknown name {name!r}; choose from {known}")
        found[subject] = None
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
