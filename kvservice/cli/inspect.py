"""inspect: print what is in a directory of the NVMe tier, while no daemon has it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from kvservice.cli.flags import Parser
from kvservice.cli.stats import console
from kvservice.cli.surveys import directory_parser, surveyed
from kvservice.cli.words import count, duration, foreign, size
from kvservice.nvme import NamespaceContents, Survey


def parser() -> Parser:
    """The arguments of `kvservice inspect`."""
    return directory_parser(
        "inspect",
        "Print what is in a directory of the NVMe tier, while no daemon has it (kvservice stats asks a running one). "
        "Reads the index only and changes nothing; kvservice check verifies the blocks.",
    )


def main(argv: Sequence[str]) -> int:
    """Print the contents. Raises CommandFailedError where the directory is a running daemon's, or none."""
    arguments = parser().read(argv)
    with surveyed(arguments.directory) as survey:
        if arguments.json:
            print(as_json(survey, now_s=time.time()))
        else:
            console().print(as_tables(survey, now_s=time.time()))
    return 0


def as_tables(survey: Survey, *, now_s: float) -> Group:
    """The contents for people."""
    live_bytes = sum(found.size_bytes for found in survey.contents())
    free_bytes = max(0, survey.allocated_bytes - live_bytes)
    lines = [
        f"{survey.directory}: {count(survey.blocks, 'block')}, {size(live_bytes)}",
        f"segments: {len(survey.segments):,}, {size(survey.allocated_bytes)}, {size(free_bytes)} of it free",
        f"index: log {size(survey.log_bytes)}, checkpoint {size(survey.checkpoint_bytes)}",
        f"index damage: {count(survey.damaged_pages, 'page')}, {count(survey.lost_records, 'record')} of nothing",
        f"file system: {size(_free_bytes(survey))} free",
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("Namespace", "Tenant", "Fingerprint"):
        table.add_column(heading)
    for heading in ("Block", "Blocks", "Bytes", "Sessions", "Used last", "Longest ago"):
        table.add_column(heading, justify="right")
    for found in survey.contents():
        ages_s = _ages_s(found, now_s)
        table.add_row(
            foreign(found.spec.label),
            foreign(found.spec.key.tenant),
            found.spec.key.fingerprint.hex()[:16],
            size(found.spec.block_size_bytes),
            f"{found.blocks:,}",
            size(found.size_bytes),
            f"{found.sessions:,}",
            *([f"{duration(age_s)} ago" for age_s in ages_s] if found.blocks else ["-", "-"]),
        )
    return Group(*lines, "", table)


def as_json(survey: Survey, *, now_s: float) -> str:
    """The contents for programs."""
    return json.dumps(
        {
            "directory": survey.directory,
            "blocks": survey.blocks,
            "segments": len(survey.segments),
            "segments_bytes": survey.allocated_bytes,
            "file_system_free_bytes": _free_bytes(survey),
            "log_bytes": survey.log_bytes,
            "checkpoint_bytes": survey.checkpoint_bytes,
            "damaged_index_pages": survey.damaged_pages,
            "records_of_nothing": survey.lost_records,
            "namespaces": [
                {
                    "tenant": found.spec.key.tenant,
                    "fingerprint": found.spec.key.fingerprint.hex(),
                    "label": found.spec.label,
                    "block_size_bytes": found.spec.block_size_bytes,
                    "tokens_per_block": found.spec.tokens_per_block,
                    "blocks": found.blocks,
                    "bytes": found.size_bytes,
                    "sessions": found.sessions,
                    "used_last_s_ago": round(_ages_s(found, now_s)[0], 3) if found.blocks else None,
                    "used_longest_s_ago": round(_ages_s(found, now_s)[1], 3) if found.blocks else None,
                }
                for found in survey.contents()
            ],
        },
        indent=2,
    )


def _ages_s(found: NamespaceContents, now_s: float) -> tuple[float, float]:
    return max(0.0, now_s - found.last_used_s), max(0.0, now_s - found.first_used_s)


def _free_bytes(survey: Survey) -> int:
    status = os.statvfs(survey.directory)
    return status.f_bavail * status.f_frsize
