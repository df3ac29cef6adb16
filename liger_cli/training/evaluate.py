"""Loss, perplexity, accuracy and entropy over all tokens with a label, whatever the batches.

The loss comes from the model's own forward, which materializes no logits where its head is patched.
The arguments of its cross-entropy are recorded: from them, accuracy and entropy are computed a few
rows at a time, those with a label only.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from liger_cli.common.failures import is_out_of_memory
from liger_cli.config import RunConfig
from liger_cli.data.batches import count_labels, load_windows
from liger_cli.data.encode import IGNORED
from liger_cli.training.checkpoints.random_state import kept_random_state
from liger_cli.training.forward import LossOf
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.limits import evaluation_out_of_memory
from liger_kernels.transformers.lazy_logits.deferred import is_lazy_head
from liger_kernels.transformers.wrappers import forward_parameters

__all__ = ["FIGURES", "EvalResult", "evaluate", "evaluate_inputs"]

# Logits made at a time: 128 MiB in float32, and twice as much for probabilities and entropies.
_CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class EvalResult:
    """Means over `tokens` tokens with a label.

    Attributes:
        token_accuracy: Share of them that have the largest logit.
        entropy: Of the predicted distributions, in nats. Both are None where the model's loss is
            not one cross-entropy of these tokens.
        sets: The same for each evaluation set, where there are several with names.
    """

    loss: float
    perplexity: float
    token_accuracy: float | None
    entropy: float | None
    tokens: int
    sets: Mapping[str, EvalResult] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return the numbers of all sets together, by name."""
        return {name: getattr(self, name) for name in FIGURES}

    def by_name(self) -> dict[str, Any]:
        """Return the numbers of all together as loss, those of a set as NAME_loss."""
        named = {
            f"{name}_{key}": value
            for name, part in self.sets.items()
            for key, value in part.figures().items()
        }
        return {**self.figures(), **named}

    @classmethod
    def from_names(cls, values: Mapping[str, Any]) -> EvalResult:
        """Return the result whose by_name these values are; a null is NaN."""
        names = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
        # A name that only ends like that of a figure is not a set's.
        known = [n for n in names if all(f"{n}_{figure}" in values for figure in FIGURES)]
        sets = {name: cls._from_names(values, f"{name}_") for name in known}
        return replace(cls._from_names(values, ""), sets=sets)

    @classmethod
    def _from_names(cls, values: Mapping[str, Any], prefix: str) -> EvalResult:
        figures = {name: values[f"{prefix}{name}"] for name in FIGURES}
        means = {name: math.nan for name in ("loss", "perplexity") if figures[name] is None}
        return cls(**figures | means | {"tokens": int(figures["tokens"] or 0)})


FIGURES = [entry.name for entry in fields(EvalResult) if entry.name != "sets"]


@torch.no_grad()
def evaluate(
    model: Any,
    sets: Mapping[str, Any],
    collator: Any,
    *,
    batch_size: int,
    accelerator: Any,
    record: Any = None,
    on_batch: Callable[[], None] | None = None,
) -> EvalResult:
    """Evaluate a model; its mode and every random generator are as they were afterwards.

    A model that is compiled is run as it is without: its graphs are for the shapes of training. The
    loss is the language model's alone, without the balance of experts that some train on too.

    Args:
        model: The prepared model.
        sets: Rows with input_ids and labels by the name of their set, at least one of which has a
            label; one set alone may have the name "".
        collator: Makes a padded batch of rows.
        batch_size: Rows of a batch on each process; the result does not depend on it.
        accelerator: Of the run; the rows are shared among its processes.
        record: A PatchRecord that counts the calls of the first batch.
        on_batch: Called after each batch of this process.
    """
    model = accelerator.unwrap_model(model)
    sums_of = _SumsOf(model, collator, batch_size, accelerator, on_batch)
    was_training = model.training
    model.eval()
    try:
        with kept_random_state(accelerator.device):
            found = {}
            for name, examples in sets.items():
                found[name] = sums_of(examples, record)
                record = None
    finally:
        model.train(was_training)
    named = {name: _result(sums) for name, sums in found.items() if name}
    return replace(_result(sum(found.values())), sets=named)


def evaluate_inputs(
    config: RunConfig, model: Any, inputs: Inputs, accelerator: Any, **options: Any
) -> EvalResult:
    """Evaluate a model on the evaluation sets of a run.

    Args:
        config: The run; gives the rows of a batch.
        model: The prepared model.
        inputs: The sets and their collator.
        accelerator: Of the run.
        options: `record` and `on_batch` of evaluate.

    Raises:
        OutOfMemory: The batches are too large; with the flag that makes them smaller.
    """
    try:
        return evaluate(
            model,
            inputs.eval,
            inputs.collator,
            batch_size=config.per_device_eval_batch_size,
            accelerator=accelerator,
            **options,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise evaluation_out_of_memory(error, config) from error
        raise


def _result(sums: Any) -> EvalResult:
    loss_sum, correct, entropy, num_labels = sums.tolist()
    mean = loss_sum / num_labels
    is_known = math.isfinite(correct)
    return EvalResult(
        loss=mean,
        perplexity=math.inf if mean > 700 else math.exp(mean),
        token_accuracy=correct / num_labels if is_known else None,
        entropy=entropy / num_labels if is_known else None,
        tokens=int(num_labels),
    )


class _SumsOf:
    """Sums over the labels of a set: loss, right tokens, entropy, and how many they are."""

    def __init__(
        self,
        model: Any,
        collator: Any,
        batch_size: int,
        accelerator: Any,
        on_batch: Callable[[], None] | None,
    ) -> None:
        self._model = model
        self._collator = collator
        self._batch_size = batch_size
        self._accelerator = accelerator
        self._on_batch = on_batch
        self._loss_of = LossOf(model, accelerator.device)
        self._options = _options(model)

    def __call__(self, examples: Any, record: Any) -> torch.Tensor:
        accelerator, size = self._accelerator, self._batch_size
        rows = range(accelerator.process_index, len(examples), accelerator.num_processes)
        windows = [[list(rows[i : i + size])] for i in range(0, len(rows), size)]
        sums = torch.zeros(4, dtype=torch.float64)
        for i, [batch] in enumerate(load_windows(examples, iter(windows), self._collator)):
            is_counted = record is not None and i == 0
            with record.count_calls() if is_counted else contextlib.nullcontext():
                sums += self._batch(batch)
            if self._on_batch is not None:
                self._on_batch()
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return sums

    def _batch(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        uncompiled = functools.partial(nn.Module._call_impl, self._model)
        with _RecordedLosses() as noted:
            loss = self._loss_of(uncompiled, batch, 1, **self._options)
        num_labels = count_labels(batch)
        stats = sum((_token_sums(*call) for call in noted.calls), torch.zeros(3))
        correct, entropy, num_noted = stats.tolist()
        if num_noted != num_labels:
            correct = entropy = math.nan
        return torch.tensor([float(loss), correct, entropy, num_labels], dtype=torch.float64)


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
