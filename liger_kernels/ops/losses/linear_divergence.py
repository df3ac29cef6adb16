"""Divergence of two linear layers' outputs, a chunk of tokens at a time, and its autograd.

    z = hidden @ weight.T + bias, t = teacher_hidden @ teacher_weight.T + teacher_bias
    divergence_rows(z, t) gives the divergence and writes dz over z
    dhidden = dz @ weight,  dweight += dz.T @ hidden,  dbias += sum of dz's rows

Never more than one chunk of both logits exists. A sum has its gradients made in forward, while they
do; values of each token, whose factors backward brings, have both logits computed once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.launcher import cdiv
from liger_kernels.ops.losses.chunk_size import accumulator_dtype, chunk_tokens
from liger_kernels.ops.losses.divergence_rows import DivergenceOptions, divergence_rows
from liger_kernels.ops.losses.grads_in_forward import (
    backward_grad_scale,
    forward_grad_scale,
    second_backward_error,
)
from liger_kernels.ops.losses.linear_loss import LinearGradients, add_product
from liger_kernels.ops.losses.options import wide_dtype, without_autocast

__all__ = ["DivergenceCall", "DivergenceTotal", "DivergenceValues", "Layer", "compiled_divergence"]

Grads = tuple[Tensor | None, ...]


class Layer(NamedTuple):
    """A linear layer and its input: hidden (N, H), weight (V, H), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class DivergenceCall(NamedTuple):
    """The arguments of a divergence, except its tensors."""

    options: DivergenceOptions
    # Of the student's products and of the teacher's.
    dtypes: tuple[torch.dtype, torch.dtype]
    # Which of hidden, weight and bias of the student get a gradient.
    needs: tuple[bool, bool, bool]


def _sweep(
    student: Layer,
    teacher: Layer,
    call: DivergenceCall,
    coef: Tensor | None,
    *,
    has_values: bool = True,
) -> tuple[Tensor | None, LinearGradients]:
    """Return the divergence (N,) of each token and, with coef (N,), the gradients asked for."""
    with without_autocast(student.weight.device):
        return _sweep_chunks(student, teacher, call, coef, has_values)


def _sweep_chunks(student, teacher, call, coef, has_values):
    dtype, wide = call.dtypes[0], wide_dtype(call.dtypes[0])
    weight, other = student.weight.to(dtype), teacher.weight.to(call.dtypes[1])
    (num_rows, width), vocab, device = student.hidden.shape, len(weight), weight.device
    needs_hidden, needs_weight, needs_bias = call.needs if coef is not None else (False,) * 3
    # As many bytes for both logits together as a loss takes for one.
    chunk = chunk_tokens(num_rows, width, 2 * vocab, dtype, device, call.needs[1])
    values = torch.empty(num_rows, dtype=wide, device=device) if has_values else None
    grads = LinearGradients()
    if needs_hidden:
        grads.hidden = torch.empty((num_rows, width), dtype=dtype, device=device)
    if needs_weight:
        allocate = torch.empty if num_rows else torch.zeros
        sum_dtype = accumulator_dtype(dtype, student.weight.dtype, cdiv(num_rows, chunk), device)
        grads.weight = allocate((vocab, width), dtype=sum_dtype, device=device)
    if needs_bias:
        grads.bias = torch.zeros(vocab, dtype=wide, device=device)
    buffers = [_buffer(min(chunk, num_rows), vocab, kind, device) for kind in call.dtypes]
    for start in range(0, num_rows, chunk):
        part = slice(start, min(start + chunk, num_rows))
        x, z = _logits(student, weight, part, buffers[0])
        _, t = _logits(teacher, other, part, buffers[1])
        divergence_rows(
            z,
            t,
            call.options,
            coef=coef[part] if any((needs_hidden, needs_weight, needs_bias)) else None,
            out=None if values is None else values[part],
        )
        if needs_hidden:
            torch.mm(z, weight, out=grads.hidden[part])
        if needs_weight:
            add_product(grads.weight, z.t(), x, is_first=start == 0)
        if needs_bias:
            grads.bias.add_(z.sum(0, dtype=wide))
    return values, grads


def _buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for logits, whose rows begin at multiples of 16 elements on a GPU."""
    pitch = vocab if device.type == "cpu" else cdiv(vocab, 16) * 16
    return torch.empty((rows, pitch), dtype=dtype, device=device)[:, :vocab]


def _logits(layer: Layer, weight: Tensor, part: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Return a part of hidden in the weight's dtype, and its logits in the buffer."""
    x = layer.hidden[part].to(weight.dtype)
    z = buffer[: len(x)]
    if layer.bias is None:
        torch.mm(x, weight.t(), out=z)
    else:
        torch.addmm(layer.bias.to(weight.dtype), x, weight.t(), out=z)
    return x, z


def _dtypes(layer: Layer) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in layer)


def _backward_of_values(student: Layer, teacher: Layer, call: DivergenceCall, dy: Tensor) -> Grads:
    """Return the gradients of the student from those of each token's value."""
    factor = torch.ones((), dtype=wide_dtype(call.dtypes[0]), device=dy.device)
    if call.dtypes[0] == torch.float16 and dy.numel():
        # fp16 keeps numbers about 1 best: the largest is taken out, and put back at the end.
        factor = dy.abs().amax()
        factor = factor.masked_fill(factor == 0.0, 1.0)
        dy = dy / factor
    _, grads = _sweep(student, teacher, call, dy, has_values=False)
    return grads.times(factor, _dtypes(student))


@differentiable_once("fused_linear_divergence")
class DivergenceValues(torch.autograd.Function):
    """The divergence of each token; backward computes both logits again, as often as it runs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call = args
        values, _ = _sweep(Layer(*tensors[:3]), Layer(*tensors[3:]), call, None)
        ctx.save_for_backward(*tensors)
        ctx.call = call
        assert values is not None
        return values

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        tensors = ctx.saved_tensors
        student, teacher = Layer(*tensors[:3]), Layer(*tensors[3:])
        return *_backward_of_values(student, teacher, ctx.call, dy), *[None] * 4


@differentiable_once("fused_linear_divergence")
class DivergenceTotal(torch.autograd.Function):
    """The sum of divergences times a number, whose gradients forward makes."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, call, inverse = args
        student = Layer(*tensors[:3])
        coef = forward_grad_scale(inverse, call.dtypes[0]).expand(len(student.hidden))
        needs = any(call.needs)
        values, grads = _sweep(student, Layer(*tensors[3:]), call, coef if needs else None)
        ctx.grads, ctx.inverse, ctx.dtypes = grads, inverse, _dtypes(student)
        ctx.compute_dtype = call.dtypes[0]
        assert values is not None
        return values.sum() * inverse

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if ctx.grads is None:
            raise second_backward_error("fused_linear_divergence")
        grads, ctx.grads = ctx.grads, None
        factor = backward_grad_scale(dy, ctx.inverse, ctx.compute_dtype)
        return *grads.times(factor, ctx.dtypes), *[None] * 5


# torch.compile does not look into an operator: inside, chunks and kernels run as in eager code.


@torch.library.custom_op("liger_kernels::divergence", mutates_args=())
def _divergence_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    options: list[float],
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    needs: list[bool],
) -> Tensor:
    student = Layer(hidden, weight, bias)
    teacher = Layer(teacher_hidden, teacher_weight, teacher_bias)
    values, _ = _sweep(student, teacher, _call(options, dtype, teacher_dtype, needs), None)
    assert values is not None
    return values


def _call(options, dtype, teacher_dtype, needs):
    return DivergenceCall(DivergenceOptions(*options), (dtype, teacher_dtype), tuple(needs))


@_divergence_op.register_fake
def _(hidden, weight, bias, *rest):
    return torch.empty(len(hidden), dtype=wide_dtype(rest[-3]), device=weight.device)


@torch.library.custom_op("liger_kernels::divergence_backward", mutates_args=())
def _divergence_backward_op(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    options: list[float],
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    student = Layer(hidden, weight, bias)
    teacher = Layer(teacher_hidden, teacher_weight, teacher_bias)
    call = _call(options, dtype, teacher_dtype, needs)
    grads = _backward_of_values(student, teacher, call, dy)
    return [grad for grad in grads if grad is not None]


@_divergence_backward_op.register_fake
def _(dy, hidden, weight, bias, *rest):
    tensors = zip((hidden, weight, bias), rest[-1], strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, needed in tensors if needed]


def _setup(ctx, inputs, output):
    *tensors, ctx.options, ctx.dtype, ctx.teacher_dtype, ctx.needs = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    options = ctx.options, ctx.dtype, ctx.teacher_dtype, ctx.needs
    made = iter(_divergence_backward_op(dy, *ctx.saved_tensors, *options))
    return *(next(made) if is_needed else None for is_needed in ctx.needs), *[None] * 7


_divergence_op.register_autograd(_backward, setup_context=_setup)


def compiled_divergence(student: Layer, teacher: Layer, call: DivergenceCall) -> Tensor:
    """Return the divergence of each token inside a graph of torch.compile."""
    found: Tensor = _divergence_op(
        *student, *teacher, list(call.options), *call.dtypes, list(call.needs)
    )
    return found
