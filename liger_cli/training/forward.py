"""The model's own loss of a batch, through the arguments that its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from liger_cli.data.batches import count_labels
from liger_kernels.transformers.wrappers import forward_parameters, inner_model

__all__ = ["LossOf", "balance_of", "balance_weight"]


class LossOf:
    """Computes the part of a batch in a loss that is a mean over the tokens of several batches.

    Args:
        model: The model before it is prepared: wrappers may hide its signature.
        device: Where batches go.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        parameters = forward_parameters(model)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        # Models that take the keyword and ignore it say so with this attribute; not all do.
        self._counts_items = getattr(
            inner_model(model),
            "accepts_loss_kwargs",
            takes_any and _leaves_loss_to_transformers(model),
        )
        self._balance_weight = balance_weight(model)
        # Keys and values kept for generation would cost memory in every step.
        self._options = {"use_cache": False} if "use_cache" in parameters else {}
        self._device = device

    def __call__(
        self, model: Any, batch: Mapping[str, Any], num_labels: int, **options: Any
    ) -> torch.Tensor:
        """Return the sum over the labels of the batch, divided by num_labels.

        Args:
            model: The model, or the prepared one around it.
            batch: A collated batch.
            num_labels: Labels of everything the loss is a mean of; 0 counts as 1.
            options: For the model's forward.
        """
        own_labels = count_labels(batch)
        inputs: dict[str, Any] = {
            # The longest document is a number that the host knows.
            key: value.to(self._device, non_blocking=True) if hasattr(value, "to") else value
            for key, value in batch.items()
            if key != "num_tokens"
        }
        inputs |= {**self._options, **options}
        num_labels = max(num_labels, 1)
        if self._counts_items:
            out = model(**inputs, num_items_in_batch=num_labels)
            balance = getattr(out, "aux_loss", None)
            if not isinstance(balance, torch.Tensor):
                return out.loss
            # transformers adds it whole for each batch, and it is to be a mean over all labels too.
            surplus = self._balance_weight * (1.0 - own_labels / num_labels)
            return out.loss - surplus * balance.to(out.loss.device)
        if own_labels == 0:
            # The mean of no labels is NaN; this is 0, and has a gradient.
            del inputs["labels"]
            return model(**inputs).logits.sum() * 0.0
        return model(**inputs).loss * (own_labels / num_labels)


def balance_weight(model: Any) -> float:
    """Return the weight that aux_loss, the balance of its experts, has in the loss of a model."""
    settings = inner_model(model).config.get_text_config()
    if not getattr(settings, "output_router_logits", False):
        return 0.0
    return float(getattr(settings, "router_aux_loss_coef", 0.0) or 0.0)


def balance_of(aux_loss: Any, share: float, loss: torch.Tensor) -> torch.Tensor:
    """Return the part of a batch in the balance of experts over a step, a scalar like the loss.

    Args:
        aux_loss: The model's for this batch; None where its forward has none, and counts as 0.
        share: Of the batch in everything that the step is a mean of.
        loss: Scalar, with the dtype and the device to take.
    """
    return loss.new_zeros(()) if aux_loss is None else aux_loss.to(loss) * share


def _leaves_loss_to_transformers(model: Any) -> bool:
    """Return whether forward calls the loss that divides by num_items_in_batch, or reads it."""
    code = inspect.unwrap(type(inner_model(model)).forward).__code__
    names = {*code.co_names, *code.co_varnames, *code.co_consts}
    return bool(names & {"loss_function", "num_items_in_batch"})
