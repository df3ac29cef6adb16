"""A table of text, which a terminal, markdown and a page show alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from liger_cli.common.text import printable
from liger_cli.report.console import new_table

__all__ = ["Table", "markdown_text"]

_TAG = re.compile(r"<(?=[A-Za-z/!?])")


@dataclass(frozen=True)
class Table:
    """A table of text; rich prints it without its title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @classmethod
    def with_used_columns(
        cls, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
    ) -> Table:
        """Return the table without columns, other than the first, in which no row has anything."""
        rows = list(rows)
        used = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
        shown = [tuple(row[i] for i in used) for row in rows]
        return cls(title, tuple(columns[i] for i in used), shown)

    def markdown(self) -> str:
        """Return the table below its title, as a section of markdown."""
        rows = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        lines = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in rows]
        return "\n".join([f"### {self.title}", "", *lines, ""])

    def __rich__(self) -> RichTable:
        table = new_table(*self.columns)
        for row in self.rows:
            table.add_row(*row)
        return table


def markdown_text(text: str) -> str:
    """Return text of which markdown makes no tag, on one line."""
    return _TAG.sub("&lt;", printable(" ".join(text.split())))


def _markdown_cell(text: str) -> str:
    return markdown_text(text).replace("|", "\\|")
