"""The next token: supervised fine-tuning, whose loss is the model's own.

A step is a mean over its trained tokens, by their weights where data have some: then the sum of
weight x loss by the sum of weights. The loss of an evaluation is weighted alike; its accuracy and
entropy count every token once.

In evaluation the loss comes from the model's forward too, which materializes no logits where its
head is patched. The arguments of its cross-entropy are recorded: from them, accuracy and entropy
are computed a few rows at a time, those with a label only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from liger_cli.data.batches import count_labels, count_tokens, count_weight
from liger_cli.data.encode import IGNORED, WEIGHTS
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.forward import LossOf
from liger_cli.training.inputs import Inputs
from liger_cli.training.objectives.objective import Batch, Part, Setting, Totals
from liger_cli.training.objectives.weighted import evaluated_sums, weighted_loss
from liger_kernels.transformers.lazy_logits.deferred import is_lazy_head
from liger_kernels.transformers.wrappers import forward_parameters

__all__ = ["NextToken"]

# Logits made at a time: 128 MiB in float32, and twice as much for probabilities and entropies.
_CHUNK_ELEMENTS = 2**25


class NextToken:
    """The objective sft: the cross-entropy of every trained token.

    Args:
        model: The model before it is prepared.
        device: Where batches go.
    """

    metrics: tuple[str, ...] = ()

    def __init__(self, model: Any, device: torch.device) -> None:
        self._loss_of = LossOf(model, device)
        self._device = device

    def prepare(self, setting: Setting) -> Inputs:
        return setting.inputs

    def count(self, batch: Batch) -> Totals:
        num_labels = count_labels(batch)
        return Totals(
            tokens=count_tokens(batch),
            labels=num_labels,
            weight=count_weight(batch),
            weighted=num_labels if WEIGHTS in batch else 0,
        )

    def begin(self, model: Any, batches: Sequence[Batch], totals: Totals) -> None:
        """Do nothing: the parts of a step do not depend on one another."""

    def part(self, model: Any, batch: Batch, totals: Totals) -> Part:
        if totals.weighted:
            # All batches of the step, on all processes: a model in shards has to be gathered alike.
            loss = weighted_loss(model, batch, self._device) / totals.weight
            return Part(loss.float(), torch.zeros(0))
        return Part(self._loss_of(model, batch, totals.labels), torch.zeros(0))

    def updated(self, step: int) -> None:
        """Do nothing: the loss reads nothing but the model."""

    def evaluation(self, model: Any) -> TokenEvaluation:
        return TokenEvaluation(model, self._device)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""


class TokenEvaluation:
    """Loss, accuracy and entropy over all tokens with a label, whatever the batches.

    Its sums are those of the loss, the right tokens, the entropies, the labels, and their weights.
    """

    num_sums = 5

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._loss_of = LossOf(model, device)
        self._options = _options(model)

    def sums(self, batch: Batch) -> torch.Tensor:
        counts = (count_labels(batch), count_weight(batch))
        if WEIGHTS in batch:
            found = evaluated_sums(self._model, batch, self._device)
        else:
            found = self._recorded_sums(batch)
        return torch.tensor([*found, *counts], dtype=torch.float64)

    def _recorded_sums(self, batch: Batch) -> tuple[float, float, float]:
        """Return the sums of the loss, the right tokens and the entropies by the model's loss."""
        uncompiled = functools.partial(nn.Module._call_impl, self._model)
        with _RecordedLosses() as noted:
            loss = self._loss_of(uncompiled, batch, 1, **self._options)
        stats = sum((_token_sums(*call) for call in noted.calls), torch.zeros(3))
        correct, entropy, num_noted = stats.tolist()
        if num_noted != count_labels(batch):
            correct = entropy = math.nan
        return float(loss), correct, entropy

    def result(self, sums: torch.Tensor) -> EvalResult:
        loss_sum, correct, entropy, num_labels, weight = sums.tolist()
        mean = loss_sum / weight
        is_known = math.isfinite(correct)
        return EvalResult(
            loss=mean,
            perplexity=math.inf if mean > 700 else math.exp(mean),
            token_accuracy=correct / num_labels if is_known else None,
            entropy=entropy / num_labels if is_known else None,
            tokens=int(num_labels),
        )


def _options(model: Any) -> dict[str, bool]:
    """Return the options of a model's forward in evaluation, as far as it takes them."""
    head = model.get_output_embeddings()
    options = {"skip_logits": True} if head is not None and is_lazy_head(head) else {}
    if "output_router_logits" in forward_parameters(model):
        # With them a model adds the balance of its experts to the loss, if its configuration asks.
        options["output_router_logits"] = False
    return options


class _RecordedLosses(TorchFunctionMode):
    """Records the arguments of F.cross_entropy, whose logits may be deferred."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.cross_entropy:
            self.calls.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def _token_sums(logits: Any, target: torch.Tensor) -> torch.Tensor:
    """Return the number of labels with the largest logit, the sum of entropies, and all labels."""
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    if logits.dim() != 2 or target.dtype != torch.int64:
        return sums.cpu()
    numbers = (target != IGNORED).nonzero().flatten()
    sums[2] = len(numbers)
    for chunk in numbers.split(max(1, _CHUNK_ELEMENTS // logits.shape[-1])):
        part = _materialize(logits, chunk.to(logits.device)).float()
        is_right = part.argmax(-1) == target[chunk].to(part.device)
        sums[0] += is_right.sum()
        sums[1] += torch.special.entr(part.softmax(-1)).sum(dtype=torch.float64)
    return sums.cpu()


def _materialize(logits: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows of logits, which are computed first where they are deferred."""
    pending = getattr(logits, "_deferred", None)
    if pending is None:
        return logits[rows]
    if pending.has_been_made():
        return pending.real()[rows]
    with pending.as_recorded(False):
        made = pending.head_output(pending.rows[rows])
        for step in pending.arithmetic():
            made = step.apply(made)
    return made
