"""run: options become runs, a table, plots and summary.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvservice.errors import StartupError
from kvservice.simulate import plots, report
from kvservice.simulate.engine import Simulation
from kvservice.simulate.options import GENERATED, Options
from kvservice.simulate.outcome import Outcome
from kvservice.simulate.replay import replay
from kvservice.simulate.requests import Request, read_trace, unique_blocks
from kvservice.simulate.workload import generate


def run(options: Options) -> None:
    """Run what the options say, print the table and write everything to their directory.

    Raises:
        StartupError: the trace or the output directory cannot be used.
    """
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"--out {options.out}: {error}") from None
    requests = (
        generate(options.workload)
        if options.trace == GENERATED
        else read_trace(Path(options.trace), requests_max=options.requests_max)
    )
    rows = list(_rows(options, requests, Console(stderr=True)))
    (options.out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = report.table(rows)
    (options.out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    if not plots.draw(rows, options.out):
        print("no plots: matplotlib is not installed (pip install 'kvservice[simulate]')", file=sys.stderr)
    print(f"wrote {options.out}")


def _rows(options: Options, requests: Sequence[Request], console: Console) -> Iterator[dict[str, object]]:
    unique, reusable = unique_blocks(requests), _reusable_blocks(requests)
    runs = [
        (policy, window, dram_blocks, nvme_bytes // options.block_bytes)
        for dram_blocks in options.dram_sizes(unique)
        for nvme_bytes in options.nvme_bytes
        for policy in options.policies
        for window in options.runs_of(policy)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for number, (policy, window, dram_blocks, nvme_blocks) in enumerate(runs, 1):
            title = f"{number}/{len(runs)} {policy}, {dram_blocks} blocks of DRAM"
            task = progress.add_task(title, total=len(requests))

            def show(done: int, shown: object = task) -> None:
                if done % 100 == 0:
                    progress.update(shown, completed=done)  # type: ignore[arg-type]  # a TaskID

            outcome = _one(options, requests, policy, window, dram_blocks, nvme_blocks, show)
            progress.remove_task(task)
            yield outcome.row(unique_blocks=unique, reusable_blocks=reusable, block_bytes=options.block_bytes)


def _one(
    options: Options,
    requests: Sequence[Request],
    policy: str,
    window: int,
    dram_blocks: int,
    nvme_blocks: int,
    show: Callable[[int], None],
) -> Outcome:
    if not options.is_timed:
        return replay(
            requests,
            policy,
            queue_window=window,
            dram_blocks=dram_blocks,
            block_bytes=options.block_bytes,
            on_progress=show,
        )
    simulation = Simulation(
        requests,
        policy,
        options.speeds,
        dram_blocks=dram_blocks,
        nvme_blocks=nvme_blocks,
        block_bytes=options.block_bytes,
        block_tokens=options.block_tokens,
        queue_window=window,
        may_recompute=options.may_recompute,
        admission=options.admission,
        on_progress=show,
    )
    return simulation.run()


def _reusable_blocks(requests: Sequence[Request]) -> int:
    """How many leading blocks an endless store would have had, in the order of arrival."""
    seen: set[bytes] = set()
    reusable = 0
    for request in requests:
        if request.truncated:
            seen.update(request.hashes[: len(request.truncated.chain) - request.truncated.first])
        for one in request.hashes:
            if one not in seen:
                break
            reusable += 1
        seen.update(request.stored)
    return reusable
