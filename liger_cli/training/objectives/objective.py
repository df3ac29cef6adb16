"""The interface of an objective: what the loop, the evaluation and the estimate ask of a loss.

The loss of an optimizer step is one mean over everything in the step, on all processes. An
objective counts first (`Totals`), and gives each micro-batch its part of that mean afterwards, so a
step means the same whatever the micro-batches, the accumulation, the processes and the packing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from liger_cli.config import RunConfig
from liger_cli.data.batches import BatchPlan
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.inputs import Inputs
from liger_cli.training.parallel.engine import Engine

__all__ = [
    "Batch",
    "Evaluation",
    "Objective",
    "Part",
    "Setting",
    "Totals",
    "TwoPassEvaluation",
]

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Totals:
    """Counts of micro-batches, of which a loss may be a mean.

    Attributes:
        tokens: Those that are not padding.
        labels: Tokens that are trained on.
        weight: The sum of their weights, each of which is 1 by default.
        weighted: Tokens that are trained on in batches with a column of weights.
        pairs: Pairs of a chosen and a rejected answer.
        chosen_labels: Tokens of chosen answers.
        desirable, undesirable: Answers labelled good, and bad.
        mismatched: Answers to other prompts, of which kto takes its KL.
    """

    tokens: int = 0
    labels: int = 0
    weight: float = 0.0
    weighted: int = 0
    pairs: int = 0
    chosen_labels: int = 0
    desirable: int = 0
    undesirable: int = 0
    mismatched: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def like(self, values: Sequence[float]) -> Totals:
        """Return totals of these values, of the types that the fields have here."""
        return Totals(*(type(own)(v) for own, v in zip(astuple(self), values, strict=True)))


class Part(NamedTuple):
    """The part of a micro-batch in a step.

    Attributes:
        loss: Scalar with a gradient; the parts of a step add up to its loss.
        metrics: (len(Objective.metrics),) float64, on the device; they add up likewise.
    """

    loss: torch.Tensor
    metrics: torch.Tensor

    def plus(self, other: Part) -> Part:
        """Return both parts as one."""
        return Part(self.loss + other.loss, self.metrics + other.metrics)


class Evaluation(Protocol):
    """Sums over evaluation data, and the means they give.

    Attributes:
        num_sums: How many sums there are.
    """

    num_sums: int

    def sums(self, batch: Batch) -> torch.Tensor:
        """Return the sums of a batch, (num_sums,) float64 on the CPU."""

    def result(self, sums: torch.Tensor) -> EvalResult:
        """Return the means of sums that were added up over batches and processes."""


@runtime_checkable
class TwoPassEvaluation(Evaluation, Protocol):
    """An evaluation that passes over each set once before its sums.

    Attributes:
        num_first_sums: How many sums the first pass has.
    """

    num_first_sums: int

    def first_sums(self, batch: Batch) -> torch.Tensor:
        """Return the first sums of a batch, (num_first_sums,) float64 on the CPU."""

    def begin(self, sums: torch.Tensor) -> None:
        """Take the first sums of a set, over all batches and processes."""


@dataclass(frozen=True)
class Setting:
    """A run, as far as an objective needs it once the model is prepared.

    Attributes:
        config: With its keys resolved (table.py).
        engine: Loads a model in the layout of the run.
        model: The prepared model.
        inputs: Its data, and the model as it was found before training.
        batches: The order of the training data; None of a run that evaluates alone.
        num_steps: Optimizer steps of the whole run.
        run_dir: Where the run keeps its files; None of one that keeps none.
        checkpoint: The checkpoint that the run resumes from.
        notify: Gets lines for the user.
    """

    config: RunConfig
    accelerator: Any
    engine: Engine
    model: Any
    inputs: Inputs
    notify: Callable[[str], None]
    batches: BatchPlan | None = None
    num_steps: int = 0
    run_dir: Path | None = None
    checkpoint: Path | None = None


class Objective(Protocol):
    """The loss that a run learns by: a class in a file here, with a row in MAKERS (table.py)."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of the means that a line of metrics.jsonl has beside its loss."""

    def prepare(self, setting: Setting) -> Inputs:
        """Get ready for the first step, and return the data with what the loss reads of them."""

    def count(self, batch: Batch) -> Totals:
        """Count a collated batch, on the host."""

    def begin(self, model: Any, batches: Sequence[Batch], totals: Totals) -> None:
        """Prepare for the micro-batches that this process has of a step, before the first part.

        Every process calls it at the same time.

        Args:
            model: The prepared model.
            batches: The micro-batches of this process.
            totals: Of the whole step, on all processes.
        """

    def part(self, model: Any, batch: Batch, totals: Totals) -> Part:
        """Compute the part of a micro-batch in the step; batches come in the order of begin."""

    def updated(self, step: int) -> None:
        """Follow the optimizer step that was done last."""

    def evaluation(self, model: Any) -> Evaluation:
        """Return the evaluation of a model that is not wrapped for several processes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold of the objective."""

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Restore what state_dict returned, after prepare."""
