"""Log-probabilities of a causal model's tokens, without logits where the head is patched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liger_kernels.ops.arguments import Choices
from liger_kernels.ops.fused_linear_logprobs import LOGPROB_OUTPUTS, TEMPERATURE, named_outputs
from liger_kernels.ops.losses.options import IGNORE_INDEX
from liger_kernels.transformers.lazy_logits.head import is_head_patched
from liger_kernels.transformers.lazy_logits.logprobs import (
    ARGUMENT,
    HeadRequest,
    LogprobRequest,
    warn_of_logits,
)
from liger_kernels.transformers.wrappers import forward_takes, inner_model

__all__ = ["call_for", "shifted", "token_logprobs"]

_AUX_LOSS = "aux_loss"
_OUTPUTS = Choices("outputs", (*LOGPROB_OUTPUTS, _AUX_LOSS))


def token_logprobs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logprob",),
) -> Any:
    """Compute the log-probability of each label, and more, as the model gives them.

    Calls model(**inputs) once, so that the hooks of DDP and FSDP run, and computes the values
    inside of that forward: with a patched head no logits are made, whether it trains or not, with a
    softcap, a scale, a bias, an adapter on it, tied, or under torch.compile. Where logits are made
    all the same a warning says why.

    Args:
        model: A causal model of transformers, or what wraps it: PEFT, DDP, FSDP, torch.compile.
        inputs: The arguments of forward, without labels.
        labels: (B, T) int64, not shifted: the label at t is the token at t, which the logits at
            t - 1 are of. -100 is left out, before the head's product.
        temperature: Divides the logits after the model's scale and softcap; positive and finite.
        outputs: Some of logprob, entropy (both differentiable), logsumexp, correct and mean_logit,
            as fused_linear_logprobs has them; and aux_loss, the model's measure of how evenly its
            experts are used.

    Returns:
        A named tuple of tensors (B, T - 1), fp32 (correct: bool), with the fields that were asked
        for in their order. The value at t is of the label at t + 1, 0 where that is -100. aux_loss
        is a scalar, differentiable, or None where the forward returns none: it does with
        output_router_logits, in inputs or in the configuration of a mixture of experts.

    Raises:
        ValueError: An argument is of another type, shape or value; inputs hold labels; the model
            is an encoder with a decoder, or makes logits of another length than labels.
    """
    request = _request_of(inputs, labels, temperature, outputs)
    values, aux_loss = call_for(model, inputs, request)
    found = iter(values)
    return named_outputs(
        tuple(outputs), [aux_loss if x == _AUX_LOSS else next(found)[:, :-1] for x in outputs]
    )


def call_for(model: nn.Module, inputs: Mapping[str, Any], request: HeadRequest) -> tuple[Any, Any]:
    """Call a causal model for what a request asks of its head, in place of logits.

    Returns:
        The answer to the request, and the aux_loss that the model has for its experts, or None.
    """
    inner = inner_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model must be a causal language model, got {type(inner).__name__}, whose "
            "decoder has other inputs"
        )
    options: dict[str, Any] = {}
    if "use_cache" not in inputs and forward_takes(model, "use_cache"):
        # Keys and values kept for generation would cost memory.
        options["use_cache"] = False
    if is_head_patched(inner):
        options[ARGUMENT] = request
    out = model(**inputs, **options)
    values = out[0] if isinstance(out, tuple) else out["logits"]
    if ARGUMENT not in options:
        warn_of_logits("the model's head is not patched, see apply_liger_kernel")
        values = request.of_real(values)
    return values, getattr(out, _AUX_LOSS, None)


def _request_of(
    inputs: Mapping[str, Any], labels: Any, temperature: Any, outputs: Any
) -> LogprobRequest:
    names, temperature = _OUTPUTS.of(outputs), TEMPERATURE.of(temperature)
    names = tuple(name for name in names if name != _AUX_LOSS)
    if not names:
        raise ValueError(f"outputs must have a value of each label beside {_AUX_LOSS}")
    return LogprobRequest(shifted(inputs, labels), temperature, names)


def shifted(inputs: Mapping[str, Any], labels: Any) -> torch.Tensor:
    """Return the labels (B, T) at the positions whose logits they are of, -100 at the last.

    Raises:
        ValueError: They are no int64 (B, T), or inputs hold labels.
    """
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.dim() != 2:
        found = f"{labels.dtype} {tuple(labels.shape)}" if hasattr(labels, "dtype") else labels
        raise ValueError(f"labels must be int64 (B, T), got {found!r}")
    given = [name for name in ("labels", "shift_labels") if name in inputs]
    if given:
        raise ValueError(
            f"inputs must not hold {given[0]}: pass them as labels, or the model computes a loss"
        )
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
