"""The summary of a report, for a reader who has not run it: title, one sentence, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.config import RunConfig
from liger_cli.report.bench import comparisons, gain_text, is_noise, loss_text, percent_text
from liger_cli.report.modules import op_counts
from liger_cli.report.training import batch_note, batch_text
from liger_cli.report.values import (
    AgainstPart,
    Arm,
    DataPart,
    EvalPart,
    ParityPart,
    RatiosPart,
    RunReport,
)

__all__ = [
    "SavedReport",
    "Setting",
    "Summary",
    "Tile",
    "attention_rows",
    "data_rows",
    "environment_rows",
    "settings",
    "summarize",
]


@dataclass(frozen=True)
class SavedReport:
    """A report with what its run directory has beside it.

    Attributes:
        steps, evaluations: The lines of metrics.jsonl and eval.jsonl.
        is_finished: Whether the run wrote the report, or it is of what there is so far.
    """

    report: RunReport
    steps: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    is_finished: bool = True


@dataclass(frozen=True)
class Tile:
    """A figure with its name and meaning; tone is "good", "bad" or neither."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Summary:
    """The top of a report."""

    title: str
    subtitle: str
    headline: str
    tiles: list[Tile] = field(default_factory=list)

    @property
    def tone(self) -> str:
        """That of the worst tile."""
        tones = {tile.tone for tile in self.tiles}
        return next((tone for tone in ("bad", "good") if tone in tones), "")


@dataclass(frozen=True)
class Setting:
    """A key of a configuration; one that has no default here has None."""

    key: str
    value: str
    default: str | None
    meaning: str

    @property
    def is_default(self) -> bool:
        return self.value == self.default


def summarize(saved: SavedReport) -> Summary:
    """Return the top of a report: what was run, what came of it in a sentence, the figures."""
    report = saved.report
    model = str((report.model or {}).get("name") or (report.config or {}).get("model") or "model")
    compared = comparisons(report)
    if report.arms:
        title = f"{model}: patched against {', '.join(compared) or 'others'}"
        headline, tiles = _bench_summary(report, compared)
    elif report.train is not None or report.command == "train":
        title = f"Training of {model}"
        headline, tiles = _train_summary(report, is_finished=saved.is_finished)
    else:
        title = f"{model}: {'evaluation' if report.eval else 'what would be patched'}"
        headline, tiles = "", []
    tiles += _eval_tiles(report.eval) if report.eval else []
    tiles += [_kernels_tile(report)] if report.coverage else []
    where = ", ".join(filter(None, (_size_text(report), _device_text(report))))
    return Summary(title, where, headline or _tiles_text(tiles), tiles)


def _bench_summary(
    report: RunReport, compared: Mapping[str, AgainstPart]
) -> tuple[str, list[Tile]]:
    if not compared:
        errors = [f"{arm.name}: {arm.error}" for arm in report.arms or () if arm.error]
        return ". ".join(["There is nothing to compare", *errors]), []
    if not any(counts["patched"] for counts in (report.coverage or {}).values()):
        return "Nothing was patched: both sides ran the same code.", []
    base, part = next(iter(compared.items()))
    arms = {arm.name: arm for arm in report.arms or ()}
    speed, speed_tile = _speed(part.ratios, base)
    memory, memory_tile = _memory(part.ratios, arms.get("patched"), arms.get(base))
    losses = "the losses agree" if part.parity.equal else "THE RESULTS DIFFER"
    tiles = [speed_tile, memory_tile, _losses_tile(part.parity)]
    if report.asserted:
        met = [bound.met for bound in report.asserted]
        tone = "good" if all(met) else "bad"
        tiles.append(Tile("Bounds", f"{sum(met)}/{len(met)}", "of --assert are met", tone))
    return f"Patched {speed}, {memory}; {losses}.", tiles


def _speed(ratios: RatiosPart, base: str) -> tuple[str, Tile]:
    """Return the sentence on the speed, and its tile."""
    speed, noise = ratios.speed, ratios.noise
    if speed is None:
        return f"was not timed beside {base}", Tile("Speed", "-", "not measured")
    value = f"{speed:.2f}x"
    if noise is None:
        return (
            f"ran at {value} the speed of {base} once",
            Tile("Speed", value, f"of {base}, in one run: the noise is unknown"),
        )
    equal_runs = f"equal runs are within {noise:.0%}"
    if is_noise(speed, noise):
        return f"is as fast as {base}", Tile("Speed", value, f"no difference: {equal_runs}")
    word, tone = ("faster", "good") if speed > 1 else ("slower", "bad")
    times = max(speed, 1 / speed)
    return (
        f"is {times:.2f}x {word} than {base}",
        Tile("Speed", value, f"of {base}; {equal_runs}", tone),
    )


def _memory(ratios: RatiosPart, patched: Arm | None, base: Arm | None) -> tuple[str, Tile]:
    """Return the sentence on the peak of memory, and its tile."""
    memory, noise = ratios.memory, ratios.memory_noise
    if memory is None:
        return "memory was not measured", Tile("Peak memory", "-", "not measured")
    peaks = [arm.peak_memory_bytes for arm in (patched, base) if arm and arm.peak_memory_bytes]
    note = " instead of ".join(map(format_bytes, peaks))
    share = abs(1 - memory)
    is_same = round(share, 2) == 0 if noise is None else is_noise(memory, noise)
    if is_same:
        words, tone = "with the same peak memory", ""
    elif memory < 1:
        words, tone = f"with {share:.0%} less peak memory", "good"
    else:
        words, tone = f"with {share:.0%} more peak memory", "bad"
    return words, Tile("Peak memory", f"{memory:.2f}x", note, tone if noise is not None else "")


def _losses_tile(parity: ParityPart) -> Tile:
    if parity.max_relative_difference is None:
        return Tile("Losses", "-", "none to compare that is finite", "bad")
    apart, allowed = map(percent_text, (parity.max_relative_difference, parity.tolerance))
    note = f"apart by {apart} at most in {parity.steps} steps; {allowed} is allowed"
    return Tile("Losses", "agree", note) if parity.equal else Tile("Losses", "differ", note, "bad")


def _train_summary(report: RunReport, *, is_finished: bool) -> tuple[str, list[Tile]]:
    train, gain = report.train, report.gain
    if train is None:
        return "No step of this run was logged.", []
    state = "" if is_finished else "Not finished. "
    first, final = loss_text([train.first_loss]), loss_text([train.final_loss])
    tiles = [Tile("Training loss", final, f"from {first}, in {format_count(train.steps)} steps")]
    if train.tokens_per_s is not None:
        of_eager = f"{gain.speed:.2f}x of eager" if gain and gain.speed else ""
        step = "" if train.step_ms is None else f"{train.step_ms:.1f} ms a step"
        note = ", ".join(filter(None, (step, of_eager)))
        tiles.append(Tile("Tokens per second", format_count(train.tokens_per_s), note))
    if train.batch is not None:
        tiles.append(Tile("Batch of a step", batch_text(train.batch), batch_note(train.batch)))
    if train.peak_memory_bytes is not None:
        note = f"{gain.memory:.2f}x of eager's ({gain.source})" if gain and gain.memory else ""
        tiles.append(Tile("Peak memory", format_bytes(train.peak_memory_bytes), note))
    way = "went"
    if train.first_loss is not None and train.final_loss is not None:
        way = "fell" if train.final_loss < train.first_loss else "rose"
    steps = f"{state}The loss {way} from {first} to {final} in {format_count(train.steps)} steps"
    against = gain_text(gain) if gain else ""
    return "; ".join(filter(None, (steps, against))) + ".", tiles


def _eval_tiles(part: EvalPart) -> list[Tile]:
    perplexity = "" if part.perplexity is None else f"perplexity {part.perplexity:.2f}"
    tiles = [Tile("Evaluation loss", loss_text([part.loss]), perplexity)]
    if part.token_accuracy is not None:
        tokens = f"on {format_count(part.tokens or 0)} tokens with a label"
        tiles.append(Tile("Token accuracy", f"{part.token_accuracy:.1%}", tokens))
    if (accuracy := part.means.get("rewards/accuracies")) is not None:
        pairs = f"of {format_count(part.pairs or 0)} pairs the chosen answer has the larger reward"
        tiles.append(Tile("Reward accuracy", f"{accuracy:.1%}", pairs))
    if part.answers is not None and (margin := part.means.get("rewards/margins")) is not None:
        answers = f"of {format_count(part.answers)} answers, between good and bad ones"
        tiles.append(Tile("Reward margin", f"{margin:.4g}", answers))
    if (accuracy := part.means.get("accuracy")) is not None:
        rows = f"of {format_count(part.rows or 0)} rows have the right class"
        tiles.append(Tile("Accuracy", f"{accuracy:.1%}", rows))
    return tiles


def _kernels_tile(report: RunReport) -> Tile:
    counts = {op: op_counts(report, op) for op in report.coverage or {}}
    used = sum(used for used, _, _ in counts.values())
    candidates = sum(candidates for _, candidates, _ in counts.values())
    partial = [f"{op} {u}/{n}" for op, (u, n, _) in counts.items() if u < n]
    note = f"all but {', '.join(partial)}" if partial else "every place for an op is patched"
    return Tile("Kernels in place", f"{used}/{candidates}", note)


def _tiles_text(tiles: Sequence[Tile]) -> str:
    return "; ".join(f"{tile.label.lower()} {tile.value}" for tile in tiles).capitalize() + "."


def _size_text(report: RunReport) -> str:
    config = report.config or {}
    batch, length = config.get("per_device_train_batch_size"), config.get("max_length")
    # The arms that a sweep shows are those of its largest size.
    point = next((point for point in report.sweep or () if point.arms == report.arms), None)
    if point is not None:
        batch, length = point.batch_size, point.sequence_length
    if not (report.arms or report.train) or batch is None:
        return ""
    steps = report.train.steps if report.train else config.get("max_steps")
    if report.train and report.train.batch is not None:
        return f"{steps} steps of {batch_text(report.train.batch)}"
    return f"{steps} steps of {batch} x {length} tokens"


def _device_text(report: RunReport) -> str:
    devices = (report.environment or {}).get("devices") or ()
    return ", ".join(str(device.get("name")) for device in devices)


def settings(config: Mapping[str, Any]) -> list[Setting]:
    """Return the keys of a configuration, those that are not at their default first."""
    fields = RunConfig.model_fields
    defaults = RunConfig(model="-").model_dump(mode="json")
    defaults.pop("model")
    found = [
        Setting(
            key,
            _value_text(value),
            _value_text(defaults[key]) if key in defaults else None,
            (fields[key].description if key in fields else None) or "",
        )
        for key, value in config.items()
    ]
    return sorted(found, key=lambda setting: setting.is_default)


def _value_text(value: Any) -> str:
    # As YAML writes them.
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else json.dumps(value)


def data_rows(data: DataPart) -> list[tuple[str, str]]:
    """Return the counts of the data, a name and a figure a row."""
    counts = {
        "rows": data.rows,
        "tokens": data.tokens,
        "tokens trained on": data.trained_tokens,
        "rows cut to max_length": data.truncated_rows,
        "rows left out": data.dropped_rows,
        "rows for evaluation": data.eval_rows,
        **data.left_out,
    }
    rows = [("dataset", data.name), ("columns", ", ".join(data.columns))]
    if data.unused_columns:
        rows.append(("columns not used", ", ".join(data.unused_columns)))
    return [*rows, *((name, format_count(count)) for name, count in counts.items())]


def attention_rows(report: RunReport) -> list[tuple[str, str]]:
    """Return the attention of each type of layer, where rows hold documents."""
    found = report.attention
    if found is None:
        return []
    if not found.layers:
        name = found.implementation or "that of the model, with a mask of documents"
        return [("attention", name + (f"; {found.reason}" if found.reason else ""))]
    return [
        (
            f"attention, {layer.layer_type} ({layer.num_layers} layers)",
            layer.backend + (f"; {layer.reason}" if layer.reason else ""),
        )
        for layer in found.layers
    ]


def environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return devices and versions, a name and a text a row, without what is not there."""
    rows = [
        (
            "device",
            f"{device.get('count', 1)} x {device.get('name')}, "
            f"{format_bytes(device.get('memory_bytes') or 0)}",
        )
        for device in environment.get("devices") or ()
    ]
    rest = {name: value for name, value in environment.items() if name != "devices"}
    return rows + [(name, str(value)) for name, value in rest.items() if value is not None]
