"""The result of a run: the metrics of each step, and of the final model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from liger_cli.common.measure import median_after_warm_up
from liger_cli.config.objectives import BALANCE, PAIR_MEANS
from liger_cli.data.batches import BatchPlan
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.evaluations import Best, EarlyStop

__all__ = ["COUNTS", "STEP_FIELDS", "StepMetrics", "TrainResult", "summary"]


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl. grad_norm is None where float16 overflowed: the step was skipped.

    Attributes:
        means: The objective's other means by name, such as rewards/margins; each a number of the
            line as well.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens: int
    trained_tokens: int
    step_ms: float
    tokens_per_s: float
    peak_memory_bytes: int
    means: Mapping[str, float | None] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return the line."""
        return {**{name: getattr(self, name) for name in STEP_FIELDS}, **self.means}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> StepMetrics:
        """Return the metrics of a row of metrics.jsonl; a missing number is NaN, a count 0."""
        values: dict[str, Any] = {}
        for name in STEP_FIELDS:
            absent = None if name == "grad_norm" else 0 if name in COUNTS else math.nan
            value = row.get(name)
            values[name] = absent if value is None else value
        means = {name: row[name] for name in (*PAIR_MEANS, BALANCE) if name in row}
        return cls(**values, means=means)


COUNTS = ("step", "tokens", "trained_tokens", "peak_memory_bytes")
STEP_FIELDS = tuple(entry.name for entry in fields(StepMetrics) if entry.name != "means")


@dataclass(frozen=True)
class TrainResult:
    """The result of a run; that of a resumed run includes the steps before it.

    Attributes:
        eval: Of the model as it is in the end.
        plan: The order of the data, in the micro-batches that fitted in the end.
        compiles: What torch_compile was.
        best: The best evaluation on the way.
        stop: Why it ended early, if it did.
    """

    history: tuple[StepMetrics, ...]
    eval: EvalResult | None
    plan: BatchPlan
    compiles: bool = False
    best: Best | None = None
    stop: EarlyStop | None = None

    def summary(self) -> dict[str, Any]:
        """Return the `train` part of a report; speed is a median without the first step."""
        return {**summary(self.history), "batch": self._batch()}

    def _batch(self) -> dict[str, Any]:
        plan, num_steps = self.plan, len(self.history)
        num_rows = plan.num_rows_of(num_steps)
        return {
            "rows": None if num_rows is None else num_rows / num_steps,
            "tokens": sum(step.tokens for step in self.history) / num_steps,
            "trained_tokens": sum(step.trained_tokens for step in self.history) / num_steps,
            "micro_batch_rows": plan.batch_size,
            "micro_batches": plan.accumulation,
            "processes": plan.num_processes,
        }

    def speed(self, num_steps: int) -> dict[str, Any]:
        """Return tokens_per_s, step_ms and peak_memory_bytes of the first `num_steps`."""
        return _speed(self.history[:num_steps])


def summary(history: Sequence[StepMetrics]) -> dict[str, Any]:
    """Return the `train` part of a report on these steps."""
    losses = [step.loss for step in history]
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "tokens": sum(step.tokens for step in history),
        "trained_tokens": sum(step.trained_tokens for step in history),
        "first_loss": sum(losses[:tenth]) / tenth,
        "final_loss": sum(losses[-tenth:]) / tenth,
        **_speed(history),
    }


def _speed(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    return {
        "tokens_per_s": _median(step.tokens_per_s for step in steps),
        "step_ms": _median(step.step_ms for step in steps),
        "peak_memory_bytes": max(step.peak_memory_bytes for step in steps),
    }


def _median(values: Iterable[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return median_after_warm_up(found) if found else math.nan
