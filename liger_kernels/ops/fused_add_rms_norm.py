"""Fused add and RMS norm: total = x + residual, y = rms_norm(total); both are returned.

Rounding: total is rounded to the promoted dtype of x and residual, as eager code adds; y follows
from the rounded total exactly as rms_norm.py says. The backward adds the gradient of total to that
of the norm in fp32 and rounds once, where eager code rounds both and their sum.
Memory: saves total, which the next sum needs anyway, weight and one fp32 number a row. Of 5 passes
over memory a direction that a sum and a norm take, 4 are left.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, eq. 4,
https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

from typing import Any

import torch

from liger_kernels.ops.arguments import EPS, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn, traffic
from liger_kernels.ops.rms_norm import CAST, OFFSET, WEIGHT, X, norm_options, rms_norm, rms_norm_ref
from liger_kernels.ops.rms_norm_kernel import NormOptions, rms_norm_bwd, rms_norm_fwd
from liger_kernels.ops.rows import in_rows

_TENSORS = (X, TensorArgument("residual", "(..., N)"), WEIGHT)


def fused_add_rms_norm_ref(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain torch."""
    total = x + residual
    return rms_norm_ref(total, weight, eps, offset=offset, cast=cast), total


@differentiable_once("fused_add_rms_norm")
class _FusedAddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        options: NormOptions,
    ):
        rows = in_rows(x)
        y, rstd, total = rms_norm_fwd(rows, weight, options, residual=in_rows(residual))
        if rows is not x:
            y, total = y.view(x.shape), total.view(x.shape)
        ctx.save_for_backward(total, weight, rstd)
        ctx.options = options
        ctx.dtypes = x.dtype, residual.dtype
        # An output that nothing reads has no gradient: None, which costs no pass over memory.
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None):
        total, weight, rstd = ctx.saved_tensors
        dw = None
        if dy is not None:
            dtotal, dw = rms_norm_bwd(
                in_rows(dy),
                total,
                weight,
                rstd,
                ctx.options,
                ctx.needs_input_grad[2],
                dtotal=None if dtotal is None else in_rows(dtotal),
            )
        if dtotal is None:
            return None, None, None, None
        # One tensor for both where the dtypes agree, as the backward of a sum gives.
        dx, dresidual = (
            dtotal.to(dtype) if is_needed else None
            for dtype, is_needed in zip(ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        )
        return dx, dresidual, dw, None


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMS norm of x + residual over the last dimension, and x + residual itself.

    Args:
        x: (..., N) fp32, bf16 or fp16; the last dimension contiguous after a copy at most.
        residual: x's shape, in any floating dtype.
        weight: (N,) of any floating dtype, or None for no product.
        eps: Added to the mean of squares.
        offset: Added to the weight in fp32; 1.0 for Gemma.
        cast: As in rms_norm, of which x + residual is the argument.

    Returns:
        y and total, both (..., N). total has the promoted dtype of x and residual, y the dtype that
        rms_norm gives for it. Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: x, residual or weight is no tensor, on another device, or of another dtype or
            shape; eps is not finite or negative, offset is not finite, or cast is unknown.

    Source: https://arxiv.org/abs/1910.07467, equation 4.
    """
    check_tensors(_TENSORS, x, residual, weight)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must be floating {tuple(x.shape)} as x, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    dtype = torch.promote_types(x.dtype, residual.dtype)
    options = norm_options(x, dtype, weight, eps, offset, cast)
    if x.numel() == 0:
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return fused_add_rms_norm_ref(
            x, residual, weight, options.eps, offset=options.offset, cast=cast
        )
    if torch.compiler.is_compiling():
        # The compiler fuses the sum with what is around it; and dynamo of torch 2.11 loses the
        # gradients of a function that gives two inputs the same one.
        total = x + residual
        return rms_norm(total, weight, eps, offset=offset, cast=cast), total
    return _FusedAddRmsNorm.apply(x, residual, weight, options)


def _sample(case: Case, dtype, device, generator) -> Sample:
    options = dict(case.options)
    weight_dtype = options.pop("weight_dtype", dtype)
    dtypes = dtype, options.pop("residual_dtype", dtype)
    layouts = options.pop("layouts", ("contiguous", "contiguous"))
    x, residual = (
        lay_out(randn(case.shape, kind, device, generator), layout)
        for kind, layout in zip(dtypes, layouts, strict=True)
    )
    weight = None
    if options.pop("has_weight", True):
        weight = randn(case.shape[-1:], weight_dtype, device, generator, shift=1.0)
    return Sample((x, residual, weight), options)


OP = Op(
    name="fused_add_rms_norm",
    aliases=("fused_add_rmsnorm", "add_rms_norm", "add_rmsnorm"),
    summary="Sum of x and residual with its RMS norm; keeps the sum and one number a row.",
    function=fused_add_rms_norm,
    reference=fused_add_rms_norm_ref,
    # Each rounding, kind of weight, pair of dtypes and of layouts once; widths on both sides of a
    # power of two.
    cases=(
        Case("tiny", (2, 8)),
        Case("odd", (3, 127)),
        Case("gemma-odd", (5, 257), {"offset": 1.0, "cast": "after_weight"}),
        Case("olmo", (2, 3, 96), {"cast": "after_weight"}),
        Case("no-weight", (7, 40), {"has_weight": False}),
        Case("rank-1", (33,)),
        Case("rank-4", (2, 3, 5, 64), {"eps": 1e-5}),
        Case("transposed", (6, 48), {"layouts": ("transposed", "strided")}),
        Case("strided", (9, 65), {"layouts": ("strided", "contiguous")}),
        Case("one-wide", (4, 1)),
        Case("fp32-residual", (4, 72), {"residual_dtype": torch.float32}),
        Case("fp16-residual", (4, 72), {"residual_dtype": torch.float16, "cast": "after_weight"}),
        Case("fp32-weight", (4, 64), {"weight_dtype": torch.float32}),
        Case("many-rows", (5000, 16)),
        Case("two-parts", (2000, 40)),
        Case("real", (4096, 2048), needs_gpu=True),
        Case("real-wide", (512, 8192), {"offset": 1.0, "cast": "after_weight"}, needs_gpu=True),
        Case("real-not-power", (512, 5120), needs_gpu=True),
        Case("widest", (300, 65536), needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(4, 4),
    # Patching left it: without it a step took 0.998x to 1.010x of the time and the same memory on
    # an H200 (docs/results/fused-add-h200.json).
    part_of=(),
    tensors=_TENSORS,
    options=(EPS, OFFSET, CAST),
)
