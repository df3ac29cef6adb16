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
from liger_kernels.ops.losses.row_loss_torch import Coefs, KeptRows

Tensors = tuple[Tensor, ...]
# Gradients that come in for the outputs below, in their order; None where there is none.
Given = tuple[Tensor | None, ...]
# Lse is the peak, without a gradient, and the logarithm of the sum, which has all of it.
_WITH_GRADIENT = ("loss", "entropy", "log_total")


def total_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearLossCall, inverse: Tensor
) -> tuple[Tensors, LinearGradients]:
    """Return call.outputs, the losses summed times inverse, and unscaled gradients."""
    coef = forward_grad_scale(inverse, call.compute_dtype).expand(call.label.shape)
    found, grads = sweep(hidden, weight, bias, call, outputs=call.outputs, coefs=Coefs(coef))
    found["loss"] = found["loss"].sum() * inverse
    return tuple(found.values()), grads


def keeps_gradient(call: LinearLossCall) -> bool:
    """Return whether forward computes the gradient of hidden, which backward scales by the token's.

    It costs a product where backward would need two, and takes the place of hidden between them.
    With an entropy, or a gradient of the weight, each token's factors are needed first.
    """
    return call.needs == (True, False, False) and call.differentiable == ("loss",)


def kept_names(call: LinearLossCall) -> tuple[str, ...]:
    """Return the outputs of loss_rows that backward needs where it recomputes the logits."""
    if not any(call.needs):
        return ()
    return KeptRows._fields if "entropy" in call.differentiable else KeptRows._fields[:2]


def per_token_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearLossCall
) -> tuple[Tensors, Tensors]:
    """Return call.outputs, and what backward needs: a gradient, kept rows, or nothing."""
    if keeps_gradient(call):
        coef = torch.ones((), dtype=wide_dtype(call.compute_dtype), device=weight.device)
        coefs = Coefs(coef.expand(call.label.shape))
        found, grads = sweep(hidden, weight, bias, call, outputs=call.outputs, coefs=coefs)
        assert grads.hidden is not None
        return tuple(found.values()), (grads.hidden,)
    kept = kept_names(call)
    names = tuple(dict.fromkeys((*call.outputs, *kept)))
    found, _ = sweep(hidden, weight, bias, call, outputs=names)
    # A copy, as an output may be changed in-place.
    rows = tuple(found[name].clone() if name in call.outputs else found[name] for name in kept)
    return tuple(found[name] for name in call.outputs), rows


def per_token_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: LinearLossCall,
    kept: Tensors,
    given: Given,
) -> tuple[Tensor | None, ...]:
    """Return gradients of hidden, weight and bias from those of each token's values."""
    coef, *others = given
    factor = torch.ones((), dtype=wide_dtype(call.compute_dtype), device=weight.device)
    if coef is None:
        coef = torch.zeros_like(factor).expand(call.label.shape)
    if call.compute_dtype == torch.float16 and coef.numel():
        # fp16 keeps numbers about 1 best: the largest is taken out, and put back at the end.
        all_ = torch.stack([c.abs().amax() for c in (coef, *others) if c is not None])
        factor = all_.amax()
        factor = factor.masked_fill(factor == 0.0, 1.0)
        coef = coef / factor
        others = [None if c is None else c / factor for c in others]
    coefs = Coefs(coef, *others)
    _, grads = sweep(hidden, weight, bias, call, coefs=coefs, kept=KeptRows(*kept))
    return grads.times(factor, _dtypes(hidden, weight, bias))


def scaled_rows(gradient: Tensor, coef: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of hidden (N, H) that forward computed times coef (N,), in dtype."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, coef[:, None], out=out)


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
        outputs, kept = per_token_fwd(hidden, weight, bias, call)
        ctx.keeps_gradient = keeps_gradient(call)
        inputs = () if ctx.keeps_gradient or not kept else (hidden, weight, bias)
        ctx.save_for_backward(*kept, *inputs)
        ctx.call, ctx.num_kept, ctx.dtype = call, len(kept), hidden.dtype
        named = zip(call.outputs, outputs, strict=True)
        fixed = (value for name, value in named if name not in call.differentiable)
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None):
        given = dict(zip(ctx.call.outputs, dys, strict=True))
        coefs: Any = tuple(map(given.get, _WITH_GRADIENT))
        if all(coef is None for coef in coefs):
            return None, None, None, None
        # Once: inside of a checkpoint a second reading raises.
        saved = ctx.saved_tensors
        kept, inputs = saved[: ctx.num_kept], saved[ctx.num_kept :]
        if ctx.keeps_gradient:
            return scaled_rows(kept[0], coefs[0], ctx.dtype), None, None, None
        hidden, weight, bias = inputs
        return *per_token_bwd(hidden, weight, bias, ctx.call, kept, coefs), None


# torch.compile does not look into an operator: inside, chunks and kernels run as in eager code.


def _rebuilt(label, class_weight, options, compute_dtype, names, needs, is_per_token=True):
    """Rebuild the call from an operator's arguments; the host waits for the label count here."""
    count = None
    if options.ignore_index is not None and not is_capturing(label):
        count = count_labels(label, options.ignore_index)
    outputs, differentiable = (tuple(words.split()) for words in names)
    return LinearLossCall(
        label, options, compute_dtype, outputs, differentiable, tuple(needs), class_weight, count,
        is_per_token,
    )  # fmt: skip


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
    names = outputs, differentiable
    is_per_token = inverse is None
    call = _rebuilt(label, class_weight, options, compute_dtype, names, needs, is_per_token)
    if inverse is None:
        values, kept = per_token_fwd(hidden, weight, bias, call)
        return [*values, *kept]
    values, grads = total_fwd(hidden, weight, bias, call, inverse)
    dtypes = _grad_dtypes(weight, compute_dtype)
    made = grads.times(torch.ones_like(inverse), dtypes)
    return [*values, *(grad for grad in made if grad is not None)]


@_head_loss_op.register_fake
def _(hidden, weight, bias, label, class_weight, inverse, *rest):
    *_, compute_dtype, outputs, differentiable, needs = rest
    wide = wide_dtype(compute_dtype)
    values = [
        label.new_empty(
            () if name == "loss" and inverse is not None else label.shape,
            dtype=torch.int64 if name == "best" else wide,
        )
        for name in outputs.split()
    ]
    if inverse is None:
        call = _rebuilt(label, None, LossOptions(), compute_dtype, (outputs, differentiable), needs)
        if keeps_gradient(call):
            return [*values, torch.empty_like(hidden, dtype=compute_dtype)]
        rows = kept_names(call)
        return [*values, *(label.new_empty(label.shape, dtype=wide) for _ in rows)]
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
    kept: list[Tensor],
    coef: Tensor | None,
    entropy_coef: Tensor | None,
    lse_coef: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, scale)
    call = _rebuilt(label, class_weight, options, compute_dtype, ("", ""), needs)
    given = coef, entropy_coef, lse_coef
    grads = per_token_bwd(hidden, weight, bias, call, tuple(kept), given)
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
    kept = output[len(ctx.outputs) :]
    ctx.keeps_gradient = inverse is None and len(kept) == 1
    if ctx.keeps_gradient:
        ctx.save_for_backward(*kept)
    elif inverse is None:
        ctx.save_for_backward(hidden, weight, bias, label, class_weight, *kept)
    else:
        ctx.save_for_backward(inverse, *kept)


def _backward(ctx, dys):
    given = {k: dy for k, dy in zip(ctx.outputs, dys, strict=False) if k in ctx.differentiable}
    coefs = tuple(map(given.get, _WITH_GRADIENT))
    if ctx.keeps_gradient:
        made = [scaled_rows(ctx.saved_tensors[0], coefs[0], ctx.dtypes[0])]
    elif ctx.is_per_token:
        saved = ctx.saved_tensors
        made = _head_loss_backward_op(*saved[:5], list(saved[5:]), *coefs, *ctx.options, ctx.needs)
    else:
        inverse, *made = ctx.saved_tensors
        factor = backward_grad_scale(given["loss"], inverse, ctx.options[-1])
        made = [grad * factor for grad in made]
    made = iter(made)
    grads = [next(made) if is_needed else None for is_needed in ctx.needs]
    grads = [g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
    return *grads, *[None] * 12


_head_loss_op.register_autograd(_backward, setup_context=_setup)


def compiled(hidden, weight, bias, call, inverse=None):
    """Return call.outputs inside a graph of torch.compile."""
    o = call.options
    fields = (o.ignore_index, o.label_smoothing, o.z_loss, o.softcap, o.scale, call.compute_dtype)
    found = _head_loss_op(
        hidden, weight, bias, call.label, call.class_weight, inverse, *fields,
        " ".join(call.outputs), " ".join(call.differentiable), list(call.needs),
    )  # fmt: skip
    named = zip(call.outputs, found, strict=False)
    return [value if k in call.differentiable else value.detach() for k, value in named]
