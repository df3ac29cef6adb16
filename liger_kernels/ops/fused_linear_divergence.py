"""Divergence of a student from a teacher, each a linear layer, without ever making all logits.

    z = hidden @ weight.T + bias, t = teacher_hidden @ teacher_weight.T + teacher_bias
    then as in losses/divergence_rows.py

Legend: N tokens, H and G hidden widths of student and teacher, V vocabulary.
Compute dtypes and rounding: as in fused_linear_cross_entropy.py, for each layer by its weight.
Memory: one chunk of both logits, and the student's gradients. A sum or mean makes these in forward;
values of each token have both logits computed again in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger_kernels.ops.arguments import TensorArgument, check_tensors
from liger_kernels.ops.divergence import DIVERGENCE_OPTIONS, divergence_of, divergence_options
from liger_kernels.ops.fused_linear_cross_entropy import (
    LINEAR_TENSORS,
    compute_dtype_of,
    linear_ref,
    needs_of,
)
from liger_kernels.ops.losses.linear_divergence import (
    DivergenceCall,
    DivergenceTotal,
    DivergenceValues,
    Layer,
    compiled_divergence,
)
from liger_kernels.ops.losses.options import REDUCTION, check_linear, wide_dtype
from liger_kernels.ops.op import Case, Op, Sample, randn

__all__ = ["OP", "fused_linear_divergence"]

_TENSORS = (
    *LINEAR_TENSORS,
    TensorArgument("teacher_weight", "(V, G)", is_constant=True),
    TensorArgument("teacher_hidden", "(..., G)", is_moved=True, is_constant=True),
    TensorArgument("teacher_bias", "(V,)", is_optional=True, is_constant=True),
)


def fused_linear_divergence_ref(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "none",
) -> Tensor:
    """The definition, in plain torch."""
    z = linear_ref(hidden, weight, bias)
    t = linear_ref(teacher_hidden, teacher_weight, teacher_bias)
    values = divergence_of(z, t, beta, temperature)
    if reduction == "none":
        return values
    return values.sum() / (max(values.numel(), 1) if reduction == "mean" else 1)


def fused_linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "none",
) -> Tensor:
    """Compute the divergence of each token from a teacher; neither has its logits whole.

    With p of the teacher, q of the student and m = beta * p + (1 - beta) * q it is beta * KL(p, m)
    + (1 - beta) * KL(q, m); the forward KL(p, q) for beta 0, the reverse KL(q, p) for beta 1.

    Args:
        hidden: (..., H) fp32, bf16 or fp16; cast as in fused_linear_cross_entropy.
        weight: (V, H). If it does not require grad, its gradient is neither computed nor allocated;
            the same holds for hidden and bias.
        teacher_hidden: (..., G) of hidden's leading sizes, moved to weight's device.
        teacher_weight: (V, G). The teacher's tensors are constants, which get no gradient.
        bias: (V,) or None.
        teacher_bias: (V,) or None.
        beta: Share of the teacher in the mixture, 0 to 1, as in GKD.
        temperature: Divides both logits; positive and finite.
        reduction: "none" for the value of each token, "sum", or "mean" over the tokens. Tokens that
            do not count are left out of both hidden tensors by the caller.

    Returns:
        (...) or a scalar, fp32 (fp64 for fp64 weights), in nats; of no tokens sum and mean are 0.
        Differentiable once. The gradients of a sum or mean are made in forward: a second backward
        over a retained graph raises RuntimeError, except with "none", whose forward has a product a
        layer and backward two and the student's two.

    Raises:
        ValueError: a type, shape, dtype, device or option is off.
    """
    tensors = weight, hidden, bias, teacher_weight, teacher_hidden, teacher_bias
    check_tensors(_TENSORS, *tensors)
    check_linear(hidden, weight, bias)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_bias)
    options, reduction = divergence_options(beta, temperature), REDUCTION.of(reduction)
    dtypes = compute_dtype_of(weight), compute_dtype_of(teacher_weight)
    call = DivergenceCall(options, dtypes, needs_of(hidden, weight, bias))
    device = weight.device
    student = Layer(hidden.reshape(-1, hidden.shape[-1]).to(device), weight, bias)
    rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).to(device)
    teacher = Layer(
        rows, teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach()
    )
    inverse = 1.0 / max(len(rows), 1) if reduction == "mean" else 1.0
    if reduction != "none" and not torch.compiler.is_compiling():
        scale = torch.full((), inverse, dtype=wide_dtype(dtypes[0]), device=device)
        total: Tensor = DivergenceTotal.apply(*student, *teacher, call, scale)
        return total
    is_compiled = torch.compiler.is_compiling()
    values: Tensor = (
        compiled_divergence(student, teacher, call)
        if is_compiled
        else DivergenceValues.apply(*student, *teacher, call)
    )
    return values.view(hidden.shape[:-1]) if reduction == "none" else values.sum() * inverse


def _check_teacher(hidden, weight, teacher_hidden, teacher_weight, teacher_bias):
    """Raise ValueError unless the teacher has the student's tokens and vocabulary."""
    vocab, width = len(weight), teacher_weight.shape[-1] if teacher_weight.dim() else 0
    if teacher_weight.dim() != 2 or len(teacher_weight) != vocab or width == 0:
        raise ValueError(
            f"teacher_weight must be floating ({vocab}, G) as weight's vocabulary, got "
            f"{teacher_weight.dtype} {tuple(teacher_weight.shape)}"
        )
    if teacher_hidden.shape != (*hidden.shape[:-1], width):
        wanted = (*hidden.shape[:-1], width)
        raise ValueError(
            f"teacher_hidden must be floating {wanted} as hidden and teacher_weight, got "
            f"{teacher_hidden.dtype} {tuple(teacher_hidden.shape)}"
        )
    if teacher_bias is not None and teacher_bias.shape != (vocab,):
        raise ValueError(
            f"teacher_bias must be floating ({vocab},), got {teacher_bias.dtype} "
            f"{tuple(teacher_bias.shape)}"
        )


def _sample(case: Case, dtype, device, generator) -> Sample:
    """Return a case of shape (..., H, G, V)."""
    *lead, width, other, vocab = case.shape
    options = dict(case.options)
    size = options.pop("spread", 1.0)
    constant = {"requires_grad": False}
    if options.pop("has_bias", False):
        options["bias"] = randn((vocab,), dtype, device, generator)
        options["teacher_bias"] = randn((vocab,), dtype, device, generator, **constant)
    args = (
        randn((*lead, width), dtype, device, generator),
        randn((vocab, width), dtype, device, generator, scale=size * width**-0.5),
        randn((*lead, other), dtype, device, generator, **constant),
        randn((vocab, other), dtype, device, generator, scale=size * other**-0.5, **constant),
    )
    return Sample(args, options)


def _num_bytes(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    *lead, width, other, vocab = case.shape
    num_rows = torch.Size(lead).numel() + vocab
    forward = num_rows * (width + other) * dtype.itemsize
    return forward, num_rows * width * dtype.itemsize


def _num_flops(case: Case) -> int:
    *lead, width, other, vocab = case.shape
    # Of each token both logits twice and two gradients; of a sum or mean both once.
    again = 2 if case.options.get("reduction", "none") == "none" else 1
    return 2 * torch.Size(lead).numel() * vocab * (again * (width + other) + 2 * width)


OP = Op(
    name="fused_linear_divergence",
    aliases=("linear_divergence",),
    summary="Divergence of a linear layer from a teacher's, in chunks of both logits; never all.",
    function=fused_linear_divergence,
    reference=fused_linear_divergence_ref,
    cases=(
        Case("tiny", (3, 8, 12, 16)),
        Case("forward", (3, 9, 5, 67), {"beta": 0.0, "has_bias": True}),
        Case("reverse", (2, 2, 8, 12, 40), {"beta": 1.0, "temperature": 2.0}),
        Case("mixed", (3, 8, 12, 50), {"beta": 0.9, "temperature": 0.7, "spread": 3.0}),
        Case("sum", (3, 8, 12, 50), {"reduction": "sum", "has_bias": True}),
        Case("mean", (1, 3, 8, 4, 50), {"reduction": "mean", "beta": 0.0, "has_bias": True}),
        Case("two-blocks", (2, 4, 4, 9000), {"beta": 0.1}),
        Case("no-rows", (0, 16, 8, 20)),
        Case("real", (2048, 2048, 4096, 32000), {"reduction": "mean"}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=_num_bytes,
    num_flops=_num_flops,
    # No module runs it.
    part_of=(),
    tensors=_TENSORS,
    options=(*DIVERGENCE_OPTIONS, REDUCTION),
)
