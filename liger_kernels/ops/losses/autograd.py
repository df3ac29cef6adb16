"""Autograd of a linear loss: gradients computed in forward, or recomputed in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.losses.grads_in_forward import (
    backward_grad_scale,
    forward_grad_scale,
    second_backward_error,
)
from liger_kernels.ops.losses.label_count import count_labels, is_capturing
from liger_kernels.ops.losses.linear_loss import LinearGradients, LinearLossCall, sweep
from liger_kernels.ops.losses.options import LossOptions, wide_dtype

Tensors = tuple[Tensor, ...]


def total_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearLossCall, inverse: Tensor
) -> tuple[Tensors, LinearGradients]:
    """Return call.outputs, the losses summed times inverse, and unscaled gradients."""
    coef = forward_grad_scale(inverse, call.compute_dtype).expand(call.label.shape)
    found, grads = sweep(
        hidden, weight, bias, call, outputs=call.outputs, coef=coef, needs=call.needs
    )
    found["loss"] = found["loss"].sum() * inverse
    return tuple(found.values()), grads


def per_token_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: LinearLossCall,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return gradients of hidden, weight and bias from those of each token's loss and entropy."""
    factor = torch.ones((), dtype=wide_dtype(call.compute_dtype), device=weight.device)
    if coef is None:
        coef = torch.zeros_like(factor).expand(call.label.shape)
    if call.compute_dtype == torch.float16 and coef.numel():
        # fp16 keeps numbers about 1 best: the largest is taken out, and put back at the end.
        both = torch.stack([c.abs().amax() for c in (coef, entropy_coef) if c is not None])
        factor = both.amax()
        factor = factor.masked_fill(factor == 0.0, 1.0)
        coef = coef / factor
        entropy_coef = None if entropy_coef is None else entropy_coef / factor
    _, grads = sweep(
        hidden, weight, bias, call, coef=coef, entropy_coef=entropy_coef, needs=call.needs
    )
    return grads.times(factor, _dtypes(hidden, weight, bias))


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)


@differentiable_once("fused_linear_cross_entropy")
class TotalLoss(torch.autograd.Function):
    """A sum or a mean: gradients are computed in forward, and backward returns them scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearLossCall,
        inverse: Tensor,
    ) -> Tensors:
        outputs, ctx.grads = total_fwd(hidden, weight, bias, call, inverse)
        ctx.inverse, ctx.compute_dtype = inverse, call.compute_dtype
        ctx.dtypes = _dtypes(hidden, weight, bias)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None):
        if dy is None:
            return None, None, None, None, None
        if ctx.grads is None:
            raise second_backward_error("fused_linear_cross_entropy")
        grads, ctx.grads = ctx.grads, None
        factor = backward_grad_scale(dy, ctx.inverse, ctx.compute_dtype)
        return *grads.times(factor, ctx.dtypes), None, None


@differentiable_once("a loss per token")
class PerTokenLoss(torch.autograd.Function):
    """Values of each token: backward recomputes the logits, as often as it runs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LinearLossCall,
    ) -> Tensors:
        found, _ = sweep(hidden, weight, bias, call, outputs=call.outputs)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.call = call
        fixed = (value for name, value in found.items() if name not in call.differentiable)
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        return tuple(found.values())

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None):
        given = dict(zip(ctx.call.outputs, dys, strict=True))
        coef, entropy_coef = given["loss"], given.get("entropy")
        hidden, weight, bias = ctx.saved_tensors
        return *per_token_bwd(hidden, weight, bias, ctx.call, coef, entropy_coef), None


# torch.compile does not look into an operator: inside, chunks and kernels run as in eager code.


def _rebuilt(label, class_weight, options, compute_dtype, outputs, needs):
    """Rebuild the call from an operator's arguments; the host waits for the label count here."""
    count = None
    if options.ignore_index is not None and not is_capturing(label):
        count = count_labels(label, options.ignore_index)
    return LinearLossCall(
        label, options, compute_dtype, tuple(outputs.split()), (), tuple(needs), class_weight, count
    )


def _grad_dtypes(weight, compute_dtype):
    """Return dtypes that hold gradients before backward_grad_scale, whatever the labels."""
    wide = wide_dtype(compute_dtype)
    is_final = weight.dtype == compute_dtype != torch.float16
    return compute_dtype, compute_dtype if is_final else wide, wide


@torch.library.custom_op("liger_kernels::head_loss", mutates_args=())
def _head_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    class_weight: Tensor | None,
    inverse: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float,
    compute_dtype: torch.dtype,
    outputs: str,
    differentiable: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the outputs, and of a sum or mean also the gradients that are needed."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, scale)
    call = _rebuilt(label, class_weight, options, compute_dtype, outputs, needs)
    if inverse is None:
        return list(sweep(hidden, weight, bias, call, outputs=call.outputs)[0].values())
    values, grads = total_fwd(hidden, weight, bias, call, inverse)
    dtypes = _grad_dtypes(weight, compute_dtype)
    made = grads.times(torch.ones_like(inverse), dtypes)
    return [*values, *(grad for grad in made if grad is not None)]


@_head_loss_op.register_fake
def _(hidden, weight, bias, label, class_weight, inverse, *rest):
    *_, compute_dtype, outputs, _, needs = rest
    wide = wide_dtype(compute_dtype)
    values = [
        label.new_empty(
            () if name == "loss" and inverse is not None else label.shape,
            dtype=torch.int64 if name == "best" else wide,
        )
        for name in outputs.split()
    ]
    if inverse is None:
        return values
    dtypes = _grad_dtypes(weight, compute_dtype)
    for tensor, dtype, is_needed in zip((hidden, weight, bias), dtypes, needs, strict=True):
        if is_needed:
            values.append(torch.empty(tensor.shape, dtype=dtype, device=tensor.device))
    return values


@torch.library.custom_op("liger_kernels::head_loss_backward", mutates_args=())
def _head_loss_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    class_weight: Tensor | None,
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, scale)
    call = _rebuilt(label, class_weight, options, compute_dtype, "", needs)
    grads = per_token_bwd(hidden, weight, bias, call, coef, entropy_coef)
    return [grad for grad in grads if grad is not None]


@_head_loss_backward_op.register_fake
def _(hidden, weight, bias, *rest):
    tensors = zip((hidden, weight, bias), rest[-1], strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, needed in tensors if needed]


def _setup(ctx, inputs, output):
    hidden, weight, bias, label, class_weight, inverse, *ctx.options = inputs
    *ctx.options, outputs, differentiable, ctx.needs = ctx.options
    ctx.outputs, ctx.differentiable = outputs.split(), differentiable.split()
    ctx.is_per_token = inverse is None
    ctx.dtypes = _dtypes(hidden, weight, bias)
    if inverse is None:
        ctx.save_for_backward(hidden, weight, bias, label, class_weight)
    else:
        ctx.save_for_backward(inverse, *output[len(ctx.outputs) :])


def _backward(ctx, dys):
    given = {k: dy for k, dy in zip(ctx.outputs, dys, strict=False) if k in ctx.differentiable}
    if ctx.is_per_token:
        coefs = given["loss"], given.get("entropy")
        made = _head_loss_backward_op(*ctx.saved_tensors, *coefs, *ctx.options, ctx.needs)
    else:
        inverse, *made = ctx.saved_tensors
        factor = backward_grad_scale(given["loss"], inverse, ctx.options[-1])
        made = [grad * factor for grad in made]
    made = iter(made)
    grads = [next(made) if is_needed else None for is_needed in ctx.needs]
    grads = [g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
    return *grads, *[None] * 12


_head_loss_op.register_autograd(_backward, setup_context=_setup)


def compiled(hidden, weight, bias, call, inverse):
    """Return call.outputs inside a graph of torch.compile."""
    o = call.options
    fields = (o.ignore_index, o.label_smoothing, o.z_loss, o.softcap, o.scale, call.compute_dtype)
    found = _head_loss_op(
        hidden, weight, bias, call.label, call.class_weight, inverse, *fields,
        " ".join(call.outputs), " ".join(call.differentiable), list(call.needs),
    )  # fmt: skip
    named = zip(call.outputs, found, strict=False)
    return [value if k in call.differentiable else value.detach() for k, value in named]
