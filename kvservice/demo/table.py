"""table: what the demo shows: live on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvservice.demo.checks import Row

_TITLE = "Turns recomputed without the service and resumed from it; TTFT in ms"
_FILE_WIDTH = 120


def made_console() -> Console:
    """The console to print to; wide enough for a row in one line where it goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def table_of(rows: Sequence[Row]) -> Table:
    """All turns so far, one line each; 79 columns wide."""
    planes = ", ".join(dict.fromkeys(row.plane for row in rows))
    title = f"{_TITLE}\nBlocks travel by {escape(planes)}"
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=0)
    headings = (
        "con-\nver.", "turn", "en-\ngine", "his-\ntory", "\nreused", "\nfrom", "com-\nputed", "TTFT\nrecom.",
        "TTFT\nresum.", "fas-\nter", "\ntokens", "log.\ndiff", "drop-\nped",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    engine = rows[0].engine if rows else ""
    for row in rows:
        if row.engine != engine:
            table.add_section()
            engine = row.engine
        table.add_row(*_cells(row), style="red" if row.problems else "")
    return table


def _cells(row: Row) -> list[str]:
    return [
        str(row.conversation),
        str(row.turn),
        row.engine.removeprefix("engine "),
        f"{row.history_tokens:,}",
        f"{row.reused_tokens:,}",
        row.origin,
        f"{row.computed_tokens:,}",
        f"{row.ttft_recomputed_ms:.1f}",
        f"{row.ttft_resumed_ms:.1f}",
        f"{row.speed_up:.1f}x" if row.history_tokens else "-",
        "same" if row.tokens_identical else "approx" if row.dropped_tokens else "DIFFER",
        f"{row.logits_difference_max:.0e}",
        f"{row.dropped_tokens:,}" if row.dropped_tokens else "-",
    ]


class Progressing:
    """Says what is going on: a bar and the growing table on a terminal, a line per event elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[Row] = []
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._task: TaskID | None = None
        self._live = Live(console=console, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            # The final table is printed by the caller; what was live is cleared.
            self._live.update("")
            self._live.stop()

    def phase(self, description: str, *, steps: int) -> None:
        """A new part of the demo begins."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=steps)
        if not self._live:
            self._say(description)
        self._refresh()

    def step(self, text: str) -> None:
        """One step of the phase is done."""
        if self._task is not None:
            self._progress.advance(self._task)
        if not self._live:
            self._say(f"  {text}")
        self._refresh()

    def row(self, row: Row) -> None:
        """A turn was resumed: one step of the phase."""
        self._rows.append(row)
        self.step(
            f"conversation {row.conversation} turn {row.turn}: {row.history_tokens} tokens of history, "
            f"{row.reused_tokens} of them from {row.origin}, {row.computed_tokens} computed, "
            f"first token after {row.ttft_resumed_ms:.1f} ms "
            f"(recomputed: {row.ttft_recomputed_ms:.1f}), "
            f"tokens {'identical' if row.tokens_identical else 'approximate' if row.dropped_tokens else 'DIFFER'}"
            + (f", {row.dropped_tokens} tokens dropped" if row.dropped_tokens else "")
        )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        # A pipe would keep the lines back until there are many, and these are the progress.
        self._console.file.flush()

    def _refresh(self) -> None:
        if self._live:
            shown = (table_of(self._rows), self._progress) if self._rows else (self._progress,)
            self._live.update(Group(*shown))
