"""Coverage and modules of a report: tables, the tree by layer, requirements that are not met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from liger_cli.report.tables import Table
from liger_cli.report.values import RunReport
from liger_kernels.transformers.patching.render import (
    FoldedRow,
    fold_modules,
    module_tree,
    others_text,
)

__all__ = [
    "FoldedRow",
    "coverage_table",
    "fold_modules",
    "modules_table",
    "op_counts",
    "others_lines",
    "unmet_requirements",
]


def _num_with_status(report: RunReport, op: str, status: str) -> int:
    return sum(row["op"] == op and row["status"] == status for row in report.modules or ())


def op_counts(report: RunReport, op: str) -> tuple[int, int, int]:
    """Return (used, candidates, unused): one that was patched and never called is not used."""
    counts = (report.coverage or {})[op]
    unused = _num_with_status(report, op, "unused")
    used = _num_with_status(report, op, "patched") if unused else counts["patched"]
    return used, counts["candidates"], unused


def coverage_table(report: RunReport) -> Table:
    """Return one row an op: how many modules it took over, by which backend, and why not all."""
    lines = []
    for op in report.coverage or {}:
        used, candidates, unused = op_counts(report, op)
        rows = [row for row in report.modules or () if row["op"] == op]
        backends = {row["backend"] or "" for row in rows if row["status"] == "patched"}
        why = _why_not_all(report, op)
        lines.append((op, f"{used}/{candidates}", ", ".join(sorted(backends)), why))
    for op in report.missing or ():
        lines.append((op, "0/0", "", "this model has no place for it"))
    return Table("Coverage", ("op", "patched", "backend", "not patched"), lines)


def _why_not_all(report: RunReport, op: str) -> str:
    rows = [row for row in report.modules or () if row["op"] == op]
    reasons = Counter(row["reason"] for row in rows if row["status"] != "patched")
    return "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())


def unmet_requirements(report: RunReport, ops: Iterable[str]) -> list[str]:
    """Return a sentence for each op that is not patched wherever the model has a place for it."""
    sentences = []
    for op in ops:
        if op not in (report.coverage or {}):
            # Its place is that of the fused loss, so it has no separate one unless asked for.
            must_be_named = op == "cross_entropy"
            why = "--ops must name it" if must_be_named else "the model has no place for it"
            sentences.append(f"{op} is required, but {why}")
            continue
        used, candidates, _ = op_counts(report, op)
        if used < candidates:
            rows = [row for row in report.modules or () if row["op"] == op]
            without = fold_modules(row for row in rows if row["status"] != "patched")
            named = "; ".join(f"{row.name} ({row.reason})" for row in without)
            sentences.append(
                f"{op} is required, but {used} of {candidates} modules have it"
                + (f": not {named}" if named else "")
            )
    return sentences


def others_lines(report: RunReport) -> list[str]:
    """Return a line where modules run kernels of other packages, which are left to them."""
    return [others_text(report.others)] if report.others else []


def modules_table(report: RunReport, *, verbose: bool = False) -> Table:
    """Return the modules as a tree, repeated layers folded.

    Args:
        verbose: Also the file and line of each class's forward.
    """
    columns = ("module", "count", "class", "op", "status", "why", "forward")
    lines = []
    for line in module_tree(report.modules or ()):
        row = line.row
        if row is None:
            lines.append((line.label, *[""] * (len(columns) - 1)))
            continue
        count = f"x{row.num_modules}" if row.num_modules > 1 else ""
        source = row.source if verbose else ""
        cells = (count, row.module_class, row.op, row.status, row.reason, source)
        lines.append((line.label, *cells))
    return Table.with_used_columns("Modules", columns, lines)
