"""The losses under the names of liger_kernel, in their functional forms. Each is one op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from liger_kernels import ops
from liger_kernels.compat.arguments import refuse
from liger_kernels.compat.loss_results import CrossEntropyOutput, LossTerms, Wanted
from liger_kernels.ops.fused_linear_cross_entropy import linear_ref
from liger_kernels.ops.losses.options import IGNORE_INDEX, inverse_of_mean, wide_dtype

__all__ = ["liger_cross_entropy", "liger_fused_linear_cross_entropy"]


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Return ops.cross_entropy with the arguments of torch.nn.functional.cross_entropy.

    Args:
        input: (V,), (N, V) or (N, V, ...) logits, classes second as in torch. The loss has their
            dtype, but under autocast it is fp32, as in torch.
        target: Labels: input's shape without the classes.
        weight: (V,) class weights; a mean divides by the sum of the labels' weights.
        size_average: Must be None, as reduce: reduction replaced both.
        ignore_index: As ops.cross_entropy takes it; so are label_smoothing, softcap, reduction.
        reduce: See size_average.
        reduction: "mean", "sum" or "none".
        label_smoothing: From 0 to 1.
        lse_square_scale: z_loss of ops.cross_entropy, but a mean divides it by the number of
            labels, also where there are class weights.
        softcap: Cap of the logits, or None.
        return_z_loss: Return a CrossEntropyOutput that has it.
        return_token_accuracy: As return_z_loss.
        return_predicted_tokens: As return_z_loss.

    Raises:
        ValueError: As ops.cross_entropy, or an argument that must be left alone is set.
    """
    _refuse_replaced(size_average=size_average, reduce=reduce)
    wanted = Wanted(return_z_loss, return_token_accuracy, return_predicted_tokens)
    terms = LossTerms(weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction)
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    loss = _of_logits(logits, target, terms)
    loss = loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)
    rows = logits.reshape(-1, logits.shape[-1])
    return wanted.beside(loss, terms, rows, target, lambda part: part)


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    *,
    normalizer: int | Tensor | None = None,
) -> Tensor | CrossEntropyOutput:
    """Return ops.fused_linear_cross_entropy: the loss of input @ weight.T + bias, in fp32.

    Args:
        input: (..., H) hidden states.
        weight: (V, H) of the head.
        target: (...) labels.
        bias: (V,) of the head, or None.
        ce_weight: (V,) class weights, or None.
        ignore_index: As liger_cross_entropy takes it; so are the rest.
        lse_square_scale: As liger_cross_entropy takes it.
        label_smoothing: From 0 to 1.
        reduction: "mean", "sum" or "none".
        softcap: Cap of the logits, or None.
        return_z_loss: As liger_cross_entropy takes it; so are the other return_ arguments.
        accum_dtype: Must be None: the op chooses the dtype of its sums.
        use_token_scaling: Multiply each token's loss by the probability of its label, a constant.
        return_token_accuracy: See return_z_loss.
        return_predicted_tokens: See return_z_loss.
        normalizer: Divides the sum of a mean, and that of its z-loss, in place of the count.

    Raises:
        ValueError: As the op, or accum_dtype is set.
    """
    refuse("liger_fused_linear_cross_entropy", accum_dtype=accum_dtype)
    wanted = Wanted(return_z_loss, return_token_accuracy, return_predicted_tokens)
    terms = LossTerms(
        ce_weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction, normalizer
    )
    of_hidden = _scaled_by_probability if use_token_scaling else _of_hidden
    loss = of_hidden(
        input, weight, bias, target, _z_loss_per_label(terms, weight.shape[:1], input, target)
    )
    rows = input.reshape(-1, input.shape[-1])
    return wanted.beside(loss, terms, rows, target, lambda part: linear_ref(part, weight, bias))


def _refuse_replaced(**arguments: bool | None) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"liger_cross_entropy got {name}={value!r}; say it by reduction")


def _of_logits(logits: Tensor, target: Tensor, terms: LossTerms) -> Tensor:
    """Compute the loss of logits (..., V)."""
    terms = _z_loss_per_label(terms, logits.shape[-1:], logits, target)
    normalizer = terms.normalizer
    reduction = terms.reduction if normalizer is None else "sum"
    loss = ops.cross_entropy(
        logits, target, weight=terms.class_weight, reduction=reduction, **terms.of_op
    )
    return loss if normalizer is None else loss / normalizer


def _of_hidden(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: LossTerms
) -> Tensor:
    """Compute the loss of hidden states."""
    loss: Any = ops.fused_linear_cross_entropy(
        input,
        weight,
        target,
        bias=bias,
        class_weight=terms.class_weight,
        reduction=terms.reduction,
        normalizer=terms.normalizer,
        **terms.of_op,
    )
    return loss


def _scaled_by_probability(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: LossTerms
) -> Tensor:
    """Compute the loss with each token's times the probability of its label, which is a constant.

    Source: https://arxiv.org/abs/2508.05629, equation 8.
    """
    each = replace(terms, reduction="none", normalizer=None)
    losses = _of_hidden(input, weight, bias, target, each)
    with torch.no_grad():
        found = ops.fused_linear_logprobs(
            input,
            weight,
            target,
            bias=bias,
            ignore_index=terms.ignore_index,
            softcap=terms.softcap,
            outputs=("logprob",),
        )
    losses = losses * found.logprob.exp()
    if terms.reduction != "mean":
        return losses.sum() if terms.reduction == "sum" else losses
    if terms.normalizer is not None:
        return losses.sum() / terms.normalizer
    label = target.flatten().to(losses.device)
    inverse = inverse_of_mean(label, terms.ignore_index, terms.class_weight, losses.dtype)
    return losses.sum() * inverse


def _z_loss_per_label(
    terms: LossTerms, classes: torch.Size, input: Tensor, target: Tensor
) -> LossTerms:
    """Return terms by which a mean divides its z-loss by the number of labels.

    With class weights a mean divides the loss by the sum of the labels' weights, and the ops divide
    both by one number. So the number is that of the labels, and the weights are times labels / sum
    of the labels' weights.
    """
    is_mean = terms.reduction == "mean" and terms.normalizer is None
    if not (is_mean and terms.lse_square_scale and _fits(terms.class_weight, classes)):
        return terms
    dtype, label = wide_dtype(input.dtype), target.flatten().to(input.device)
    weight = terms.class_weight.to(input.device, dtype)
    of_sum = inverse_of_mean(label, terms.ignore_index, weight, dtype)
    of_count = inverse_of_mean(label, terms.ignore_index, None, dtype)
    return replace(
        terms, class_weight=weight * (of_sum / of_count), normalizer=of_count.reciprocal()
    )


def _fits(weight: Tensor | None, classes: torch.Size) -> TypeGuard[Tensor]:
    """Return whether there are class weights that the op takes; it refuses others by name."""
    return weight is not None and weight.shape == classes and weight.is_floating_point()
