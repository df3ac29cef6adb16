"""The charts of a report as values: curves or bars, their unit, and a summary in words."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liger_cli.common.numbers import format_bytes, format_count
from liger_cli.report.bench import comparisons
from liger_cli.report.plots import Chart
from liger_cli.report.values import Arm, RunReport
from liger_cli.training.eval_result import logged_name

__all__ = [
    "NUM_COLORS",
    "Bar",
    "BarChart",
    "Curves",
    "ablation_charts",
    "arm_charts",
    "loss_charts",
    "step_charts",
    "sweep_charts",
]

NUM_COLORS = 8
# A curve of more steps than this is shown with its running mean.
_NOISY_STEPS = 60
_GB = 1e9


@dataclass(frozen=True)
class Bar:
    """One bar; without a value its text says why there is none."""

    name: str
    value: float | None
    text: str
    color: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class BarChart:
    """Bars from zero; reference is a value that all are to be seen against."""

    title: str
    unit: str
    caption: str
    bars: Sequence[Bar]
    reference: float | None = None

    @property
    def alternative(self) -> str:
        """The chart in words."""
        return f"{self.title}: " + "; ".join(f"{bar.name} {bar.text}" for bar in self.bars)


@dataclass(frozen=True)
class Curves(Chart):
    """Curves with a title.

    Attributes:
        grey: How the first one is drawn if the others are to be seen against it: "wide" or "thin".
        is_wide: Whether it gets the whole width of a page.
    """

    title: str = ""
    caption: str = ""
    grey: str = ""
    is_wide: bool = False
    is_log_x: bool = False
    from_zero: bool = False

    def color(self, name: str) -> int:
        """Return the colour of a curve; 0 is grey."""
        return (list(self.lines).index(name) + (not self.grey)) % NUM_COLORS

    def css_class(self, name: str) -> str:
        """Return the classes of a curve on a page."""
        color = self.color(name)
        return f"line s{color}" + (f" {self.grey}" if color == 0 and self.grey else "")

    @property
    def alternative(self) -> str:
        """The chart in words."""
        return f"{self.title}, {self.y_label}: " + "; ".join(
            _curve_words(name, points, self.x_label) for name, points in self.lines.items()
        )


def _curve_words(name: str, points: Mapping[int, float], x_label: str) -> str:
    first, last = min(points), max(points)
    low, high = min(points.values()), max(points.values())
    return (
        f"{name} from {points[first]:.4g} at {x_label} {first} to {points[last]:.4g} at {last}, "
        f"between {low:.4g} and {high:.4g}"
    )


def arm_charts(report: RunReport) -> list[BarChart]:
    """Return time, throughput and memory of every arm but those of one op alone."""
    arms = _whole_arms(report)
    has_spread = any(arm.step_p20_ms is not None for arm in arms)
    spread = " Line across its end: from the 20th to the 80th percentile." if has_spread else ""
    times = "Shorter is better. Bar: median of all steps but the first of each run." + spread
    speeds = "Longer is better. Tokens that are not padding."
    peaks = "Shorter is better. The highest of all runs." + _memory_noise(report)
    charts = [
        BarChart("Time of a step", "ms", times, _bars(arms, "step_ms", "{:.1f} ms".format)),
        BarChart("Throughput", "tokens/s", speeds, _bars(arms, "tokens_per_s", _speed_text)),
        BarChart("Peak memory", "GB", peaks, _bars(arms, "peak_memory_bytes", format_bytes, _GB)),
    ]
    return [chart for chart in charts if any(bar.value is not None for bar in chart.bars)]


def _speed_text(tokens_per_s: float) -> str:
    return f"{format_count(tokens_per_s)} tokens/s"


def _bars(
    arms: Sequence[Arm], key: str, text: Callable[[float], str], divisor: float = 1.0
) -> list[Bar]:
    bars = []
    for number, arm in enumerate(arms):
        value, color = getattr(arm, key), number % NUM_COLORS
        if value is None:
            bars.append(Bar(arm.name, None, arm.error or "not measured", color))
        else:
            ends = (arm.step_p20_ms, arm.step_p80_ms) if key == "step_ms" else ()
            bars.append(Bar(arm.name, value / divisor, text(value), color, *ends))
    return bars


def _whole_arms(report: RunReport) -> list[Arm]:
    alone = {f"eager+{op}" for op in report.ablation or ()}
    return [arm for arm in report.arms or () if arm.name not in alone]


def _memory_noise(report: RunReport) -> str:
    noise = report.ratios and report.ratios.memory_noise
    return f" Equal runs are within {noise:.1%} of each other." if noise else ""


def ablation_charts(report: RunReport) -> list[BarChart]:
    """Return the effect of each op alone on the speed and the memory of the eager model."""
    parts = report.ablation or {}
    charts = []
    for title, key, better in (
        ("Speed with one op alone", "speed", "Longer is better."),
        ("Memory with one op alone", "memory", "Shorter is better."),
    ):
        ratios = {op: getattr(part.ratios, key) for op, part in parts.items()}
        bars = [
            Bar(op, ratio, "not measured" if ratio is None else f"{ratio:.2f}x", 1)
            for op, ratio in ratios.items()
        ]
        if any(ratio is not None for ratio in ratios.values()):
            caption = f"{better} The upright line is the model without any op."
            charts.append(BarChart(title, "times eager", caption, bars, reference=1.0))
    return charts


def loss_charts(report: RunReport) -> list[Curves]:
    """Return the losses of all arms, how far they are apart, and the norms of their gradients."""
    arms = _whole_arms(report)
    charts = [
        Curves(
            "step",
            "loss, nats a token",
            _series((arm.name, arm.losses) for arm in arms),
            title="Loss of each step",
            caption="Every arm starts from the same weights and gets the same data, so that "
            "correct arms lie on one line; the wide grey one is what the others are compared with.",
            grey="wide",
            is_wide=True,
        ),
        _difference_chart(report, arms),
        Curves(
            "step",
            "norm of the gradient",
            _series((arm.name, arm.grad_norms) for arm in arms),
            title="Gradient of each step",
            caption="The norm of the whole gradient, before it is clipped.",
            grey="wide",
        ),
    ]
    return [chart for chart in charts if chart.lines]


def _difference_chart(report: RunReport, arms: Sequence[Arm]) -> Curves:
    losses = {arm.name: arm.losses for arm in arms}
    patched = losses.get("patched", [])
    lines: dict[str, dict[int, float]] = {}
    for name, part in comparisons(report).items():
        pairs = enumerate(zip(losses.get(name, []), patched, strict=False), start=1)
        shares = {
            step: 100 * abs(ours - theirs) / abs(theirs)
            for step, (theirs, ours) in pairs
            if ours is not None and theirs
        }
        if shares:
            lines.setdefault("allowed", dict.fromkeys(shares, 100 * part.parity.tolerance))
            lines[f"patched against {name}"] = shares
    return Curves(
        "step",
        "difference of the losses, %",
        lines,
        title="How far the losses are apart",
        caption="Below the grey line they agree.",
        grey="wide",
        from_zero=True,
    )


def _series(
    curves: Iterable[tuple[str, Sequence[float | None]]],
) -> dict[str, dict[int, float]]:
    """Return the finite values of each curve by step, of those that have any."""
    found = {
        name: {step: value for step, value in enumerate(values, start=1) if value is not None}
        for name, values in curves
    }
    return {name: points for name, points in found.items() if points}


def sweep_charts(report: RunReport) -> list[Curves]:
    """Return throughput and memory of each arm over the tokens of a step."""
    ends = " Where the line of an arm ends, the next size did not fit or was not measured."
    charts = []
    for title, unit, key, divisor in (
        ("Throughput by size", "tokens/s", "tokens_per_s", 1.0),
        ("Peak memory by size", "GB", "peak_memory_bytes", _GB),
    ):
        lines: dict[str, dict[int, float]] = {}
        for point in report.sweep or ():
            for arm in point.arms:
                if (value := getattr(arm, key)) is not None:
                    tokens = point.batch_size * point.sequence_length
                    lines.setdefault(arm.name, {})[tokens] = value / divisor
        caption = "Tokens are batch size times sequence length; of equal ones the longer rows."
        charts.append(
            Curves(
                "tokens of a step",
                unit,
                lines,
                title=title,
                caption=caption + ends,
                grey="wide",
                is_log_x=True,
                from_zero=True,
            )
        )
    charts.insert(0, _speeds_by_size(report))
    return [chart for chart in charts if any(len(points) > 1 for points in chart.lines.values())]


def _speeds_by_size(report: RunReport) -> Curves:
    lines: dict[str, dict[int, float]] = {}
    for point in report.sweep or ():
        tokens = point.batch_size * point.sequence_length
        lines.setdefault("equal", {})[tokens] = 1.0
        for name, part in point.against.items():
            if part.ratios.speed is not None and not name.startswith("eager+"):
                lines.setdefault(f"patched against {name}", {})[tokens] = part.ratios.speed
    return Curves(
        "tokens of a step",
        "times the speed",
        lines,
        title="Speed by size",
        caption="Above the grey line patched is faster.",
        grey="wide",
        is_log_x=True,
        from_zero=True,
    )


def step_charts(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[Curves]:
    """Return the metrics of a training run over its steps.

    Args:
        steps: The lines of metrics.jsonl.
        evaluations: The lines of eval.jsonl.
    """
    loss = _column(steps, "loss")
    lines = {"each step": loss}
    if is_noisy := len(loss) > _NOISY_STEPS:
        window = max(len(loss) // 50, 10)
        lines[f"mean of {window} steps"] = _running_mean(loss, window)
    lines |= _by_set(evaluations, "loss")
    charts = [
        Curves(
            "step",
            "loss, nats a token",
            _used(lines),
            title="Loss",
            is_wide=True,
            grey="thin" if is_noisy else "",
        ),
        _metric(steps, "learning_rate", "Learning rate", "learning rate", from_zero=True),
        _metric(steps, "grad_norm", "Gradient", "norm before clipping", from_zero=True),
        _metric(steps, "tokens_per_s", "Throughput", "tokens/s", from_zero=True),
        _metric(steps, "peak_memory_bytes", "Peak memory", "GB", divisor=_GB, from_zero=True),
        Curves(
            "step",
            "%",
            _used(_by_set(evaluations, "token_accuracy", divisor=0.01)),
            title="Token accuracy in evaluation",
        ),
        Curves(
            "step",
            "%",
            _used(_by_set(evaluations, "accuracy", divisor=0.01)),
            title="Accuracy of classes in evaluation",
        ),
        *_preference_charts(steps, evaluations),
    ]
    return [chart for chart in charts if any(len(points) > 1 for points in chart.lines.values())]


def _by_set(
    evaluations: Sequence[Mapping[str, Any]], key: str, divisor: float = 1.0
) -> dict[str, dict[int, float]]:
    """Return a figure of each evaluation set by step, and of all together where they are many."""
    names = dict.fromkeys(
        re.sub("^eval_|_(perplexity|pairs|rows)$", "", column)
        for row in evaluations
        for column in row
        if re.fullmatch("eval_.+_(perplexity|pairs|rows)", column)
    )
    columns = {f"evaluation of {name}": f"eval_{name}_{key}" for name in names}
    if len(columns) != 1:
        # Of one set with a name, all together would say the same again.
        columns["evaluation of all sets" if columns else "evaluation"] = f"eval_{key}"
    return {
        name: {step: value / divisor for step, value in _column(evaluations, column).items()}
        for name, column in columns.items()
    }


def _preference_charts(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[Curves]:
    """Return rewards of answers over the steps of a run, and in its evaluations."""
    charts = []
    for title, keys in (
        ("Reward accuracy", ("rewards/accuracies",)),
        ("Rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
        ("Log-probability of answers", ("logps/chosen", "logps/rejected")),
        ("KL from the reference", ("kl",)),
    ):
        lines = {key.rpartition("/")[2]: _column(steps, key) for key in keys}
        lines |= {
            f"{key.rpartition('/')[2]}, evaluation": _column(evaluations, logged_name(key))
            for key in keys
        }
        charts.append(Curves("step", title.lower(), _used(lines), title=title))
    return charts


def _metric(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    unit: str,
    *,
    divisor: float = 1.0,
    from_zero: bool = False,
) -> Curves:
    points = {step: value / divisor for step, value in _column(rows, key).items()}
    return Curves("step", unit, _used({title: points}), title=title, from_zero=from_zero)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if row.get(key) is not None}


def _used(lines: Mapping[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    return {name: points for name, points in lines.items() if points}


def _running_mean(points: Mapping[int, float], window: int) -> dict[int, float]:
    steps, values = list(points), list(points.values())
    return {
        step: statistics.fmean(values[max(0, end - window) : end])
        for end, step in enumerate(steps, start=1)
    }
