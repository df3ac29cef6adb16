"""Loss, perplexity and token accuracy over all tokens with a label, whatever the batches.

The loss comes from the model's own forward, told to make no logits where its head is patched. The
accuracy comes from the head's input, recorded on its way in: a few rows at a time go through the
head once more, those with a label only. Scaling and capping logits does not change the largest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_cli.training.batches import IGNORED, count_labels, load_windows
from liger_cli.training.forward import LossOf
from liger_kernels.transformers.pending_logits import is_lazy_head

__all__ = ["EvalResult", "evaluate"]

# Logits made at a time: 256 MiB in float32.
_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class EvalResult:
    """Means over `tokens` tokens with a label; token_accuracy is None where there is no head."""

    loss: float
    perplexity: float
    token_accuracy: float | None
    tokens: int


@torch.no_grad()
def evaluate(
    model: Any,
    examples: Any,
    collator: Any,
    *,
    batch_size: int,
    accelerator: Any,
    record: Any = None,
) -> EvalResult:
    """Evaluates a model and leaves it in the mode it was in.

    Args:
        model: The prepared model.
        examples: Rows with input_ids and labels, at least one of which has a label.
        collator: Makes a padded batch of rows.
        batch_size: Rows of a batch on each process; the result does not depend on it.
        accelerator: Of the run; the rows are shared among its processes.
        record: A PatchRecord that counts the calls of the first batch.
    """
    device = accelerator.device
    model = accelerator.unwrap_model(model)
    loss_of = LossOf(model, device)
    head = model.get_output_embeddings()
    options = {"skip_logits": True} if head is not None and is_lazy_head(head) else {}
    rows = range(accelerator.process_index, len(examples), accelerator.num_processes)
    windows = [[list(rows[i : i + batch_size])] for i in range(0, len(rows), batch_size)]
    sums = torch.zeros(3, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for i, [batch] in enumerate(load_windows(examples, iter(windows), collator)):
            is_counted = record is not None and i == 0
            with (
                record.count_calls() if is_counted else contextlib.nullcontext(),
                _inputs_of(head) as hidden,
            ):
                loss = loss_of(model, batch, 1, **options)
            with accelerator.autocast():
                num_correct = _num_correct(head, hidden, batch["labels"])
            sums += torch.tensor([float(loss), num_correct, count_labels(batch)])
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(device), "sum").cpu()
    loss_sum, correct, num_labels = sums.tolist()
    mean = loss_sum / num_labels
    return EvalResult(
        loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        token_accuracy=None if head is None else correct / num_labels,
        tokens=int(num_labels),
    )


@contextlib.contextmanager
def _inputs_of(head: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Records what the head is given."""
    inputs: list[torch.Tensor] = []
    if head is None:
        yield inputs
        return
    handle = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _num_correct(head: Any, inputs: list[torch.Tensor], labels: torch.Tensor) -> int:
    """How many labels have the largest logit."""
    if head is None:
        return 0
    hidden = inputs[-1][:, :-1]
    target = labels[:, 1:].to(hidden.device)
    is_label = target != IGNORED
    hidden, target = hidden[is_label], target[is_label]
    size = max(1, _CHUNK_ELEMENTS // head.out_features)
    pairs = zip(hidden.split(size), target.split(size), strict=True)
    return sum(int((head(rows).argmax(-1) == ids).sum()) for rows, ids in pairs)
