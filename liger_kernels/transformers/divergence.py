"""Divergence of a causal model from a teacher, without logits where the heads are patched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from liger_kernels.ops.divergence import divergence_options
from liger_kernels.transformers.lazy_logits.divergence import (
    DivergenceRequest,
    DivergenceSums,
    TeacherRequest,
)
from liger_kernels.transformers.logprobs import call_for, shifted

__all__ = ["DivergenceSums", "token_divergence"]


def token_divergence(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    labels: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> DivergenceSums:
    """Add up the divergences of a model from its teacher at the tokens that have a label.

    Calls teacher(**inputs) without gradients and model(**inputs), once each, so that the hooks of
    DDP and FSDP run. With patched heads neither makes all logits.

    Args:
        model: A causal model of transformers, or what wraps it: PEFT, DDP, FSDP.
        teacher: Another with the same vocabulary, in evaluation mode; it may be on another device.
        inputs: The arguments of forward, without labels.
        labels: (B, T) int64, not shifted; -100 is left out, before the heads' products.
        beta: As fused_linear_divergence takes it: 0 forward KL, 1 reverse KL, Jensen-Shannon
            between.
        temperature: Divides both logits.

    Returns:
        Scalars: divergence, the sum over the labels in fp32, and nll, the sum of their negative
        log-likelihoods under the model in fp64; and aux_loss as token_logprobs has it, or None. All
        have a gradient in the model's parameters.

    Raises:
        ValueError: An argument is of another type, shape or value; the vocabularies differ; the
            model is an encoder with a decoder.
    """
    options = divergence_options(beta, temperature)
    target = shifted(inputs, labels)
    place = next(teacher.parameters()).device
    moved = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        known, _ = call_for(teacher, moved, TeacherRequest(target.to(place)))
    found, aux_loss = call_for(model, inputs, DivergenceRequest(target, known, options))
    return DivergenceSums(found.divergence, found.nll, aux_loss)
