"""The next token with a weight for every token: sums of weight x loss, without logits."""

from __future__ import annotations

from typing import Any

import torch

from liger_cli.data.batches import count_weight
from liger_cli.data.encode import WEIGHTS
from liger_cli.training.forward import balance_of, balance_weight
from liger_cli.training.objectives.objective import Batch
from liger_kernels.transformers import token_logprobs
from liger_kernels.transformers.wrappers import forward_parameters

__all__ = ["evaluated_sums", "weighted_loss"]


def weighted_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the sum over the labels of a batch of weight x loss, a scalar with a gradient.

    What a model adds to its own loss to balance its experts counts as much as all of them.

    Args:
        model: The model, or the prepared one around it.
        batch: A collated batch; without label_weights (B, T) each label has 1.
        device: Where the model is.
    """
    balance = balance_weight(model)
    found = _values(model, batch, device, ("logprob", "aux_loss"), balances=balance > 0)
    loss = -_weighted_sum(found.logprob, batch)
    return loss + balance * balance_of(found.aux_loss, count_weight(batch), loss)


def evaluated_sums(model: Any, batch: Batch, device: torch.device) -> tuple[float, float, float]:
    """Return the sums of weight x loss, of right tokens and of entropies over the labels."""
    # The graphs of a model that is compiled are for the shapes of training.
    with torch.compiler.set_stance("force_eager"):
        found = _values(model, batch, device, ("logprob", "entropy", "correct"))
    entropy = found.entropy.sum(dtype=torch.float64)
    return -float(_weighted_sum(found.logprob, batch)), float(found.correct.sum()), float(entropy)


def _values(
    model: Any,
    batch: Batch,
    device: torch.device,
    outputs: tuple[str, ...],
    *,
    balances: bool = False,
) -> Any:
    left_out = ("labels", "num_tokens", WEIGHTS)
    inputs = {
        key: value.to(device, non_blocking=True) if hasattr(value, "to") else value
        for key, value in batch.items()
        if key not in left_out
    }
    if "output_router_logits" in forward_parameters(model):
        inputs["output_router_logits"] = balances
    return token_logprobs(model, inputs, batch["labels"].to(device), outputs=outputs)


def _weighted_sum(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    # Where there is no label the value is 0.
    if WEIGHTS not in batch:
        return values.sum(dtype=torch.float64)
    weights = batch[WEIGHTS][:, 1:].to(values.device, non_blocking=True)
    return (weights * values).sum(dtype=torch.float64)
