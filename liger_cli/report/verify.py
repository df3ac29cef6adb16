"""The report of `liger verify`: its values and its tables."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from liger_cli.common.numbers import finite
from liger_cli.report.console import show_lines, show_table
from liger_cli.report.values import Finite

__all__ = [
    "ModulePart",
    "OpPart",
    "TensorPart",
    "VerifyReport",
    "WorstPart",
    "show_verify_report",
    "verdict",
]

SCHEMA_VERSION = 1
# Gradients shown to a person; the JSON has all.
_SHOWN_GRADIENTS = 5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TensorPart(_Part):
    """Error of ours and of eager: of a module over its largest element, of the model in norm.

    One that is infinite or NaN is None.
    """

    name: str
    ours: Finite
    eager: Finite
    allowed: float
    ok: bool

    @property
    def share(self) -> float:
        """The share of the allowed error that is used."""
        return float("inf") if self.ours is None else self.ours / self.allowed


class OpPart(_Part):
    """An op on its first case and in each form that the model has, on this device, against fp64."""

    op: str
    ok: bool
    ms: float
    reason: str | None = None


class ModulePart(_Part):
    """A patched module on the inputs it gets in the model: its worst output or gradient.

    Without a tensor it was not compared, and the note says why.
    """

    name: str
    module_class: str
    op: str
    tensor: TensorPart | None = None
    note: str | None = None


class WorstPart(_Part):
    """The tensor that is nearest to its limit, or furthest beyond."""

    where: str
    op: str | None
    tensor: str
    ours: Finite
    allowed: float

    @property
    def is_within(self) -> bool:
        """Whether it is finite and within its limit."""
        return self.ours is not None and self.ours <= self.allowed


class VerifyReport(_Part):
    """The result of `liger verify`.

    Attributes:
        objective: Whose loss is compared; of sft it is the model's own.
        truth: What errors are measured against: the stock model in fp64 or fp32, or, where neither
            fits, "eager": the stock model as it is, with a fixed limit.
        loss, logits, gradients: Of the whole model, patched and stock; empty if nothing is patched.
    """

    command: str = "verify"
    model: dict[str, Any]
    environment: dict[str, Any]
    device: str
    backend: str
    dtype: str
    truth: str
    objective: str
    tokens: int
    seconds: float
    coverage: dict[str, dict[str, int]]
    ops: list[OpPart]
    modules: list[ModulePart]
    loss: TensorPart
    logits: TensorPart
    gradients: list[TensorPart]
    worst: WorstPart | None
    ok: bool

    def to_json(self) -> str:
        """Return the report as one JSON document; NaN and infinity are null."""
        values = finite(self.model_dump(mode="json"))
        return json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=2)


_ERRORS = ("error", "eager's", "allowed", "")
_TRUTHS = {
    "fp64": "errors are against the stock model in fp64",
    "fp32": "errors are against the stock model in fp32: fp64 does not fit",
    "eager": "errors are against the stock model as it is: it does not fit in fp32, so that "
    "eager's own error is unknown and the limit a fixed one",
}


def show_verify_report(report: VerifyReport, *, as_json: bool) -> None:
    """Print the tables and the verdict; with as_json the JSON alone to stdout, they to stderr."""
    objective = "" if report.objective == "sft" else f"objective {report.objective}, "
    show_lines(
        f"{report.model['name']} on {report.device} ({report.backend}), {report.dtype}, "
        f"{objective}{report.tokens} tokens: {_TRUTHS[report.truth]}",
        "allowed: half an ulp more than twice eager's error in a module, eight times in the model",
        stderr=as_json,
    )
    ops = [
        (part.op, "ok" if part.ok else "WRONG", f"{part.ms:.0f}", part.reason or "")
        for part in report.ops
    ]
    show_table(("op against fp64", "", "ms", "why"), ops, stderr=as_json)
    show_lines("", stderr=as_json)
    show_table(
        ("module", "count", "op", "worst in", *_ERRORS), _module_rows(report), stderr=as_json
    )
    show_lines("", stderr=as_json)
    worst = sorted(report.gradients, key=lambda part: part.share, reverse=True)
    whole = [report.loss, report.logits, *worst[:_SHOWN_GRADIENTS]]
    rows = [(part.name, *_cells(part)) for part in whole]
    show_table(("whole model", *_ERRORS), rows, stderr=as_json)
    show_lines("", verdict(report), stderr=as_json)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")


def verdict(report: VerifyReport) -> str:
    """Return the result in a line, with the worst offender."""
    counts = ", ".join(
        f"{op} {n['patched']}/{n['candidates']}" for op, n in report.coverage.items()
    )
    words = "right" if report.ok else "WRONG"
    line = f"{words}: {counts or 'nothing to patch'}; {len(report.gradients)} gradients compared"
    worst = report.worst
    failed = next((part for part in report.ops if not part.ok), None)
    if failed is not None and (worst is None or worst.is_within):
        return f"{line}; worst offender: {failed.op} by itself, {failed.reason}"
    if worst is None:
        return line
    op = f" ({worst.op})" if worst.op else ""
    error = "not finite" if worst.ours is None else f"off by {worst.ours:.1e}"
    return (
        f"{line}; {'nearest to its limit' if report.ok else 'worst offender'}: {worst.where}{op}, "
        f"{worst.tensor} is {error}, allowed {worst.allowed:.1e}"
    )


def _module_rows(report: VerifyReport) -> Iterable[tuple[str, ...]]:
    """One row for modules that differ in their layer alone, with the worst of them."""
    groups: dict[tuple[str, str], list[ModulePart]] = {}
    for part in report.modules:
        groups.setdefault((re.sub(r"\b\d+\b", "*", part.name), part.op), []).append(part)
    for (name, op), parts in groups.items():
        worst = max(parts, key=_module_share)
        count = f"x{len(parts)}" if len(parts) > 1 else ""
        if worst.tensor is None:
            yield name, count, op, "", "", "", "", worst.note or ""
        else:
            shown = worst.name if len(parts) == 1 or not worst.tensor.ok else name
            yield shown, count, op, worst.tensor.name, *_cells(worst.tensor)


def _module_share(part: ModulePart) -> float:
    return -1.0 if part.tensor is None else part.tensor.share


def _cells(part: TensorPart) -> Sequence[str]:
    return (
        "not finite" if part.ours is None else f"{part.ours:.1e}",
        "not finite" if part.eager is None else f"{part.eager:.1e}",
        f"{part.allowed:.1e}",
        "" if part.ok else "WRONG",
    )
