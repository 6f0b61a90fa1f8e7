"""check: verify every block in a directory of the NVMe tier, while no daemon has it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvservice.cli.failures import FAILED
from kvservice.cli.flags import Parser
from kvservice.cli.surveys import directory_parser, surveyed
from kvservice.cli.words import count, duration, foreign, size
from kvservice.nvme import CheckedExtent, extent_stride_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found."""

    directory: str
    checked_blocks: int
    checked_bytes: int
    seconds: float
    bad: Sequence[CheckedExtent]
    superseded: int
    damage: Sequence[str]
    """Of anything but extents, one sentence each."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is damaged."""
        return not self.bad and not self.damage


def parser() -> Parser:
    """The arguments of `kvservice check`."""
    return directory_parser(
        "check",
        "Read and verify every block in a directory of the NVMe tier, while no daemon has it. Changes nothing. Exit "
        "status: 0 all is intact, 1 something is damaged, 2 it could not be checked.",
    )


def main(argv: Sequence[str]) -> int:
    """Check and print. Raises CommandFailedError where the directory is a running daemon's, or none."""
    arguments = parser().read(argv)
    report = examined(arguments.directory)
    print(as_json(report) if arguments.json else as_text(report))
    return 0 if report.is_clean else FAILED


def examined(directory: str) -> Report:
    """Check a directory, with a progress bar on a terminal's stderr. Blocks. Raises CommandFailedError."""
    started_s = time.monotonic()
    with surveyed(directory) as survey:
        bad, superseded, blocks, size_bytes = [], 0, 0, 0
        for extent in _shown(survey.check(), survey.blocks):
            blocks += 1
            size_bytes += extent_stride_bytes(extent.spec.block_size_bytes)
            superseded += extent.is_superseded
            if extent.is_bad:
                bad.append(extent)
        damage = survey.damage()
    return Report(directory, blocks, size_bytes, time.monotonic() - started_s, bad, superseded, damage)


def as_text(report: Report) -> str:
    """The report for people: one line for each thing that is wrong, then the counts."""
    lines = [f"bad: {sentence}" for sentence in (*map(_sentence, report.bad), *report.damage)]
    lines.append(
        f"{report.directory}: {count(report.checked_blocks, 'block')}, {size(report.checked_bytes)} verified in "
        f"{duration(report.seconds)}; {count(len(report.bad), 'bad extent')}"
        + (f", {len(report.damage)} other damages" if report.damage else "")
    )
    if report.superseded:
        lines.append(
            f"{count(report.superseded, 'extent')} already had another block when a crash came: those are misses"
        )
    if not report.is_clean:
        lines.append("Next: a daemon may use the directory all the same: it serves what is intact, the rest is misses")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """The report for programs."""
    return json.dumps(
        {
            "directory": report.directory,
            "is_clean": report.is_clean,
            "checked_blocks": report.checked_blocks,
            "checked_bytes": report.checked_bytes,
            "seconds": round(report.seconds, 3),
            "superseded_extents": report.superseded,
            "bad_extents": [
                {
                    "hash": extent.block_hash.hex(),
                    "segment_id": extent.segment_id,
                    "extent": extent.place,
                    "path": extent.path,
                    "offset_bytes": extent.offset_bytes,
                    "why": extent.why,
                    "tenant": extent.spec.key.tenant,
                    "fingerprint": extent.spec.key.fingerprint.hex(),
                    "label": extent.spec.label,
                }
                for extent in report.bad
            ],
            "damage": list(report.damage),
        },
        indent=2,
    )


def _sentence(extent: CheckedExtent) -> str:
    where = f"in segment {extent.segment_id}, extent {extent.place} ({extent.path} from byte {extent.offset_bytes})"
    return f'block {extent.block_hash.hex()} {where}: {extent.why}; namespace "{foreign(extent.spec.label)}"'


def _shown(extents: Iterable[CheckedExtent], total: int) -> Iterator[CheckedExtent]:
    """The same, with a progress bar where a person watches."""
    console = Console(stderr=True)
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("blocks"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(extents, total=total)
