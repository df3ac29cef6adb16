"""The class of a text: the cross-entropy of its label, or of each of several labels.

With one label a row, loss = sum of w(y) x cross-entropy over the sum of w(y), w the class_weights,
1 by default: that of torch and of transformers' ForSequenceClassificationLoss. With several labels
it is the binary cross-entropy of each class, the mean over rows and classes; class_weights then
multiply the loss of the labels that a row has (pos_weight).

A step is one mean over its rows, whatever the micro-batches, the processes and the packing. A text
is scored at its last token, which is known by its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from liger_cli.config import RunConfig
from liger_cli.config.pairs import read_numbers
from liger_cli.data.batches import count_tokens
from liger_cli.data.class_batches import scored_places
from liger_cli.data.class_formats import TARGETS
from liger_cli.errors import ConfigError
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.inputs import Inputs
from liger_cli.training.model.classifiers import MULTI_LABEL, row_scores, take_places
from liger_cli.training.objectives.answers import model_inputs
from liger_cli.training.objectives.objective import Batch, Part, Setting, Totals
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["Classify"]

# A table of more classes is larger than a report.
_MAX_CONFUSION = 20


class Classify:
    """The objective classify.

    Args:
        config: Has its keys.
        model: The model before it is prepared.
        device: Where batches go.
    """

    metrics = ("accuracy",)

    def __init__(self, config: RunConfig, model: Any, device: torch.device) -> None:
        self._device = device
        settings = inner_model(model).config
        self.names = [settings.id2label[i] for i in range(settings.num_labels)]
        self.is_multi = settings.problem_type == MULTI_LABEL
        self._weights = _class_weights(config, self.names)
        take_places(model)

    def prepare(self, setting: Setting) -> Inputs:
        return setting.inputs

    def count(self, batch: Batch) -> Totals:
        targets = batch[TARGETS]
        return Totals(
            tokens=count_tokens(batch),
            labels=len(targets),
            weight=float(self._row_weights(targets).sum()) if len(targets) else 0.0,
        )

    def _row_weights(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the weight of each row in the mean, (N,) float64 on the host."""
        if self.is_multi:
            return torch.ones(len(targets), dtype=torch.float64)
        return self._weights[targets.squeeze(-1).long()]

    def begin(self, model: Any, batches: Sequence[Batch], totals: Totals) -> None:
        """Do nothing: the parts of a step do not depend on one another."""

    def scores(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the scores of the rows of a batch, (N, C) float64."""
        places = scored_places(batch).to(self._device)
        return row_scores(model, model_inputs(batch, self._device), places).double()

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the losses of rows, times their weights, as a sum; of no rows 0 with a gradient.

        Args:
            scores: (N, C).
            targets: (N, 1), numbers of classes; of several labels (N, C), 0 and 1.
        """
        if not len(targets):
            return scores.sum() * 0.0
        weights = self._weights.to(scores.device)
        if not self.is_multi:
            wanted = targets.squeeze(-1).long()
            return F.cross_entropy(scores, wanted, weight=weights, reduction="sum")
        losses = F.binary_cross_entropy_with_logits(
            scores, targets.double(), pos_weight=weights, reduction="none"
        )
        return losses.mean(-1).sum()

    def part(self, model: Any, batch: Batch, totals: Totals) -> Part:
        scores, targets = self.scores(model, batch), batch[TARGETS].to(self._device)
        loss = self.loss(scores, targets) / (totals.weight or 1.0)
        right = self.is_right(scores, targets).sum() / max(totals.labels, 1)
        return Part(loss, right.double().view(1))

    @torch.no_grad()
    def is_right(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return whether all of a row's labels are right, (N,)."""
        if not len(targets):
            return torch.zeros(0, device=scores.device)
        if self.is_multi:
            return ((scores > 0) == (targets > 0.5)).all(-1)
        return scores.argmax(-1) == targets.squeeze(-1).long()

    def updated(self, step: int) -> None:
        """Do nothing: the loss reads nothing but the model."""

    def evaluation(self, model: Any) -> ClassEvaluation:
        return ClassEvaluation(self, model)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""


class ClassEvaluation:
    """Loss, accuracy and F1 over all rows of the evaluation data, whatever the batches.

    Its sums are those of the loss, the weights, the rows and the right rows; of each class the rows
    that have it, those that are said to, and those of both; and the table of classes, where a row
    has one label and the classes are few.
    """

    def __init__(self, objective: Classify, model: Any) -> None:
        self._objective = objective
        self._model = model
        self._num = len(objective.names)
        self._has_table = not objective.is_multi and self._num <= _MAX_CONFUSION
        self.num_sums = 4 + 3 * self._num + (self._num**2 if self._has_table else 0)

    def sums(self, batch: Batch) -> torch.Tensor:
        objective, num = self._objective, self._num
        # The graphs of a compiled model are for the shapes of training.
        with torch.compiler.set_stance("force_eager"):
            scores = objective.scores(self._model, batch).cpu()
        targets = batch[TARGETS]
        totals = objective.count(batch)
        if not len(targets):
            return torch.zeros(self.num_sums, dtype=torch.float64)
        right = float(objective.is_right(scores, targets).sum())
        loss = float(objective.loss(scores, targets))
        found = torch.tensor([loss, totals.weight, totals.labels, right], dtype=torch.float64)
        if objective.is_multi:
            has, said = targets > 0.5, scores > 0
        else:
            wanted, best = targets.squeeze(-1).long(), scores.argmax(-1)
            has, said = F.one_hot(wanted, num).bool(), F.one_hot(best, num).bool()
        parts = [found, *(x.double().sum(0) for x in (has, said, has & said))]
        if self._has_table:
            parts.append((has.double().T @ said.double()).flatten())
        return torch.cat(parts)

    def result(self, sums: torch.Tensor) -> EvalResult:
        num = self._num
        loss, weight, num_rows, right = sums[:4].tolist()
        has, said, both = sums[4 : 4 + 3 * num].view(3, num).tolist()
        f1 = [
            2 * x / (h + s) if h + s else math.nan for h, s, x in zip(has, said, both, strict=True)
        ]
        known = [value for value in f1 if not math.isnan(value)]
        means = {
            "accuracy": right / num_rows,
            # As scikit-learn's macro average: of the classes that a row has or is said to have.
            "f1": sum(known) / len(known) if known else math.nan,
            **{f"f1/{name}": value for name, value in zip(self._objective.names, f1, strict=True)},
        }
        table = None
        if self._has_table:
            table = [[int(x) for x in row] for row in sums[4 + 3 * num :].view(num, num).tolist()]
        mean = loss / weight if weight else math.nan
        return EvalResult(loss=mean, rows=int(num_rows), means=means, confusion=table)


def _class_weights(config: RunConfig, names: Sequence[str]) -> torch.Tensor:
    """Return the weights of the classes, (C,) float64 on the host."""
    given = read_numbers(config.class_weights)
    if given and len(given) != len(names):
        raise ConfigError(
            f"class_weights has {len(given)} weights, and there are {len(names)} classes: "
            f"{', '.join(names[:20])}"
        )
    return torch.tensor(given or [1.0] * len(names), dtype=torch.float64)
