"""A report as markdown, for the description of a pull request."""

from __future__ import annotations

from collections.abc import Iterable

from liger_cli.report.bench import (
    arms_table,
    asserted_table,
    fits_table,
    parity_table,
    sweep_table,
    verdicts,
)
from liger_cli.report.evaluation import classes_table, eval_lines, eval_table
from liger_cli.report.modules import coverage_table
from liger_cli.report.summary import (
    SavedReport,
    attention_rows,
    environment_rows,
    settings,
    summarize,
)
from liger_cli.report.tables import Table, markdown_text

__all__ = ["markdown"]


def markdown(saved: SavedReport) -> str:
    """Return the report in short; settings and versions are folded away."""
    report, summary = saved.report, summarize(saved)
    figures = [(tile.label, tile.value, tile.note) for tile in summary.tiles]
    tables = [
        Table("Figures", ("", "value", ""), figures),
        arms_table(report) if not report.sweep else sweep_table(report.sweep),
        fits_table(report.fits or ()),
        asserted_table(report),
        parity_table(report),
        eval_table(report),
        classes_table(report),
        coverage_table(report),
    ]
    changed = [
        (setting.key, setting.value, setting.default or "")
        for setting in settings(report.config or {})
        if not setting.is_default
    ]
    folded = [
        Table("Settings", ("key", "value", "default"), changed),
        Table("Environment", ("", "value"), environment_rows(report.environment or {})),
    ]
    head = [f"## {markdown_text(summary.title)}", markdown_text(summary.subtitle)]
    lines = [f"**{markdown_text(summary.headline)}**", *_bullets(verdicts(report))]
    lines += _bullets(eval_lines(report))
    lines += _bullets(f"{name}: {text}" for name, text in attention_rows(report))
    sections = [table.markdown() for table in tables if table is not None and table.rows]
    details = [
        f"<details><summary>{table.title}</summary>\n\n{table.markdown()}\n</details>\n"
        for table in folded
        if table.rows
    ]
    return "\n".join([*(line + "\n" for line in [*head, *lines] if line), *sections, *details])


def _bullets(lines: Iterable[str]) -> list[str]:
    text = "\n".join(f"- {markdown_text(line)}" for line in lines)
    return [text] if text else []
