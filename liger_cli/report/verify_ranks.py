"""The report of `liger verify --nproc`: several ranks against one process."""

from __future__ import annotations

import json
import sys

from pydantic import BaseModel, ConfigDict

from liger_cli.common.numbers import finite
from liger_cli.report.console import show_lines, show_table
from liger_cli.report.values import Finite

__all__ = ["RankTensor", "RanksReport", "ranks_verdict", "show_ranks_report"]

SCHEMA_VERSION = 1
# Tensors shown to a person; the JSON has all.
_SHOWN = 5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RankTensor(_Part):
    """The error of a loss or a gradient, relative to that of one process; None if not finite."""

    name: str
    error: Finite
    allowed: float
    ok: bool

    @property
    def share(self) -> float:
        """The share of the allowed error that is used."""
        return float("inf") if self.error is None else self.error / self.allowed


class RanksReport(_Part):
    """The result of `liger verify` on several ranks.

    Attributes:
        losses: Of each step on one process.
        losses_of_ranks: Of each step on all ranks.
        tensors: The losses, and each gradient of the last step.
    """

    command: str = "verify"
    model: str
    layout: str
    device: str
    dtype: str
    coverage: dict[str, dict[str, int]]
    seconds: float
    losses: list[float]
    losses_of_ranks: list[float]
    tensors: list[RankTensor]
    ok: bool

    def to_json(self) -> str:
        """Return the report as one JSON document; NaN and infinity are null."""
        values = finite(self.model_dump(mode="json"))
        return json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=2)


def show_ranks_report(report: RanksReport, *, as_json: bool) -> None:
    """Print the worst tensors and the verdict; with as_json the JSON alone to stdout."""
    show_lines(
        f"{report.model}, {report.layout}, {report.device}, {report.dtype}: "
        "errors are against one process",
        stderr=as_json,
    )
    worst = sorted(report.tensors, key=lambda part: part.share, reverse=True)
    rows = [
        (
            part.name,
            "not finite" if part.error is None else f"{part.error:.1e}",
            f"{part.allowed:.1e}",
            "" if part.ok else "WRONG",
        )
        for part in worst[:_SHOWN]
    ]
    show_table(("tensor", "error", "allowed", ""), rows, stderr=as_json)
    show_lines("", ranks_verdict(report), stderr=as_json)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")


def ranks_verdict(report: RanksReport) -> str:
    """Return the result in a line, with the tensor that is nearest to its limit or beyond."""
    worst = max(report.tensors, key=lambda part: part.share)
    error = "not finite" if worst.error is None else f"off by {worst.error:.1e}"
    words, what = ("equal", "nearest to its limit") if report.ok else ("DIFFERENT", "worst")
    return (
        f"{words}: {len(report.tensors)} losses and gradients compared; {what}: {worst.name} is "
        f"{error}, allowed {worst.allowed:.1e}"
    )
