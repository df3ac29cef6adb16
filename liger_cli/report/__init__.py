"""Run reports: what a command found, as one value that prints, serialises to JSON and comes back.

Every command fills a RunReport. `to_json` is what --json prints and report.json holds;
`show_report` draws the tables and the last line. The pieces are its modules, by subject; only
these and app.py import rich.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.report.bench import (
    arms_table,
    asserted_table,
    bench_notes,
    fits_table,
    gain_text,
    sweep_table,
    verdict,
    verdicts,
)
from liger_cli.report.console import (
    TrainProgress,
    make_console,
    notify,
    print_line,
    show_json,
    show_lines,
    show_table,
)
from liger_cli.report.evaluation import classes_table, eval_lines, eval_table, eval_texts
from liger_cli.report.layout import layout_lines, layout_table
from liger_cli.report.modules import (
    FoldedRow,
    coverage_table,
    fold_modules,
    modules_table,
    op_counts,
    others_lines,
    unmet_requirements,
)
from liger_cli.report.tables import Table
from liger_cli.report.training import train_lines
from liger_cli.report.values import (
    MIN_MEMORY_NOISE,
    MIN_SPEED_NOISE,
    AgainstPart,
    Arm,
    AssertPart,
    AttentionPart,
    BatchPart,
    BestPart,
    DataPart,
    EvalPart,
    Finite,
    FitPart,
    GainPart,
    LayerPart,
    ParityPart,
    PeerPart,
    RatiosPart,
    RunReport,
    StopPart,
    SweepPoint,
    TrainPart,
)

__all__ = [
    "MIN_MEMORY_NOISE",
    "MIN_SPEED_NOISE",
    "AgainstPart",
    "Arm",
    "AssertPart",
    "AttentionPart",
    "BatchPart",
    "BestPart",
    "DataPart",
    "EvalPart",
    "Finite",
    "FitPart",
    "FoldedRow",
    "GainPart",
    "LayerPart",
    "ParityPart",
    "PeerPart",
    "RatiosPart",
    "RunReport",
    "StopPart",
    "SweepPoint",
    "TrainPart",
    "TrainProgress",
    "arms_table",
    "coverage_table",
    "eval_texts",
    "fold_modules",
    "last_line",
    "modules_table",
    "notify",
    "show_json",
    "show_lines",
    "show_patched",
    "show_report",
    "show_table",
    "unmet_requirements",
    "verdict",
]


def last_line(report: RunReport) -> str:
    """Return the line that ends a run: kernels, peak memory, speed, gain against eager."""
    ops = []
    for op in report.coverage or {}:
        used, candidates, unused = op_counts(report, op)
        ops.append(f"{op} {used}/{candidates}" + (f" ({unused} unused)" if unused else ""))
    groups = ["kernels: " + ("  ".join(ops) or "none")]
    measured = report.train or _patched_arm(report)
    if measured is not None and measured.peak_memory_bytes is not None:
        groups.append(f"peak {format_bytes(measured.peak_memory_bytes)}")
    if measured is not None and measured.tokens_per_s is not None:
        groups.append(f"{format_count(measured.tokens_per_s)} tokens/s")
    if report.gain is not None and (gain := gain_text(report.gain)):
        groups.append(gain)
    return "   ".join(groups)


def _patched_arm(report: RunReport) -> Arm | None:
    return next((arm for arm in report.arms or () if arm.name == "patched"), None)


def show_patched(report: RunReport) -> None:
    """Print the model and the table of its ops to stderr, before a run begins."""
    console = make_console(stderr=True)
    _show_model(console, report)
    for line in others_lines(report):
        print_line(console, line)


def _show_model(console: Any, report: RunReport) -> None:
    if report.model is not None:
        print_line(console, _model_text(report.model))
    # Without rows the coverage has neither backends nor reasons; the last line says the rest.
    if report.modules is not None:
        console.print(coverage_table(report))
        console.print()


def show_report(
    report: RunReport,
    *,
    as_json: bool,
    is_result: bool = False,
    details: bool = False,
    verbose: bool = False,
    html: Path | None = None,
) -> None:
    """Print the report: the model and its ops, the results, and the last line last.

    Args:
        as_json: The JSON alone to stdout, everything else to stderr.
        is_result: Whether the model and its ops are left out, which show_patched has printed.
        details: Also the tree of modules.
        verbose: In it also the file and line of each forward.
        html: A file that gets the report as a page.
    """
    console = make_console(stderr=as_json)
    if not is_result:
        _show_model(console, report)
    lines = train_lines(report)
    for table in _tables(report, details=details, verbose=verbose):
        # Training comes before the evaluation of what was trained.
        show_lines(*lines, stderr=as_json)
        lines = []
        console.print(table)
        console.print()
    lines += [] if is_result else others_lines(report)
    lines += [] if report.layout is None else layout_lines(report.layout)
    lines += bench_notes(report) + eval_lines(report)
    lines += verdicts(report)
    if report.coverage is not None:
        lines.append(last_line(report))
    for line in lines:
        print_line(console, line)
    if html is not None:
        # Templates are read where a page is written alone.
        from liger_cli.report.html import write_html
        from liger_cli.report.summary import SavedReport

        write_html(SavedReport(report), html)
        show_lines(f"wrote {html}", stderr=True)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")


def _tables(report: RunReport, *, details: bool, verbose: bool) -> list[Table]:
    tables = [modules_table(report, verbose=verbose)] if details and report.modules else []
    if report.layout is not None:
        tables.append(layout_table(report.layout))
    if report.sweep:
        tables.append(sweep_table(report.sweep))
    elif report.arms:
        tables.append(arms_table(report))
    if report.fits:
        tables.append(fits_table(report.fits))
    if report.asserted:
        tables.append(asserted_table(report))
    found = (eval_table(report), classes_table(report))
    return [*tables, *(table for table in found if table is not None)]


def _model_text(model: Mapping[str, Any]) -> str:
    how = {
        "row": "a listed family",
        "recognised": "not listed; recognised by what its modules compute",
    }
    # A report that is read back may be anybody's.
    name, kind, model_type = (model.get(key) for key in ("name", "class", "model_type"))
    source, size = str(model.get("source")), model.get("num_parameters")
    millions = f"{size / 1e6:,.1f}".replace(",", " ") if isinstance(size, int | float) else "?"
    return f"{name}: {kind}, type {model_type} ({how.get(source, source)}), {millions} M parameters"
