"""multi_turn_report: what a run of `multi_turn` measured, as a table, as JSON, as a plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One request.

    Attributes:
        ttft_s: from sending it to the first text of the answer.
        reused_tokens: of the prompt, not computed, as the server says (vLLM: --enable-prompt-tokens-details).
        ended_at_s: since the run began.
        error: why it failed; "": it did not.
    """

    ttft_s: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    conversation: int = 0
    position: int = 0
    ended_at_s: float = 0.0
    error: str = ""

    def at(self, conversation: int, position: int, *, since_s: float) -> Turn:
        """The same, and where it belongs."""
        return dataclasses.replace(self, conversation=conversation, position=position, ended_at_s=since_s)


@dataclass(frozen=True)
class Report:
    """All turns of a run, and how long it took."""

    turns: Sequence[Turn]
    seconds: float

    @property
    def failed(self) -> list[Turn]:
        """Requests that did not get their answer."""
        return [turn for turn in self.turns if turn.error]

    @property
    def resumed(self) -> list[Turn]:
        """Answered turns that had a history."""
        return [turn for turn in self.turns if turn.position and not turn.error]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a summary, and every turn."""
        return {
            "seconds": self.seconds,
            "requests": len(self.turns),
            "failed": len(self.failed),
            "first_turns": self._summary(turn for turn in self.turns if not turn.position and not turn.error),
            "resumed_turns": self._summary(self.resumed),
            "turns": [dataclasses.asdict(turn) for turn in self.turns],
        }

    def table(self) -> str:
        """For people."""
        told = self.to_dict()
        lines = [
            f"{told['requests']} requests in {self.seconds:.1f} s, {told['failed']} failed",
            f"{'':<14}{'requests':>9}{'TTFT p50':>10}{'p90':>8}{'p99':>8}{'computed':>10}{'reused':>9}{'answer/s':>10}",
        ]
        for name in ("first_turns", "resumed_turns"):
            part = told[name]
            lines.append(
                f"{name.replace('_', ' '):<14}{part['requests']:>9}"
                f"{part['ttft_p50_s']:>9.3f}s{part['ttft_p90_s']:>7.3f}s{part['ttft_p99_s']:>7.3f}s{part['computed_tokens']:>10}{part['reused_tokens']:>9}"
                f"{part['answer_tokens_per_s']:>10.1f}"
            )
        lines += [
            f"failed: conversation {turn.conversation}, turn {turn.position}: {turn.error}" for turn in self.failed
        ]
        return "\n".join(lines)

    def _summary(self, turns: Iterable[Turn]) -> dict[str, float]:
        chosen = list(turns)
        ttfts = sorted(turn.ttft_s for turn in chosen)
        reused = sum(turn.reused_tokens for turn in chosen)
        return {
            "requests": len(chosen),
            "ttft_p50_s": percentile(ttfts, 0.5),
            "ttft_p90_s": percentile(ttfts, 0.9),
            "ttft_p99_s": percentile(ttfts, 0.99),
            "computed_tokens": sum(turn.prompt_tokens for turn in chosen) - reused,
            "reused_tokens": reused,
            "answer_tokens_per_s": sum(turn.answer_tokens for turn in chosen) / self.seconds,
        }


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The smallest value with at least that fraction of all at or below it; 0.0 of none."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def write_plot(report: Report, path: Path) -> None:
    """Time to first token by turn, and what was computed and reused. Raises ImportError: there is no matplotlib."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # only where a plot is asked for

    positions = sorted({turn.position for turn in report.turns if not turn.error})
    by_position = [[turn for turn in report.turns if turn.position == place and not turn.error] for place in positions]
    numbers = [place + 1 for place in positions]
    figure = Figure(figsize=(9, 4), layout="constrained")
    times, tokens = figure.subplots(1, 2)
    for name, fraction in (("p50", 0.5), ("p90", 0.9)):
        values = [percentile(sorted(turn.ttft_s for turn in turns), fraction) for turns in by_position]
        times.plot(numbers, values, marker="o", label=name)
    times.set(xlabel="turn", xticks=numbers, ylabel="time to first token [s]", ylim=(0, None))
    times.legend()
    reused = [sum(turn.reused_tokens for turn in turns) for turns in by_position]
    computed = [
        sum(turn.prompt_tokens for turn in turns) - kept for turns, kept in zip(by_position, reused, strict=True)
    ]
    tokens.bar(numbers, computed, label="computed")
    tokens.bar(numbers, reused, bottom=computed, label="reused")
    tokens.set(xlabel="turn", xticks=numbers, ylabel="prefill tokens")
    tokens.legend()
    figure.savefig(path)
