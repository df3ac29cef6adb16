"""Layer norm: y = weight * x_hat + bias, x_hat = (x - mean) * rstd, rstd = 1 / sqrt(var(x) + eps).

Legend: M rows, N width, P persistent programs of the backward.
Rounding: statistics, product and sum are computed in fp32, and the result is rounded once, to x's
dtype. The variance is the mean of the squared distances from the mean, over the true width.
Memory: saves x, weight and two fp32 numbers a row.
Source: Ba, Kiros and Hinton, Layer Normalization, https://arxiv.org/abs/1607.06450, eq. 3 and 4.
"""

from typing import Any

import torch

from liger_kernels.ops.arguments import EPS, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import is_left_to_compiler
from liger_kernels.ops.layer_norm_kernel import LayerNormOptions, layer_norm_bwd, layer_norm_fwd
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn, traffic, upcast
from liger_kernels.ops.rows import in_rows

_TENSORS = (
    TensorArgument("x", "(..., N)", "be a floating tensor (..., N)"),
    TensorArgument("weight", "(N,)", is_optional=True),
    TensorArgument("bias", "(N,)", is_optional=True),
)


def layer_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The definition, in plain torch."""
    wide = upcast(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * upcast(weight)
    if bias is not None:
        y = y + upcast(bias)
    return y.to(x.dtype)


@differentiable_once("layer_norm")
class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, options: LayerNormOptions):
        # Here and not in the public function, where every view would be a node of the graph.
        rows = in_rows(x)
        y, stats = layer_norm_fwd(rows, weight, bias, options)
        ctx.save_for_backward(rows, weight, stats)
        _, needs_dw, needs_db, _ = ctx.needs_input_grad
        ctx.dw_dtype = weight.dtype if needs_dw else None
        ctx.db_dtype = bias.dtype if needs_db else None
        # A view of it would cost as much as the whole of autograd's forward.
        return y if rows is x else y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        x, weight, stats = ctx.saved_tensors
        dx, dw, db = layer_norm_bwd(in_rows(dy), x, weight, stats, ctx.dw_dtype, ctx.db_dtype)
        return dx if dx.shape == dy.shape else dx.view(dy.shape), dw, db, None


def _out_dtype(x: torch.Tensor) -> torch.dtype:
    # Autocast runs torch's layer norm in fp32, except on a CPU, where it leaves the dtype alone.
    if x.device.type in ("cuda", "xpu") and torch.is_autocast_enabled(x.device.type):
        return torch.promote_types(x.dtype, torch.float32)
    return x.dtype


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Return x with mean 0 and variance 1 over the last dimension, times weight, plus bias.

    Args:
        x: (..., N) fp32, bf16 or fp16; the last dimension contiguous after a copy at most.
        weight: (N,) of any floating dtype, or None for no product.
        bias: (N,) of any floating dtype, or None for no sum; it needs no weight.
        eps: Added to the variance.

    Returns:
        (..., N) in x's dtype, whatever weight and bias have, as from torch's where it takes them;
        fp32 inside autocast on a GPU, also as torch's. Computed in fp32 and rounded once.
        Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: x, weight or bias is no tensor, on another device, or of another dtype or shape,
            or eps is not finite or negative.

    Source: https://arxiv.org/abs/1607.06450, equations 3 and 4.
    """
    check_tensors(_TENSORS, x, weight, bias)
    if x.dim() == 0:
        raise ValueError(f"x must be a floating tensor (..., N), got {x.dtype} {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (x.shape[-1],):
            raise ValueError(
                f"{name} must be ({x.shape[-1]},) as x's width, got {tuple(value.shape)}"
            )
    options = LayerNormOptions(EPS.of(eps), _out_dtype(x))
    if x.numel() == 0 or is_left_to_compiler(x):
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return layer_norm_ref(x, weight, bias, options.eps).to(options.out_dtype)
    return _LayerNorm.apply(x, weight, bias, options)


def _sample(case: Case, dtype, device, generator) -> Sample:
    width = case.shape[-1]
    options = dict(case.options)
    # A mean far from 0 shows a variance that counts lanes past the width.
    shift = options.pop("shift", 1.0)
    weight_dtype = options.pop("weight_dtype", dtype)
    bias_dtype = options.pop("bias_dtype", weight_dtype)
    x = randn(case.shape, dtype, device, generator, shift=shift)
    x = lay_out(x, options.pop("layout", "contiguous"))
    weight = bias = None
    if options.pop("has_weight", True):
        weight = randn((width,), weight_dtype, device, generator, shift=1.0)
    if options.pop("has_bias", True):
        bias = randn((width,), bias_dtype, device, generator)
    return Sample((x, weight, bias), options)


OP = Op(
    name="layer_norm",
    aliases=("layernorm",),
    summary="Layer norm; keeps x and two numbers a row.",
    function=layer_norm,
    reference=layer_norm_ref,
    # Every set of parameters, every kind of layout once; widths on both sides of a power of 2.
    cases=(
        Case("tiny", (2, 8)),
        Case("odd", (3, 127)),
        Case("case_13-narrow", (4, 17), {"shift": 5.0}),
        Case("case_13-wide", (2, 1536), {"shift": 5.0}),
        Case("no-bias", (5, 41), {"has_bias": False}),
        Case("no-weight", (5, 41), {"has_weight": False}),
        Case("no-parameters", (7, 40), {"has_weight": False, "has_bias": False}),
        Case("rank-1", (33,)),
        Case("rank-4", (2, 3, 5, 64), {"eps": 1e-3}),
        Case("transposed", (6, 48), {"layout": "transposed"}),
        Case("strided", (9, 65), {"layout": "strided"}),
        Case("fp32-parameters", (4, 64), {"weight_dtype": torch.float32}),
        Case("mixed-parameters", (4, 64), {"bias_dtype": torch.float32}),
        # No more rows: torch's own sums over them, on a CPU, lose a digit to eager's.
        Case("many-rows", (65, 16)),
        Case("real", (4096, 2048), needs_gpu=True),
        Case("real-narrow", (65536, 128), needs_gpu=True),
        Case("real-wide", (512, 8192), needs_gpu=True),
        Case("real-not-power", (512, 5120), {"shift": 5.0}, needs_gpu=True),
        # The widths at which pipeline stages and registers run out.
        Case("very-wide", (300, 16384), needs_gpu=True),
        Case("widest", (150, 65536), needs_gpu=True),
        Case("too-wide", (3, 65537), needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(2, 3),
    tensors=_TENSORS,
    options=(EPS,),
)
