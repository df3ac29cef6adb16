"""Consoles, plain tables, lines and progress that reports are printed with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from liger_cli.common.numbers import finite, format_bytes, format_count
from liger_cli.common.text import printable

__all__ = [
    "TrainProgress",
    "make_console",
    "new_table",
    "notify",
    "print_line",
    "show_json",
    "show_lines",
    "show_table",
]


class _PlainConsole(Console):
    """A console that shows text as it is, and hands no control character to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


# Rows are not broken where no terminal shows them, so that a log can be searched.
_WIDTH_WITHOUT_TERMINAL = 1000


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, stderr: bool = False
) -> None:
    """Print a plain table."""
    table = new_table(*columns)
    for row in rows:
        table.add_row(*row)
    make_console(stderr=stderr).print(table)


def show_lines(*lines: str, stderr: bool = False) -> None:
    """Print lines as they are: no markup, no wrapping."""
    console = make_console(stderr=stderr)
    for line in lines:
        print_line(console, line)


def notify(message: str) -> None:
    """Print a message to stderr, and leave stdout to the result."""
    show_lines(message, stderr=True)


def show_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one JSON document to stdout; NaN and infinity, which JSON does not have, are null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def new_table(*columns: str) -> Table:
    """Return an empty table in the one style of all reports."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def make_console(*, stderr: bool) -> Console:
    """Return a console that breaks no lines where no terminal shows them."""
    console = _PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = _PlainConsole(
            stderr=stderr,
            highlight=False,
            markup=False,
            emoji=False,
            width=_WIDTH_WITHOUT_TERMINAL,
        )
    return console


def print_line(console: Console, line: str) -> None:
    """Print a line as it is."""
    # soft_wrap leaves a long line to the terminal, so that it can be found with grep.
    console.print(line, soft_wrap=True)


class TrainProgress:
    """Show steps on stderr: a bar, or a plain line an update where stderr is no terminal.

    Args:
        total_steps: Steps the run will take.
        description: Word before the bar.
        first_step: Steps done before, of a resumed run.
    """

    def __init__(
        self, total_steps: int, *, description: str = "train", first_step: int = 0
    ) -> None:
        self._total_steps = total_steps
        self._description = description
        self._console = make_console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(
            description, total=total_steps, completed=first_step, values=""
        )

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_s: float | None = None,
        peak_memory_bytes: int | None = None,
        means: Mapping[str, float | None] | None = None,
    ) -> None:
        """Show that `step` (counted from 1) is done, with what is known about it."""
        values = []
        if loss is not None:
            values.append(f"loss {loss:.4f}")
        values += [
            f"{name} {value:.4g}" for name, value in (means or {}).items() if value is not None
        ]
        if tokens_per_s is not None:
            values.append(f"{format_count(tokens_per_s)} tokens/s")
        if peak_memory_bytes is not None:
            values.append(format_bytes(peak_memory_bytes))
        text = "  ".join(values)
        self._bar.update(self._task, completed=step, values=text)
        if not self._console.is_terminal:
            print_line(
                self._console, f"{self._description} {step}/{self._total_steps}  {text}".rstrip()
            )

    def note(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        print_line(self._console, line)
