"""figures: every figure with a bound, the subject that measures it, and whether a result meets its bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.measuring import Record


class Direction(Enum):
    """On which side of the limit a ratio must be."""

    AT_LEAST = ">="
    AT_MOST = "<="


class Verdict(Enum):
    """What became of a figure."""

    MET = "met"
    MISSED = "MISSED"
    REPORTED = "(no bound)"


@dataclass(frozen=True, slots=True)
class Figure:
    """A promise about the ratio of one record."""

    name: str
    subject: str
    direction: Direction
    limit: float

    @property
    def bound(self) -> str:
        """The promise in words, such as ">= 0.8"."""
        return f"{self.direction.value} {self.limit:g}"

    def is_met(self, ratio: float) -> bool:
        """Whether a record with this ratio keeps the promise."""
        return ratio >= self.limit if self.direction is Direction.AT_LEAST else ratio <= self.limit


def _versus(subject: str, prefix: str) -> Iterable[Figure]:
    for size in ("1MiB", "16MiB"):
        for verb in ("get", "put"):
            yield Figure(f"{prefix}_{verb}_{size}", subject, Direction.AT_LEAST, 3.0)


FIGURES: Sequence[Figure] = (
    Figure("shm_save_ratio", "shared_memory", Direction.AT_LEAST, 0.80),
    Figure("shm_load_ratio", "shared_memory", Direction.AT_LEAST, 0.85),
    Figure("lookup_1_ratio", "lookup", Direction.AT_MOST, 0.6),
    Figure("lookup_128_ratio", "lookup", Direction.AT_MOST, 0.6),
    Figure("lookup_2048_ratio", "lookup", Direction.AT_MOST, 1.0),
    Figure("lookup_128_socket_ratio", "lookup", Direction.AT_MOST, 0.5),
    Figure("lookup_128_socket_paused_ratio", "lookup", Direction.AT_MOST, 0.6),
    Figure("lookup_1_growth", "lookup", Direction.AT_MOST, 1.3),
    Figure("policy_touch_us", "policies", Direction.AT_MOST, 3.0),
    Figure("policy_evict_us", "policies", Direction.AT_MOST, 3.0),
    *_versus("redis_reference", "vs_redis"),
    *_versus("mooncake_reference", "vs_mooncake"),
    Figure("index_bytes_per_block", "index_memory", Direction.AT_MOST, 400),
    Figure("nvme_read_ratio", "nvme", Direction.AT_LEAST, 0.9),
    Figure("nvme_write_ratio", "nvme", Direction.AT_LEAST, 0.85),
    Figure("nvme_first_block_share", "nvme", Direction.AT_MOST, 0.05),
    Figure("recovery_s_per_million", "recovery", Direction.AT_MOST, 10),
    Figure("loop_stall_ratio", "recovery", Direction.AT_MOST, 3),
    Figure("vllm_cold_overhead", "vllm_reuse", Direction.AT_LEAST, 0.97),
    Figure("vllm_multi_turn_ttft_ratio", "vllm_reuse", Direction.AT_MOST, 0.5),
    Figure("vllm_slow_disk_ttft_p50", "vllm_reuse", Direction.AT_MOST, 1.05),
    Figure("vllm_slow_disk_ttft_p99", "vllm_reuse", Direction.AT_MOST, 1.05),
)


def verdict_on(record: Record) -> Verdict:
    """Whether the record's figure has a bound and meets it."""
    for figure in FIGURES:
        if figure.name == record.name:
            return Verdict.MET if figure.is_met(record.ratio) else Verdict.MISSED
    return Verdict.REPORTED


def bound_of(name: str) -> str:
    """The bound of a figure in words; empty for a result that is only reported."""
    return next((figure.bound for figure in FIGURES if figure.name == name), "")


def table(records: Sequence[Record], skipped: Sequence[tuple[str, str]]) -> str:
    """A table for people: one line per record, then one per skipped subject (name, reason)."""
    rows = [("figure", "ours", "reference", "unit", "ratio", "bound", "")]
    for record in records:
        reference = "-" if record.reference is None else f"{record.reference:.4g}"
        rows.append(
            (
                record.name,
                f"{record.value:.4g}",
                reference,
                record.unit,
                f"{record.ratio:.3g}",
                bound_of(record.name),
                verdict_on(record).value,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    lines += [f"{name}: skipped: {reason}" for name, reason in skipped]
    return "\n".join(lines)
