"""liger report RUN: what a run or a comparison found, as text, markdown, a page or pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["command"]

# Replaces the file of an option that was given without one.
_DEFAULT = ":default:"


_WITH_FILE = ("--html", "--markdown", "--png")
_FILE_OPTIONAL = _WITH_FILE[:2]


class _Report(TyperCommand):
    """--html and --markdown need no file; click knows that of no option that typer makes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before = ["", *args]
        has_run = any(
            not word.startswith("-") and previous not in _WITH_FILE
            for word, previous in zip(args, before, strict=False)
        )
        words: list[str] = []
        for word, following in zip(args, [*args[1:], "-"], strict=True):
            words.append(word)
            # In `report --html RUN` what follows is the run.
            if word in _FILE_OPTIONAL and (following.startswith("-") or not has_run):
                words.append(_DEFAULT)
                has_run = True
        return super().parse_args(ctx, words)


command = typer.Typer(add_completion=False)


@command.command("report", cls=_Report)
def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run directory, report.json, or what --json printed."),
    ],
    html: Annotated[
        str | None,
        typer.Option(metavar="[FILE]", help="Write a page (default: report.html in the run)."),
    ] = None,
    markdown: Annotated[
        str | None,
        typer.Option(metavar="[FILE]", help="Write markdown, to stdout if no file is named."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="DIR|FILE", help="Draw the charts, or the first one into a .png."),
    ] = None,
) -> None:
    """Show a report again: in the terminal, or as a page, markdown or pictures if asked for."""
    from liger_cli.commands.report.saved_report import read_saved
    from liger_cli.report import show_lines, show_report
    from liger_cli.report.files import write_files
    from liger_cli.report.markdown import markdown as as_markdown

    saved = read_saved(run)
    beside = run / "report.html" if run.is_dir() else run.with_suffix(".html")
    page = None if html is None else beside if html == _DEFAULT else Path(html)
    file = None if markdown is None or markdown == _DEFAULT else Path(markdown)
    written = write_files(saved, page=page, markdown=file, pictures=png)
    if markdown == _DEFAULT:
        show_lines(as_markdown(saved))
    if html is None and markdown is None and png is None:
        show_report(saved.report, as_json=False)
    show_lines(*(f"wrote {path}" for path in written), stderr=True)
