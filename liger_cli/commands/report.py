"""liger report RUN: what a run or a comparison found, as text, markdown, a page or pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["command"]

# What stands for the file of an option that was given without one.
_DEFAULT = ":default:"


class _Report(TyperCommand):
    """--html and --markdown need no file; click knows that of no option that typer makes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        for word, following in zip(args, [*args[1:], "-"], strict=True):
            words.append(word)
            if word in ("--html", "--markdown") and following.startswith("-"):
                words.append(_DEFAULT)
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
    from liger_cli.report import show_lines, show_report
    from liger_cli.report.html import write_html
    from liger_cli.report.markdown import markdown as as_markdown
    from liger_cli.report.pictures import write_pictures
    from liger_cli.saved_report import read_saved

    saved = read_saved(run)
    written: list[Path] = []
    if html is not None:
        beside = run / "report.html" if run.is_dir() else run.with_suffix(".html")
        page = beside if html == _DEFAULT else Path(html)
        write_html(saved, page)
        written.append(page)
    if markdown == _DEFAULT:
        show_lines(as_markdown(saved))
    elif markdown is not None:
        Path(markdown).write_text(as_markdown(saved), encoding="utf-8")
        written.append(Path(markdown))
    if png is not None:
        written += write_pictures(saved, png)
    if html is None and markdown is None and png is None:
        show_report(saved.report, as_json=False)
    show_lines(*(f"wrote {path}" for path in written), stderr=True)
