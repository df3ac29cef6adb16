"""Divergence of a student's logits from a teacher's, each token's: KL both ways, Jensen-Shannon.

The formula is in losses/divergence_rows.py. Rounding: all after the logits is fp32, fp64 for fp64.
Memory: between forward and backward both logits, of which the student's become their gradient in a
copy; eager code keeps four to six tensors of that size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_kernels.ops.arguments import SMALLEST, Number, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import is_traced_as_torch
from liger_kernels.ops.losses.divergence_rows import DivergenceOptions, divergence_rows
from liger_kernels.ops.losses.options import wide_dtype
from liger_kernels.ops.op import Case, Op, Sample, randn, traffic, upcast
from liger_kernels.ops.rows import rows_of

__all__ = ["DIVERGENCE_OPTIONS", "OP", "divergence", "divergence_of", "divergence_options"]

_TENSORS = (
    TensorArgument("logits", "(..., V)"),
    TensorArgument("teacher_logits", "(..., V)", is_constant=True),
)
_BETA = Number("beta", least=0.0, most=1.0, allowed="from 0 to 1")
_TEMPERATURE = Number("temperature", least=SMALLEST, allowed="positive")
DIVERGENCE_OPTIONS = (_BETA, _TEMPERATURE)


def divergence_options(beta: Any, temperature: Any) -> DivergenceOptions:
    """Validate the options and return them as floats."""
    return DivergenceOptions(_BETA.of(beta), _TEMPERATURE.of(temperature))


def divergence_of(z: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the divergence of each row of logits (..., V), in plain torch."""
    log_q = (upcast(z) / temperature).log_softmax(-1)
    log_p = (upcast(teacher.detach()) / temperature).log_softmax(-1).to(log_q.dtype)
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    log_m = torch.logaddexp(log_p + log_beta, log_q + log_rest)
    of_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * of_p + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)


def divergence_ref(
    logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The definition, in plain torch."""
    return divergence_of(logits, teacher_logits, beta, temperature)


def divergence(
    logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence of each token.

    With p of the teacher, q of the student and m = beta * p + (1 - beta) * q it is beta * KL(p, m)
    + (1 - beta) * KL(q, m); the forward KL(p, q) for beta 0, the reverse KL(q, p) for beta 1.

    Args:
        logits: (..., V) fp32, bf16 or fp16, of the student.
        teacher_logits: The same shape, any floating dtype; a constant, which gets no gradient.
        beta: Share of the teacher in the mixture, 0 to 1, as in GKD.
        temperature: Divides both logits; positive and finite.

    Returns:
        (...) fp32 (fp64 for fp64 logits), in nats, differentiable once. It is infinite where beta
        is 1 and the student has a class that the teacher excludes (-inf), or the reverse for 0.

    Raises:
        ValueError: a type, shape, dtype, device or option is off.
    """
    check_tensors(_TENSORS, logits, teacher_logits)
    options = divergence_options(beta, temperature)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be floating (..., V) with a class at least, got {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_logits must be {tuple(logits.shape)} as logits are, got "
            f"{tuple(teacher_logits.shape)}"
        )
    if is_traced_as_torch(logits):
        return divergence_of(logits, teacher_logits, *options).to(wide_dtype(logits.dtype))
    found: Tensor = _Divergence.apply(logits, teacher_logits.detach(), options)
    return found


@differentiable_once("divergence")
class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, options: DivergenceOptions) -> Tensor:
        ctx.save_for_backward(logits, teacher)
        ctx.options = options
        out = torch.empty(logits.shape[:-1], dtype=wide_dtype(logits.dtype), device=logits.device)
        divergence_rows(rows_of(logits), rows_of(teacher), options, out=out.view(-1))
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        logits, teacher = ctx.saved_tensors
        dx = rows_of(logits).clone(memory_format=torch.contiguous_format)
        divergence_rows(dx, rows_of(teacher), ctx.options, coef=dy.reshape(-1))
        return dx.view(logits.shape), None, None


def _sample(case: Case, dtype, device, generator) -> Sample:
    options = dict(case.options)
    spread = options.pop("spread", 1.0)
    logits = randn(case.shape, dtype, device, generator, scale=spread)
    teacher = randn(case.shape, dtype, device, generator, scale=spread, requires_grad=False)
    return Sample((logits, teacher), options)


OP = Op(
    name="divergence",
    aliases=("jsd",),
    summary="KL or Jensen-Shannon divergence of each token from a teacher; one copy of logits.",
    function=divergence,
    reference=divergence_ref,
    cases=(
        Case("tiny", (2, 16)),
        Case("forward", (3, 67), {"beta": 0.0}),
        Case("reverse", (2, 67), {"beta": 1.0, "temperature": 2.0, "spread": 3.0}),
        Case("mixed", (1, 2, 65), {"beta": 0.1, "temperature": 0.7, "spread": 4.0}),
        Case("two-blocks", (2, 9000), {"beta": 0.9}),
        Case("no-rows", (0, 16)),
        Case("real", (2048, 32000), needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(2, 3),
    # No module runs it.
    part_of=(),
    tensors=_TENSORS,
    options=DIVERGENCE_OPTIONS,
)
