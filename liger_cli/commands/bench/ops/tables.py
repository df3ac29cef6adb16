"""The report of `liger bench ops`: its values, its tables for a terminal, the same in markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from liger_cli.commands.bench.targets import Measure
from liger_cli.common.numbers import finite
from liger_cli.common.outputs import write_file
from liger_cli.common.readers import parse_json
from liger_cli.report import Finite, show_lines, show_table
from liger_cli.report.tables import Table

__all__ = [
    "OURS",
    "ArmPart",
    "CheckPart",
    "ErrorPart",
    "OpRow",
    "OpsReport",
    "Spread",
    "Table",
    "TargetPart",
    "TimePart",
    "markdown",
    "op_tables",
    "run_lines",
    "show_ops_report",
    "targets_table",
    "write_reports",
]

SCHEMA_VERSION = 1
OURS = "ours"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Spread(_Part):
    """Milliseconds of a call, over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


class TimePart(_Part):
    """wall: as a stream sees it, the host's delays included. gpu: the device's work; GPUs only.

    share: the least work of the op over that time and the limit of the hardware.
    """

    wall: Spread
    gpu: Spread | None = None
    share: Finite = None


class ErrorPart(_Part):
    """Error of one output or gradient against the truth, over its largest element."""

    name: str
    ours: Finite
    eager: Finite
    limit: float


class CheckPart(_Part):
    """Whether ours is no worse than eager on this very shape. truth: the reference's precision."""

    ok: bool
    truth: str | None = None
    errors: list[ErrorPart] = []
    reason: str | None = None


class ArmPart(_Part):
    """One side: eager, torch.compile, torch (its own fused op), ours, or a peer.

    full: forward and backward. transient_bytes: the most memory that a call of them adds.
    """

    name: str
    forward: TimePart | None = None
    full: TimePart | None = None
    transient_bytes: int | None = None
    host_us: Finite = None
    note: str | None = None
    error: str | None = None


class TargetPart(_Part):
    """A bound, what was found, and whether that is within; None where it was not measured."""

    measure: Measure
    limit: float
    against: str = ""
    found: Finite = None
    met: bool | None = None


class OpRow(_Part):
    """One op on one shape; without arms if its check failed."""

    op: str
    shape: str
    variant: str = ""
    check: CheckPart
    # Measured in turn with the sides, where products of matrices are what limits the op.
    matmul_flops_per_s: Finite = None
    arms: list[ArmPart] = []
    targets: list[TargetPart] = []

    def arm(self, name: str) -> ArmPart | None:
        return next((arm for arm in self.arms if arm.name == name), None)


class OpsReport(_Part):
    """The result of `liger bench ops`. Rates are of the same run: bytes and FLOPs a second."""

    command: str = "bench ops"
    arguments: list[str]
    date: str
    environment: dict[str, Any]
    device: str
    device_type: str
    dtype: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float
    seconds: float
    rounds: int
    # Name -> version, or why it did not run.
    peers: dict[str, str] = {}
    rows: list[OpRow]
    # True if the run was stopped, so that rows are missing.
    interrupted: bool | None = None

    def to_json(self) -> str:
        """Return the report as one JSON document; NaN and infinity are null."""
        values = finite(self.model_dump(mode="json"))
        return json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> OpsReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no such report, or one of another schema.
        """
        values = parse_json(text)
        version = values.pop("schema_version", None) if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"report: schema_version is {version}, expected {SCHEMA_VERSION}")
        return cls.model_validate(values)


_COLUMNS = (
    "shape",
    "side",
    "forward ms",
    "full ms",
    "p20 - p80",
    "GPU ms",
    "share",
    "of TFLOP/s",
    "transient MiB",
    "host us",
    "error",
    "note",
)


def op_tables(report: OpsReport) -> list[Table]:
    """Return a table an op: every shape and arm with times, share, memory and error."""
    tables = []
    for op in dict.fromkeys(row.op for row in report.rows):
        rows = [line for row in report.rows if row.op == op for line in _arm_lines(row)]
        tables.append(Table.with_used_columns(op, _COLUMNS, rows))
    return tables


def targets_table(report: OpsReport) -> Table | None:
    """Return every target with its figure and whether it is met, or None without targets."""
    lines: list[tuple[str, ...]] = [
        (row.op, _shape_text(row), _target_text(target), _found_text(target), _met_text(target))
        for row in report.rows
        for target in row.targets
    ]
    columns = ("op", "shape", "target (on an H100)", "found", "")
    return Table("targets", columns, lines) if lines else None


def run_lines(report: OpsReport) -> list[str]:
    """Return where and how the figures were made, a sentence a line."""
    versions = ", ".join(
        f"{name} {report.environment[name]}"
        for name in ("torch", "triton")
        if report.environment.get(name)
    )
    lines = [
        f"{report.device}, {report.dtype}, {versions}, {report.date}",
        f"$ {' '.join(['liger', 'bench', 'ops', *report.arguments])}",
        f"limits in this run: copy {report.copy_bytes_per_s / 1e9:,.0f} GB/s, "
        f"{report.dtype} matmul {report.matmul_flops_per_s / 1e12:,.1f} TFLOP/s; "
        f"{report.rounds} rounds, {report.seconds:.0f} s in all"
        + (", interrupted" if report.interrupted else ""),
    ]
    lines += [f"{name}: {state}" for name, state in report.peers.items()]
    if report.device_type == "cpu":
        lines.append(
            "On a CPU the shapes are small, caches are warm and there are no targets: these "
            "figures say nothing about a GPU."
        )
    return lines


def markdown(report: OpsReport, *, heading: str = "Ops") -> str:
    """Return the whole report as a markdown section."""
    tables = [targets_table(report), *op_tables(report)]
    sections = [table.markdown() for table in tables if table is not None]
    where = "\n".join(f"    {line}" for line in run_lines(report))
    return "\n".join([f"## {heading}", "", where, "", *sections])


def show_ops_report(report: OpsReport, *, as_json: bool) -> None:
    """Print the tables, and with as_json the JSON alone to stdout and everything else to stderr.

    The targets come last, since they are what a reader looks for.
    """
    show_lines(*run_lines(report), "", stderr=as_json)
    for table in [*op_tables(report), targets_table(report)]:
        if table is not None:
            show_lines(table.title, stderr=as_json)
            show_table(table.columns, table.rows, stderr=as_json)
            show_lines("", stderr=as_json)
    states = [target.met for row in report.rows for target in row.targets]
    if states:
        unknown = states.count(None)
        words = [f"{states.count(True)} met", f"{states.count(False)} missed"]
        words += [f"{unknown} not measured"] if unknown else []
        show_lines(f"targets: {', '.join(words)}", stderr=as_json)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")


def write_reports(report: OpsReport, *, json_file: Path | None, markdown_file: Path | None) -> None:
    """Write the JSON and the tables, each where a file is named."""
    for path, text in ((json_file, report.to_json() + "\n"), (markdown_file, markdown(report))):
        if path is not None:
            write_file(path, text)


def _arm_lines(row: OpRow) -> Iterable[tuple[str, ...]]:
    shape, none = _shape_text(row), [""] * (len(_COLUMNS) - 3)
    if not row.check.ok:
        yield shape, OURS, *none, f"no figures: the check failed ({row.check.reason})"
    for arm in row.arms:
        full = arm.full
        if full is None:
            yield shape, arm.name, *none, arm.error or ""
            continue
        yield (
            shape,
            arm.name,
            "" if arm.forward is None else f"{arm.forward.wall.median_ms:.3f}",
            f"{full.wall.median_ms:.3f}",
            f"{full.wall.p20_ms:.3f} - {full.wall.p80_ms:.3f}",
            "" if full.gpu is None else f"{full.gpu.median_ms:.3f}",
            "" if full.share is None else f"{full.share:.2f}",
            "" if row.matmul_flops_per_s is None else f"{row.matmul_flops_per_s / 1e12:.0f}",
            "" if arm.transient_bytes is None else f"{arm.transient_bytes / 2**20:.0f}",
            "" if arm.host_us is None else f"{arm.host_us:.0f}",
            _error_text(row.check, arm.name),
            arm.note or "",
        )


def _shape_text(row: OpRow) -> str:
    return row.shape + (f", {row.variant}" if row.variant else "")


def _error_text(check: CheckPart, arm: str) -> str:
    """Return the error that comes nearest to its limit, for the two sides that are checked."""
    if arm not in (OURS, "eager") or not check.errors:
        return ""
    worst = max(check.errors, key=lambda error: (error.ours or 0.0) / error.limit)
    value = worst.ours if arm == OURS else worst.eager
    return "" if value is None else f"{value:.1e} ({worst.name})"


_TEXTS = {
    "share": "share >= {limit:.2f}",
    "forward share": "share of the forward >= {limit:.2f}",
    "speed": ">= {limit:.1f}x {against}",
    "memory": "transient <= {mib:.0f} MiB",
    "memory share": "transient <= {limit:.2f}x {against}",
    "time share": "<= {limit:.2f} of the time with all labels",
    "host share": "host time <= {limit:.1f}x {against}",
}
_FOUND = {"memory": "{mib:.0f} MiB", "speed": "{value:.2f}x"}


def _target_text(target: TargetPart) -> str:
    return _TEXTS[target.measure].format(
        limit=target.limit, against=target.against, mib=target.limit / 2**20
    )


def _found_text(target: TargetPart) -> str:
    if target.found is None:
        return "not measured"
    text = _FOUND.get(target.measure, "{value:.3f}")
    return text.format(value=target.found, mib=target.found / 2**20)


def _met_text(target: TargetPart) -> str:
    return "" if target.met is None else "met" if target.met else "MISSED"
