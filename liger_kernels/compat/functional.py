"""The functional forms under the names of liger_kernel.transformers.functional.

Each maps onto one op. Tensors are positional where their names are not documented. Options that no
op has are refused: nothing here is accepted and dropped.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from liger_kernels import ops
from liger_kernels.ops.losses.options import IGNORE_INDEX, inverse_of_mean, wide_dtype

__all__ = [
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
    "liger_swiglu",
]

# What each casting mode is called here.
_CASTS = {"llama": "before_weight", "gemma": "after_weight"}


def cast_of(casting_mode: str) -> str:
    """Return the cast of ops.rms_norm for a casting mode.

    Raises:
        ValueError: The mode is unknown, or is "none", which rounds in every step.
    """
    if casting_mode not in _CASTS:
        allowed = " or ".join(map(repr, _CASTS))
        raise ValueError(f"casting_mode must be {allowed}, got {casting_mode!r}")
    return _CASTS[casting_mode]


def refuse(where: str, **options: Any) -> None:
    """Raise ValueError for the first option that is set: no op has it."""
    for name, value in options.items():
        if value not in (None, False):
            raise ValueError(f"{where} got {name}={value!r}, which liger_kernels does not have")


def liger_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    /,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = False,
) -> Tensor:
    """Return ops.rms_norm; "llama" rounds before the weight, "gemma" once at the end.

    Raises:
        ValueError: As ops.rms_norm; casting_mode is another, or in_place is asked for.
    """
    refuse("liger_rms_norm", in_place=in_place)
    return ops.rms_norm(x, weight, eps, offset=offset, cast=cast_of(casting_mode))


def liger_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, /, eps: float
) -> Tensor:
    """Return ops.layer_norm."""
    return ops.layer_norm(x, weight, bias, eps)


def liger_swiglu(gate: Tensor, up: Tensor, /) -> Tensor:
    """Return silu(gate) * up."""
    return ops.swiglu(gate, up)


def liger_geglu(gate: Tensor, up: Tensor, /) -> Tensor:
    """Return gelu(gate) * up, with the tanh form of gelu."""
    return ops.geglu(gate, up)


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return ops.rope: q and k turned by halves, as transformers' apply_rotary_pos_emb.

    Raises:
        ValueError: As ops.rope, or position_ids is given: cos and sin are those of the positions.
    """
    if position_ids is not None:
        raise ValueError("liger_rope got position_ids; give cos and sin of these positions instead")
    turned: Any = ops.rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return turned


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
) -> Tensor:
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
        return_z_loss: Must be False: the loss comes as one number.

    Raises:
        ValueError: As ops.cross_entropy, or an argument that must be left alone is set.
    """
    if size_average is not None or reduce is not None:
        name, value = ("reduce", reduce) if size_average is None else ("size_average", size_average)
        raise ValueError(f"liger_cross_entropy got {name}={value!r}; say it by reduction")
    refuse("liger_cross_entropy", return_z_loss=return_z_loss)
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
    return loss if torch.is_autocast_enabled(input.device.type) else loss.to(input.dtype)


def _fits(weight: Tensor | None, shape: torch.Size) -> TypeGuard[Tensor]:
    """Return whether there are class weights that the op takes; it refuses others by name."""
    return weight is not None and weight.shape == shape and weight.is_floating_point()


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
) -> Tensor:
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
        return_z_loss: Must be False.

    Raises:
        ValueError: As the op, or return_z_loss is set.
    """
    refuse("liger_fused_linear_cross_entropy", return_z_loss=return_z_loss)
    normalizer = None
    if reduction == "mean" and lse_square_scale and _fits(ce_weight, weight.shape[:1]):
        ce_weight, inverse = _weights_per_label(ce_weight, input, target, ignore_index)
        normalizer = inverse.reciprocal()
    loss: Any = ops.fused_linear_cross_entropy(
        input,
        weight,
        target,
        bias=bias,
        class_weight=ce_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        softcap=softcap,
        reduction=reduction,
        normalizer=normalizer,
    )
    return loss
