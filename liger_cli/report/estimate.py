"""The report of `liger estimate`: its values and its table."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.report.console import show_json, show_lines, show_table

__all__ = [
    "CardPart",
    "EstimateReport",
    "FitPart",
    "PartRow",
    "RanksPart",
    "TimeRow",
    "show_estimate",
]

SCHEMA_VERSION = 1

_TIME_COLUMNS = (
    *("layout", "step", "collectives", "exposed", "tokens/s", "efficiency", "memory, about"),
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PartRow(_Part):
    """A part of a step's memory: all that it takes, and what of it is there at the peak."""

    name: str
    size: int
    at_peak: int


class CardPart(_Part):
    """A card: the bytes that tensors can have, and those that are left, negative if too few."""

    name: str
    usable: int
    free: int


class FitPart(_Part):
    """The largest value of a key that fits; `is_limit` is false where nothing larger was tried."""

    key: str
    value: int
    is_limit: bool


class RanksPart(_Part):
    """The layout of several ranks; all other figures are of one of them."""

    layout: str
    why: str
    dp_replicate_size: int
    dp_shard_size: int


class TimeRow(_Part):
    """A layout of the ranks and the time of a step in it.

    Attributes:
        step_ms: Of an optimizer step.
        collectives_ms: In which a rank sends and receives.
        exposed_ms: Of these, in which it does nothing else.
        tokens_per_s: Of all ranks.
        efficiency: Tokens a second of a rank, as a share of those of one card alone.
        peak: Memory of a rank, about; that of the layout asked for is in `peak` of the report.
    """

    layout: str
    dp_replicate_size: int
    dp_shard_size: int
    step_ms: float
    collectives_ms: float
    exposed_ms: float
    tokens_per_s: float
    efficiency: float
    peak: int


class EstimateReport(_Part):
    """The memory of a training step, estimated.

    Attributes:
        phases: The most that is there in the optimizer's step, in forward and in backward.
        checkpoint_copy: Bytes in the memory of the host from which async_save writes: for each
            rank that has shards, else for rank 0. Of a run on the CPU it is one of the parts.
        times: The time of a step in the layouts that so many ranks can have.
        offloaded: Bytes in the memory of the host, of each rank, by part.
        chosen: Keys that are auto and that this size needs, with their values.
        remedies: What would make it fit, in words, the cheapest first.
    """

    schema_version: int = SCHEMA_VERSION
    command: str = "estimate"
    model: str
    batch_size: int
    sequence_length: int
    parts: list[PartRow]
    peak: int
    phases: dict[str, int]
    card: CardPart | None = None
    fit: FitPart | None = None
    ranks: RanksPart | None = None
    checkpoint_copy: int = 0
    times: list[TimeRow] = []
    offloaded: dict[str, int] = {}
    chosen: dict[str, str] = {}
    remedies: list[str] = []


def show_estimate(report: EstimateReport, *, as_json: bool) -> None:
    """Print the report as JSON, or as a table with what follows from it."""
    if as_json:
        show_json(report.model_dump(mode="json"))
        return
    rows = [(row.name, _bytes(row.size), _bytes(row.at_peak)) for row in report.parts]
    show_table(("part", "takes", "at the peak"), [*rows, ("peak", "", _bytes(report.peak))])
    show_lines("", *_lines(report))
    if report.times:
        show_table(_TIME_COLUMNS, [_time_row(row) for row in report.times])
        show_lines("", *_time_lines(report))


def _lines(report: EstimateReport) -> list[str]:
    lines = [
        f"{report.model}, {report.batch_size} x {report.sequence_length} tokens: "
        f"at most {format_bytes(report.peak)} at once, in {_widest_phase(report)}"
    ]
    if (ranks := report.ranks) is not None:
        sizes = f"dp_replicate_size {ranks.dp_replicate_size}, dp_shard_size {ranks.dp_shard_size}"
        lines.append(f"for each rank of {ranks.layout} ({sizes}): {ranks.why}")
    if report.offloaded:
        parts = ", ".join(f"{part} {format_bytes(n)}" for part, n in report.offloaded.items())
        of_each = "" if report.ranks is None else ", for each rank"
        lines.append(f"in the memory of the host{of_each}: {parts}")
    if report.checkpoint_copy:
        owner = "each rank" if report.ranks and report.ranks.dp_shard_size > 1 else "rank 0"
        copy = format_bytes(report.checkpoint_copy)
        lines.append(f"in the memory of the host, for {owner}: {copy} for the copy of async_save")
    if report.chosen:
        keys = ", ".join(f"{key} {value}" for key, value in report.chosen.items())
        lines.append(f"auto turns on: {keys}")
    if report.fit is not None:
        largest = "the largest that fits" if report.fit.is_limit else "fits; more was not tried"
        lines.append(f"{report.fit.key} {report.fit.value}: {largest}")
    if (card := report.card) is not None:
        has = f"{card.name} has {format_bytes(card.usable)} for tensors"
        left = "are left" if card.free >= 0 else "are missing"
        lines.append(f"{has}: {format_bytes(abs(card.free))} {left}")
    return lines + report.remedies


def _time_row(row: TimeRow) -> tuple[str, ...]:
    times = (f"{ms:.0f} ms" for ms in (row.step_ms, row.collectives_ms, row.exposed_ms))
    rates = (format_count(round(row.tokens_per_s)), f"{row.efficiency:.2f}")
    return (row.layout, *times, *rates, format_bytes(row.peak))


def _time_lines(report: EstimateReport) -> list[str]:
    fitting = [row for row in report.times if not report.card or row.peak <= report.card.usable]
    where = f" that fits {report.card.name}" if report.card else ", whatever its memory"
    if not fitting:
        return [f"no layout{where}"]
    best = min(fitting, key=lambda row: row.step_ms)
    return [f"the fastest{where}: {best.layout}"]


def _widest_phase(report: EstimateReport) -> str:
    phase = max(report.phases, key=report.phases.__getitem__)
    return "the optimizer's step" if phase == "optimizer" else phase


def _bytes(size: int) -> str:
    return format_bytes(size) if size else ""
