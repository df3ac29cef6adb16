"""A report as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from liger_cli.common.outputs import write_file
from liger_cli.common.text import printable
from liger_cli.report.bench import (
    arms_table,
    asserted_table,
    bench_notes,
    comparisons,
    fits_table,
    parity_table,
    sweep_table,
    verdicts,
)
from liger_cli.report.charts import (
    ablation_charts,
    arm_charts,
    loss_charts,
    step_charts,
    sweep_charts,
)
from liger_cli.report.evaluation import classes_table, eval_lines, eval_table
from liger_cli.report.modules import coverage_table, fold_modules, op_counts, others_lines
from liger_cli.report.summary import (
    SavedReport,
    attention_rows,
    data_rows,
    environment_rows,
    settings,
    summarize,
)
from liger_cli.report.svg import bars_svg, curves_svg
from liger_cli.report.tables import Table

__all__ = ["html", "write_html"]

_NUMBER = re.compile(r"-?\d[\d .,]*(e-?\d+)?\s?(%|x|ms|[kMG]B)?( - [\d.]+)?")


def html(saved: SavedReport) -> str:
    """Return the page of a report. Parts that it does not have are left out."""
    report = saved.report
    script = _asset("report.js")
    # Only this very script may run, so that a name in a report never can.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            summary=summarize(saved),
            style=_asset("report.css"),
            script=script,
            script_hash=f"sha256-{digest}",
            verdicts=[]
            if report.sweep
            else [part.verdict for part in comparisons(report).values()],
            ablation=[part.verdict for part in (report.ablation or {}).values()],
            sizes=verdicts(report) if report.sweep else [],
            notes=others_lines(report) + bench_notes(report),
            arm_charts=arm_charts(report),
            loss_charts=loss_charts(report),
            ablation_charts=ablation_charts(report),
            sweep_charts=sweep_charts(report),
            step_charts=step_charts(saved.steps, saved.evaluations),
            arms=arms_table(report),
            asserted=asserted_table(report),
            sweep=sweep_table(report.sweep or ()),
            fits=fits_table(report.fits or ()),
            parity=parity_table(report),
            coverage=coverage_table(report),
            op_counts={op: op_counts(report, op) for op in report.coverage or {}},
            modules=fold_modules(report.modules or ()),
            evaluation=eval_table(report),
            classes=classes_table(report),
            eval_lines=eval_lines(report),
            data=[*(data_rows(report.data) if report.data else ()), *attention_rows(report)],
            settings=settings(report.config or {}),
            versions=environment_rows(report.environment or {}),
        )
    )


def write_html(saved: SavedReport, path: Path) -> None:
    """Write the page of a report."""
    write_file(path, html(saved))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("liger_cli.report"),
        autoescape=True,
        # What is markup already was made of printable text.
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    helpers: dict[str, Any] = {
        "bars_svg": bars_svg,
        "curves_svg": curves_svg,
        "number_columns": _number_columns,
    }
    environment.globals.update(helpers)
    return environment


def _asset(name: str) -> str:
    return (files("liger_cli.report") / "templates" / name).read_text(encoding="utf-8")


def _number_columns(table: Table) -> set[int]:
    """Return the columns of figures, which stand right; the first one names its row."""
    columns = {i: [row[i] for row in table.rows] for i in range(1, len(table.columns))}
    return {
        index
        for index, cells in columns.items()
        if any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells if cell)
    }
