"""The evaluations of a run: their log, the best one, and early stopping.

All of it follows from the lines of eval.jsonl, so that a resumed run needs nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints.files import checkpoint_path
from liger_cli.training.checkpoints.run_log import JsonLines
from liger_cli.training.eval_result import EvalResult, logged_name, plain_name, required_names

__all__ = ["EVAL_LOG", "Best", "EarlyStop", "Evaluations", "eval_interval", "evaluated_values"]

EVAL_LOG = "eval.jsonl"


@dataclass(frozen=True)
class Best:
    """The best evaluation; checkpoint is None where none was written of its step."""

    step: int
    metric: str
    value: float
    checkpoint: str | None


@dataclass(frozen=True)
class EarlyStop:
    """Why a run ended before its last step: so many evaluations in turn were no better."""

    step: int
    evaluations: int


class Evaluations:
    """The results of a run at the steps where it was evaluated.

    Args:
        config: Names the metric that decides, and the patience.
        run_dir: Where eval.jsonl is.
        last_step: Lines of later steps are cut off.
        write: Whether this process keeps the file.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, last_step: int, write: bool) -> None:
        self._log = JsonLines(
            run_dir / EVAL_LOG,
            required=required_names(config.objective),
            last_step=last_step,
            write=write,
        )
        self._run_dir = run_dir
        self._metric, self._is_greater_better = config.best_metric
        self._patience = config.early_stopping_patience
        self._threshold = config.early_stopping_threshold
        self._best: dict[str, Any] | None = None
        # Evaluations in turn, up to the last, that were not better than the best by the threshold.
        self.num_vain = 0
        for row in self._log.rows:
            self._note(row)

    def add(self, step: int, result: EvalResult) -> None:
        """Record the evaluation after a step and write it to the log.

        Raises:
            ConfigError: The metric that decides is not known of this model.
        """
        values = result.by_name()
        if values[self._metric] is None:
            known = ", ".join(name for name, value in values.items() if value is not None)
            raise ConfigError(
                f"metric_for_best_model is {self._metric}, which nobody knows of this model: its "
                f"loss is not one cross-entropy of its tokens; there are {known}"
            )
        logged = {logged_name(name): value for name, value in result.logged().items()}
        row = {"step": step, **logged}
        self._log.write(row)
        self._note(row)

    def at(self, step: int) -> EvalResult | None:
        """Return the evaluation of a step, if there was one."""
        rows = [row for row in self._log.rows if row["step"] == step]
        return EvalResult.from_names(evaluated_values(rows[-1])) if rows else None

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation."""
        return None if self._best is None else int(self._best["step"])

    @property
    def best(self) -> Best | None:
        """The best evaluation, and the checkpoint of its step if it is there."""
        if self._best is None:
            return None
        step = self._best["step"]
        path = checkpoint_path(self._run_dir, step)
        checkpoint = str(path) if path.is_dir() else None
        return Best(step, self._metric, self._value(self._best), checkpoint)

    @property
    def should_stop(self) -> bool:
        """Whether as many evaluations in turn as there is patience for were no better."""
        return self._patience is not None and self.num_vain >= self._patience

    def sync(self) -> None:
        """Wait until the log is on the disk."""
        self._log.sync()

    def _note(self, row: dict[str, Any]) -> None:
        # Before the first step the model is what training is measured by, and no result of it. A
        # run that was resumed may have had other evaluation sets.
        if row["step"] == 0 or logged_name(self._metric) not in row:
            return
        gain = math.inf
        if self._best is not None:
            sign = 1 if self._is_greater_better else -1
            gain = sign * (self._value(row) - self._value(self._best))
        # A value that is not finite is no gain over anything.
        gain = gain if math.isfinite(self._value(row)) else -math.inf
        if gain > 0:
            self._best = row
        self.num_vain = 0 if gain > self._threshold else self.num_vain + 1

    def _value(self, row: dict[str, Any]) -> float:
        value = row[logged_name(self._metric)]
        return math.nan if value is None else float(value)


def evaluated_values(row: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a line of eval.jsonl as EvalResult.logged had them."""
    return {plain_name(key): value for key, value in row.items() if key != "step"}


def eval_interval(config: RunConfig, steps_per_epoch: int) -> int:
    """Return the steps between evaluations on the way; 0 where there are none."""
    return steps_per_epoch if config.eval_strategy == "epoch" else config.eval_steps
