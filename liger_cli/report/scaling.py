"""The report of `liger bench --nproc 1,2`: rates of a run on several numbers of processes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.report.console import show_json, show_lines, show_table

__all__ = ["ScalingReport", "ScalingRow", "show_scaling"]

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScalingRow(_Part):
    """A number of processes.

    Attributes:
        tokens_per_s: Of all of them.
        efficiency: The rate of a process, as a share of that of the fewest processes.
        exposed: The share of a step in which a GPU runs collectives alone; None unmeasured.
        peak_memory_bytes: Of rank 0.
    """

    nproc: int
    tokens_per_s: float
    efficiency: float
    exposed: float | None
    peak_memory_bytes: int


class ScalingReport(_Part):
    """The rates of a run, by the number of its processes."""

    schema_version: int = SCHEMA_VERSION
    command: str = "bench"
    model: str
    summary: str
    on_gpu: bool
    repeats: int
    rows: list[ScalingRow]


def show_scaling(report: ScalingReport, *, as_json: bool) -> None:
    """Print the report as JSON, or as a table with what was not measured."""
    if as_json:
        show_json(report.model_dump(mode="json"))
        return
    rows = [
        (
            str(row.nproc),
            format_count(row.tokens_per_s),
            f"{row.efficiency:.3f}",
            "" if row.exposed is None else f"{row.exposed:.1%}",
            format_bytes(row.peak_memory_bytes),
        )
        for row in report.rows
    ]
    columns = ("processes", "tokens/s", "efficiency", "waits for collectives", "peak of rank 0")
    show_table(columns, rows)
    lines = []
    if not report.on_gpu:
        lines.append("the share of time in collectives is not measured on a CPU")
    elif any(row.exposed is None for row in report.rows):
        lines.append("torch.profiler saw no kernels: the share of time in collectives is unknown")
    show_lines("", *lines)
