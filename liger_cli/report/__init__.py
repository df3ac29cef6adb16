"""Run reports: what a command found, as one value that prints, serialises to JSON and comes back.

Every command fills a RunReport. `to_json` is what --json prints and report.json holds;
`show_report` draws the tables and the last line. Only this module and app.py import rich.

Units: bytes, ms, tokens a second. GB is 1e9 bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = [
    "MIN_SPEED_NOISE",
    "Arm",
    "DataPart",
    "EvalPart",
    "FoldedRow",
    "GainPart",
    "ParityPart",
    "RatiosPart",
    "RunReport",
    "TrainPart",
    "TrainProgress",
    "arms_table",
    "coverage_table",
    "fold_modules",
    "format_bytes",
    "format_count",
    "last_line",
    "modules_table",
    "show_json",
    "show_lines",
    "show_report",
    "show_table",
    "unmet_requirements",
    "verdict",
]

SCHEMA_VERSION = 1

# Clock and temperature move the speed of equal runs by about this much on a quiet machine.
MIN_SPEED_NOISE = 0.03
_MEMORY_NOISE = 0.01

# Rows are not broken where no terminal shows them, so that a log can be searched.
_WIDTH_WITHOUT_TERMINAL = 1000

ModuleRow = dict[str, str | None]


def _drop_non_finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


# JSON has no NaN or infinity: such a number is None from the start.
Finite = Annotated[float | None, AfterValidator(_drop_non_finite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TrainPart(_Part):
    """What training did. tokens: fed and not padding; trained_tokens: those with a label."""

    steps: int
    tokens: int
    trained_tokens: int
    first_loss: Finite
    final_loss: Finite
    tokens_per_s: Finite
    step_ms: Finite
    peak_memory_bytes: int | None


class GainPart(_Part):
    """Against the unpatched model: times faster, and the share of its peak memory."""

    source: Literal["measured", "estimated"]
    speed: Finite = None
    memory: Finite = None


class DataPart(_Part):
    """The data that were read: the rows used and left out, as DataStats counts them."""

    name: str
    rows: int
    dropped_rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    eval_rows: int
    columns: list[str]


class EvalPart(_Part):
    """Token-weighted evaluation; tokens are those with a label."""

    loss: Finite
    perplexity: Finite
    token_accuracy: Finite
    tokens: int


class Arm(_Part):
    """One side of a comparison. A loss that is not finite is None."""

    name: str
    tokens_per_s: Finite
    step_ms: Finite
    peak_memory_bytes: int | None
    losses: list[Finite]


class RatiosPart(_Part):
    """The patched arm against eager: speed above 1 is faster, memory below 1 is smaller.

    noise is how far apart equal runs were in speed; a difference below it says nothing.
    """

    speed: Finite = None
    memory: Finite = None
    noise: float = MIN_SPEED_NOISE


class ParityPart(_Part):
    """How far the losses of the two arms are apart, step by step from the same weights and data."""

    steps: int
    max_loss_difference: Finite
    max_relative_difference: Finite
    tolerance: float
    equal: bool


class RunReport(_Part):
    """The result of one command. Parts it does not have are None here and absent from the JSON.

    Attributes:
        coverage: {op: {"patched": n, "candidates": m}} for every op with a candidate.
        modules: One row a module: name, class, op, status, backend, reason.
        missing: Ops asked for by name that have no place in the model.
    """

    command: str
    model: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    coverage: dict[str, dict[str, int]] | None = None
    modules: list[ModuleRow] | None = None
    missing: list[str] | None = None
    data: DataPart | None = None
    train: TrainPart | None = None
    gain: GainPart | None = None
    eval: EvalPart | None = None
    arms: list[Arm] | None = None
    ratios: RatiosPart | None = None
    parity: ParityPart | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON values, without the parts it does not have."""
        absent = {name for name in type(self).model_fields if getattr(self, name) is None}
        # Through pydantic's JSON writer, which turns a NaN in config or environment into null.
        values = json.loads(self.model_dump_json(exclude=absent))
        return {"schema_version": SCHEMA_VERSION, **values}

    def to_json(self) -> str:
        """Returns the report as one JSON document; NaN and infinity are null."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> RunReport:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: The text is no report, or one of a newer schema.
        """
        values = json.loads(text)
        version = values.pop("schema_version", None) if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"report: schema_version is {version}, expected {SCHEMA_VERSION}")
        return cls.model_validate(values)

    def write(self, path: Path) -> None:
        """Writes the report in one step: a reader sees the old file or the whole new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(self.to_json() + "\n", encoding="utf-8")
        unfinished.replace(path)


def format_bytes(num_bytes: float) -> str:
    """Returns a size with its unit: '5.1 GB', '35 MB'."""
    if num_bytes >= 1e8:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.0f} MB"


def format_count(number: float) -> str:
    """Returns a number with spaces between thousands: '12 345'; below ten with one decimal."""
    if number < 10 and number != int(number):
        return f"{number:.1f}"
    return f"{number:,.0f}".replace(",", " ")


def _num_with_status(report: RunReport, op: str, status: str) -> int:
    return sum(row["op"] == op and row["status"] == status for row in report.modules or ())


def _op_counts(report: RunReport, op: str) -> tuple[int, int, int]:
    """(used, candidates, unused): a module that was patched and never called is not used."""
    counts = (report.coverage or {})[op]
    unused = _num_with_status(report, op, "unused")
    used = _num_with_status(report, op, "patched") if unused else counts["patched"]
    return used, counts["candidates"], unused


def last_line(report: RunReport) -> str:
    """Returns the line that ends a run: kernels, peak memory, speed, gain against eager."""
    ops = []
    for op in report.coverage or {}:
        used, candidates, unused = _op_counts(report, op)
        ops.append(f"{op} {used}/{candidates}" + (f" ({unused} unused)" if unused else ""))
    groups = ["kernels: " + ("  ".join(ops) or "none")]
    measured = report.train or _arm(report, "patched")
    if measured is not None and measured.peak_memory_bytes is not None:
        groups.append(f"peak {format_bytes(measured.peak_memory_bytes)}")
    if measured is not None and measured.tokens_per_s is not None:
        groups.append(f"{format_count(measured.tokens_per_s)} tokens/s")
    if report.gain is not None and (gain := _gain_text(report.gain)):
        groups.append(f"against eager: {gain} ({report.gain.source})")
    return "   ".join(groups)


def _gain_text(gain: GainPart) -> str:
    parts = []
    if gain.speed is not None:
        parts.append(f"{gain.speed:.2f}x speed")
    if gain.memory is not None:
        parts.append(f"{gain.memory:.2f}x memory")
    return ", ".join(parts)


def _arm(report: RunReport, name: str) -> Arm | None:
    return next((arm for arm in report.arms or () if arm.name == name), None)


@dataclass(frozen=True)
class FoldedRow:
    """Rows that differ only in the layer numbers of their names, as one."""

    name: str
    num_modules: int
    module_class: str
    op: str
    status: str
    backend: str
    reason: str


_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


def fold_modules(modules: Iterable[ModuleRow]) -> list[FoldedRow]:
    """Returns the module rows with repeated layers folded: 'model.layers.0-29.mlp', 30 modules.

    Where two numbers vary, as in layers of experts, each range is given for itself; the count says
    how many modules there are.
    """
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for row in modules:
        name = row["name"] or "(model)"
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        same = (row[key] or "" for key in ("class", "op", "status", "backend", "reason"))
        groups.setdefault((_NUMBER.sub("{}", name), *same), []).append(numbers)
    folded = []
    for (template, *fields), members in groups.items():
        ranges = [_ranges(position) for position in zip(*members, strict=True)]
        folded.append(FoldedRow(template.format(*ranges), len(members), *fields))
    return folded


def _ranges(numbers: Iterable[int]) -> str:
    """'0-4,6,8-9' for {0, 1, 2, 3, 4, 6, 8, 9}."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def coverage_table(report: RunReport) -> Table:
    """Returns one row an op: how many modules it took over, by which backend, and why not all."""
    table = _table("op", "patched", "backend", "not patched")
    for op in report.coverage or {}:
        used, candidates, unused = _op_counts(report, op)
        rows = [row for row in report.modules or () if row["op"] == op]
        backends = {row["backend"] or "" for row in rows if row["status"] == "patched"}
        table.add_row(
            op, f"{used}/{candidates}", ", ".join(sorted(backends)), _why_not_all(report, op)
        )
    for op in report.missing or ():
        table.add_row(op, "0/0", "", "this model has no place for it")
    return table


def _why_not_all(report: RunReport, op: str) -> str:
    rows = [row for row in report.modules or () if row["op"] == op]
    reasons = Counter(row["reason"] for row in rows if row["status"] != "patched")
    return "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())


def unmet_requirements(report: RunReport, ops: Iterable[str]) -> list[str]:
    """Returns a sentence for each op that is not patched wherever the model has a place for it."""
    sentences = []
    for op in ops:
        if op not in (report.coverage or {}):
            # Its place is that of the fused loss, so it has none of its own unless asked for.
            must_be_named = op == "cross_entropy"
            why = "--ops must name it" if must_be_named else "the model has no place for it"
            sentences.append(f"{op} is required, but {why}")
            continue
        used, candidates, _ = _op_counts(report, op)
        if used < candidates:
            sentences.append(
                f"{op} is required, but {used} of {candidates} modules have it "
                f"({_why_not_all(report, op)})"
            )
    return sentences


def modules_table(report: RunReport) -> Table:
    """Returns the module rows, repeated layers folded."""
    table = _table("module", "count", "class", "op", "status", "backend", "why")
    for row in fold_modules(report.modules or ()):
        count = f"x{row.num_modules}" if row.num_modules > 1 else ""
        table.add_row(
            row.name, count, row.module_class, row.op, row.status, row.backend, row.reason
        )
    return table


def arms_table(report: RunReport) -> Table:
    """Returns the arms side by side."""
    table = _table("arm", "tokens/s", "step ms", "peak", "first loss", "last loss")
    for arm in report.arms or ():
        table.add_row(
            arm.name,
            "" if arm.tokens_per_s is None else format_count(arm.tokens_per_s),
            "" if arm.step_ms is None else f"{arm.step_ms:.1f}",
            "" if arm.peak_memory_bytes is None else format_bytes(arm.peak_memory_bytes),
            _loss_text(arm.losses[:1]),
            _loss_text(arm.losses[-1:]),
        )
    return table


def _loss_text(losses: Sequence[float | None]) -> str:
    return "".join("not finite" if loss is None else f"{loss:.4f}" for loss in losses)


def verdict(ratios: RatiosPart, parity: ParityPart) -> str:
    """Returns the comparison in words: faster, slower or no gain, and whether the losses agree."""
    memory = ratios.memory and 1 / ratios.memory
    parts = [
        _judge(ratios.speed, "faster", "slower", "speed", ratios.noise),
        _judge(memory, "less memory", "more memory", "memory", _MEMORY_NOISE),
    ]
    if ratios.noise > MIN_SPEED_NOISE:
        parts[0] += f", where equal runs are up to {1 + ratios.noise:.2f}x apart"
    if parity.equal:
        parts.append(
            f"losses agree over {parity.steps} steps "
            f"(at most {parity.max_loss_difference:.2g} apart)"
        )
    elif parity.max_relative_difference is None:
        parts.append("no losses to compare, or none that is finite")
    elif parity.max_relative_difference <= parity.tolerance:
        parts.append("LOSSES DIFFER: some are not finite")
    else:
        parts.append(
            f"LOSSES DIFFER: {parity.max_loss_difference:.2g} apart, "
            f"{parity.max_relative_difference:.1%} where {parity.tolerance:.1%} is allowed"
        )
    return "patched against eager: " + "; ".join(parts)


def _judge(gain: float | None, better: str, worse: str, quantity: str, noise: float) -> str:
    if gain is None:
        return f"{quantity} not measured"
    if max(gain, 1 / gain) <= 1 + noise:
        return f"no gain in {quantity} ({gain:.2f}x)"
    return f"{gain:.2f}x {better}" if gain > 1 else f"{1 / gain:.2f}x {worse}"


def show_report(report: RunReport, *, as_json: bool, details: bool = False) -> None:
    """Prints the report, tables first and the last line last.

    Args:
        as_json: The JSON alone to stdout, everything else to stderr.
        details: Also the per-module table.
    """
    console = _console(stderr=as_json)
    if report.model is not None:
        _print_line(console, _model_text(report.model))
    # Without rows the coverage has neither backends nor reasons; the last line says the rest.
    tables = [coverage_table(report)] if report.modules is not None else []
    if details and report.modules:
        tables.append(modules_table(report))
    if report.arms:
        tables.append(arms_table(report))
    for table in tables:
        console.print(table)
        console.print()
    if report.eval is not None:
        _print_line(console, _eval_text(report.eval))
    if report.ratios is not None and report.parity is not None:
        _print_line(console, verdict(report.ratios, report.parity))
        if not any(counts["patched"] for counts in (report.coverage or {}).values()):
            _print_line(console, "nothing was patched: both sides ran the same code")
    if report.coverage is not None:
        _print_line(console, last_line(report))
    if as_json:
        sys.stdout.write(report.to_json() + "\n")


def _model_text(model: Mapping[str, Any]) -> str:
    how = {
        "row": "a listed family",
        "recognised": "not listed; recognised by what its modules compute",
    }
    millions = f"{model['num_parameters'] / 1e6:,.1f}".replace(",", " ")
    return (
        f"{model['name']}: {model['class']}, type {model['model_type']} "
        f"({how[model['source']]}), {millions} M parameters"
    )


def _eval_text(part: EvalPart) -> str:
    words = [f"loss {_loss_text([part.loss])}"]
    if part.perplexity is not None:
        words.append(f"perplexity {part.perplexity:.2f}")
    if part.token_accuracy is not None:
        words.append(f"token accuracy {part.token_accuracy:.1%}")
    return "  ".join([*words, f"{format_count(part.tokens)} tokens"])


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, stderr: bool = False
) -> None:
    """Prints a plain table."""
    table = _table(*columns)
    for row in rows:
        table.add_row(*row)
    _console(stderr=stderr).print(table)


def show_lines(*lines: str, stderr: bool = False) -> None:
    """Prints lines as they are: no markup, no wrapping."""
    console = _console(stderr=stderr)
    for line in lines:
        _print_line(console, line)


def show_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Prints one JSON document to stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(
            stderr=stderr, highlight=False, markup=False, width=_WIDTH_WITHOUT_TERMINAL
        )
    return console


def _print_line(console: Console, line: str) -> None:
    # soft_wrap leaves a long line to the terminal, so that it can be found with grep.
    console.print(line, soft_wrap=True)


class TrainProgress:
    """Shows steps on stderr: a bar, or a plain line an update where stderr is no terminal.

    Args:
        total_steps: Steps the run will take.
        description: Word before the bar.
        first_step: Steps done before, of a resumed run.
    """

    def __init__(
        self, total_steps: int, *, description: str = "train", first_step: int = 0
    ) -> None:
        self._total_steps = total_steps
        self._description = description
        self._console = _console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(
            description, total=total_steps, completed=first_step, values=""
        )

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_s: float | None = None,
        peak_memory_bytes: int | None = None,
    ) -> None:
        """Shows that `step` (counted from 1) is done, with what is known about it."""
        values = []
        if loss is not None:
            values.append(f"loss {loss:.4f}")
        if tokens_per_s is not None:
            values.append(f"{format_count(tokens_per_s)} tokens/s")
        if peak_memory_bytes is not None:
            values.append(format_bytes(peak_memory_bytes))
        text = "  ".join(values)
        self._bar.update(self._task, completed=step, values=text)
        if not self._console.is_terminal:
            _print_line(
                self._console, f"{self._description} {step}/{self._total_steps}  {text}".rstrip()
            )
