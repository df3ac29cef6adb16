"""The next token with a weight for every token: sums of weight x loss, without logits."""

from __future__ import annotations

from typing import Any

import torch

from liger_cli.data.encode import WEIGHTS
from liger_cli.errors import ConfigError
from liger_cli.training.objectives.objective import Batch
from liger_kernels.transformers import token_logprobs
from liger_kernels.transformers.wrappers import forward_parameters, inner_model

__all__ = ["evaluated_sums", "weighted_loss"]


def weighted_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the sum over the labels of a batch of weight x loss, a scalar with a gradient.

    Args:
        model: The model, or the prepared one around it.
        batch: A collated batch; without label_weights (B, T) each label has 1.
        device: Where the model is.

    Raises:
        ConfigError: The model adds the balance of its experts to its own loss.
    """
    config = inner_model(model).config
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            "loss weights are not for a model whose loss has the balance of its experts too "
            "(output_router_logits is true in its configuration)"
        )
    return -_weighted_sum(_values(model, batch, device, ("logprob",)).logprob, batch)


def evaluated_sums(model: Any, batch: Batch, device: torch.device) -> tuple[float, float, float]:
    """Return the sums of weight x loss, of right tokens and of entropies over the labels."""
    # The graphs of a model that is compiled are for the shapes of training.
    with torch.compiler.set_stance("force_eager"):
        found = _values(model, batch, device, ("logprob", "entropy", "correct"))
    entropy = found.entropy.sum(dtype=torch.float64)
    return -float(_weighted_sum(found.logprob, batch)), float(found.correct.sum()), float(entropy)


def _values(model: Any, batch: Batch, device: torch.device, outputs: tuple[str, ...]) -> Any:
    left_out = ("labels", "num_tokens", WEIGHTS)
    inputs = {
        key: value.to(device, non_blocking=True) if hasattr(value, "to") else value
        for key, value in batch.items()
        if key not in left_out
    }
    if "output_router_logits" in forward_parameters(model):
        inputs["output_router_logits"] = False
    return token_logprobs(model, inputs, batch["labels"].to(device), outputs=outputs)


def _weighted_sum(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    # Where there is no label the value is 0.
    if WEIGHTS not in batch:
        return values.sum(dtype=torch.float64)
    weights = batch[WEIGHTS][:, 1:].to(values.device, non_blocking=True)
    return (weights * values).sum(dtype=torch.float64)
