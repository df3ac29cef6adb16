"""The losses under the names of liger_kernel: functional forms, and their further results.

A loss alone is one op. z-loss, accuracy and predicted tokens are read off a second pass over the
logits in chunks, which has no gradient, and are computed only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from liger_kernels import ops
from liger_kernels.compat.arguments import refuse
from liger_kernels.ops.fused_linear_cross_entropy import linear_ref
from liger_kernels.ops.losses.options import IGNORE_INDEX, inverse_of_mean, wide_dtype

__all__ = [
    "CrossEntropyOutput",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
]

# Logits of one chunk of the second pass: 64 MiB in fp32.
_CHUNK_LOGITS = 2**24
_IGNORED_TOKEN = -1


@dataclass(frozen=True)
class CrossEntropyOutput:
    """A loss and what was asked for beside it, in this order; the rest is None.

    Args:
        loss: The loss, with the z-loss.
        z_loss: lse_square_scale * logsumexp^2, reduced as the loss; no gradient.
        token_accuracy: Share of the labels that have the largest logit, fp32; for reduction "none"
            1 or 0 of each token, 0 where ignored.
        predicted_tokens: int64 classes with the largest logit, -1 where ignored, in target's shape.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


@dataclass(frozen=True)
class _Wanted:
    """The further results of a loss that a caller asks for, and the options that they depend on."""

    z_loss: bool
    token_accuracy: bool
    predicted_tokens: bool
    lse_square_scale: float
    softcap: float | None
    ignore_index: int
    reduction: str
    normalizer: int | Tensor | None = None

    def beside(
        self, loss: Tensor, rows: Tensor, target: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Tensor | CrossEntropyOutput:
        """Compute the results for rows (N, ...), of which head makes logits (n, V)."""
        if not (self.z_loss or self.token_accuracy or self.predicted_tokens):
            return loss
        lse, best = _largest(rows, head, self.softcap)
        label = target.reshape(-1).to(best.device)
        valid = label != self.ignore_index
        z_loss = (self.lse_square_scale * lse.square()).masked_fill(~valid, 0)
        correct = ((best == label) & valid).float()
        count = valid.sum().clamp(min=1)
        return CrossEntropyOutput(
            loss,
            self._reduced(z_loss, count if self.normalizer is None else self.normalizer, target)
            if self.z_loss
            else None,
            self._accuracy(correct, count, target) if self.token_accuracy else None,
            best.masked_fill(~valid, _IGNORED_TOKEN).view(target.shape)
            if self.predicted_tokens
            else None,
        )

    def _reduced(self, values: Tensor, count: Any, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return values.view(target.shape)
        return values.sum() if self.reduction == "sum" else values.sum() / count

    def _accuracy(self, correct: Tensor, count: Tensor, target: Tensor) -> Tensor:
        return correct.view(target.shape) if self.reduction == "none" else correct.sum() / count


@torch.no_grad()
def _largest(
    rows: Tensor, head: Callable[[Tensor], Tensor], softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Compute the logsumexp and the largest class of each row's logits, chunk by chunk."""
    width = head(rows[:1]).shape[-1]
    parts = []
    for part in rows.split(max(1, _CHUNK_LOGITS // width)):
        logits = head(part)
        logits = logits.to(wide_dtype(logits.dtype))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        parts.append((logits.logsumexp(-1), logits.argmax(-1)))
    lse, best = zip(*parts, strict=True)
    return torch.cat(lse), torch.cat(best)


def _weights_per_label(
    weight: Tensor, input: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return class weights times labels / sum of the labels' weights, and 1 / labels.

    A mean divides the weighted loss by the sum of the labels' weights, but the z-loss by the number
    of labels. With these weights both are divided by the number of labels.
    """
    dtype, label = wide_dtype(input.dtype), target.flatten().to(input.device)
    weight = weight.to(input.device, dtype)
    of_sum = inverse_of_mean(label, ignore_index, weight, dtype)
    of_count = inverse_of_mean(label, ignore_index, None, dtype)
    return weight * (of_sum / of_count), of_count


def _fits(weight: Tensor | None, shape: torch.Size) -> TypeGuard[Tensor]:
    """Return whether there are class weights that the op takes; it refuses others by name."""
    return weight is not None and weight.shape == shape and weight.is_floating_point()


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
    if size_average is not None or reduce is not None:
        name, value = ("reduce", reduce) if size_average is None else ("size_average", size_average)
        raise ValueError(f"liger_cross_entropy got {name}={value!r}; say it by reduction")
    wanted = _Wanted(
        return_z_loss,
        return_token_accuracy,
        return_predicted_tokens,
        lse_square_scale,
        softcap,
        ignore_index,
        reduction,
    )
    logits, factor = input.movedim(1, -1) if input.dim() > 2 else input, None
    if reduction == "mean" and lse_square_scale and _fits(weight, logits.shape[-1:]):
        weight, factor = _weights_per_label(weight, input, target, ignore_index)
        reduction = "sum"
    loss = ops.cross_entropy(
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        softcap=softcap,
        reduction=reduction,
    )
    loss = loss if factor is None else loss * factor
    loss = loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)
    return wanted.beside(loss, logits.reshape(-1, logits.shape[-1]), target, lambda part: part)


def _scaled_by_probability(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    normalizer: int | Tensor | None,
    reduction: str,
    options: dict[str, Any],
) -> Tensor:
    """Compute the loss with each token's times the probability of its label, which is a constant.

    Source: https://arxiv.org/abs/2508.05629, equation 8.
    """
    losses: Any = ops.fused_linear_cross_entropy(input, weight, target, reduction="none", **options)
    ignore_index = options["ignore_index"]
    with torch.no_grad():
        found = ops.fused_linear_logprobs(
            input,
            weight,
            target,
            bias=options["bias"],
            ignore_index=ignore_index,
            softcap=options["softcap"],
            outputs=("logprob",),
        )
    losses = losses * found.logprob.exp()
    if reduction != "mean":
        return losses.sum() if reduction == "sum" else losses
    if normalizer is not None:
        return losses.sum() / normalizer
    label, class_weight = target.flatten().to(losses.device), options["class_weight"]
    return losses.sum() * inverse_of_mean(label, ignore_index, class_weight, losses.dtype)


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
    wanted = _Wanted(
        return_z_loss,
        return_token_accuracy,
        return_predicted_tokens,
        lse_square_scale,
        softcap,
        ignore_index,
        reduction,
        normalizer,
    )
    is_mean = reduction == "mean" and normalizer is None
    if is_mean and lse_square_scale and _fits(ce_weight, weight.shape[:1]):
        ce_weight, inverse = _weights_per_label(ce_weight, input, target, ignore_index)
        normalizer = inverse.reciprocal()
    options: dict[str, Any] = {
        "bias": bias,
        "class_weight": ce_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": lse_square_scale,
        "softcap": softcap,
    }
    loss: Any
    if use_token_scaling:
        loss = _scaled_by_probability(input, weight, target, normalizer, reduction, options)
    else:
        loss = ops.fused_linear_cross_entropy(
            input, weight, target, reduction=reduction, normalizer=normalizer, **options
        )
    rows = input.reshape(-1, input.shape[-1])
    return wanted.beside(loss, rows, target, lambda part: linear_ref(part, weight, bias))
