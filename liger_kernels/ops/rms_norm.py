"""RMS norm: y = (weight + offset) * x_hat, x_hat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps).

Legend: M rows, N width, P persistent programs of the backward.
Rounding: the mean and x_hat are computed in fp32. cast="before_weight" (Llama, Mistral, Qwen)
rounds x_hat to x's dtype before the product with the weight, and the result has the promoted dtype
of x and weight; cast="after_weight" (Gemma, OLMo 2) multiplies in fp32 and rounds once, to x's
dtype.
Memory: saves x, weight and one fp32 number a row; eager code also keeps two fp32 copies of x.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, eq. 4,
https://arxiv.org/abs/1910.07467
"""

from typing import Any

import torch

from liger_kernels.ops.arguments import EPS, Choice, Number, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import is_left_to_compiler
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn, traffic, upcast
from liger_kernels.ops.rms_norm_kernel import NormOptions, rms_norm_bwd, rms_norm_fwd
from liger_kernels.ops.rows import in_rows

CASTS = ("before_weight", "after_weight")
# The spellings of earlier versions.
_CAST_ALIASES = {"mid": "before_weight", "end": "after_weight"}
X = TensorArgument("x", "(..., N)", "be a floating tensor (..., N)")
WEIGHT = TensorArgument("weight", "(N,)", is_optional=True)
OFFSET, CAST = Number("offset"), Choice("cast", CASTS, _CAST_ALIASES)


def rms_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> torch.Tensor:
    """The definition, in plain torch."""
    wide = upcast(x)
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return x_hat.to(x.dtype)
    if CAST.of(cast) == "before_weight":
        return (weight + offset if offset else weight) * x_hat.to(x.dtype)
    return ((upcast(weight) + offset) * x_hat).to(x.dtype)


@differentiable_once("rms_norm")
class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, options: NormOptions):
        # Here and not in the public function, where every view would be a node of the graph.
        rows = in_rows(x)
        y, rstd, _ = rms_norm_fwd(rows, weight, options)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.options = options
        # A view of it would cost as much as the whole of autograd's forward.
        return y if rows is x else y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        x, weight, rstd = ctx.saved_tensors
        needs_dw = ctx.needs_input_grad[1]
        dx, dw = rms_norm_bwd(in_rows(dy), x, weight, rstd, ctx.options, needs_dw)
        return dx if dx.shape == dy.shape else dx.view(dy.shape), dw, None


def recompute(
    x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor, options: NormOptions
) -> torch.Tensor:
    """Return y bit for bit as rms_norm gave it, in x's shape, without its reduction.

    The arguments are what y.grad_fn holds: its saved_tensors and its options.
    """
    return rms_norm_fwd(x, weight, options, rstd=rstd)[0]


def norm_options(
    x: torch.Tensor,
    dtype: torch.dtype,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
) -> NormOptions:
    """Return the options of the norm of a tensor of x's shape and this dtype, or say what is wrong.

    x and weight have passed check_tensors.

    Raises:
        ValueError: see rms_norm.
    """
    if x.dim() == 0:
        raise ValueError(f"x must be a floating tensor (..., N), got {x.dtype} {tuple(x.shape)}")
    if weight is not None and weight.shape != (x.shape[-1],):
        raise ValueError(f"weight must be ({x.shape[-1]},) as x's width, got {tuple(weight.shape)}")
    cast = CAST.of(cast)
    if weight is not None and cast == "before_weight" and weight.dtype != dtype:
        dtype = torch.promote_types(dtype, weight.dtype)
    return NormOptions(EPS.of(eps), OFFSET.of(offset), cast, dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> torch.Tensor:
    """Return x divided by its root mean square over the last dimension, times (weight + offset).

    Args:
        x: (..., N) fp32, bf16 or fp16; the last dimension contiguous after a copy at most.
        weight: (N,) of any floating dtype, or None for no product.
        eps: Added to the mean of squares.
        offset: Added to the weight in fp32; 1.0 for Gemma.
        cast: "before_weight" rounds x / rms to x.dtype before the product and returns the promoted
            dtype of x and weight, as LlamaRMSNorm does; "after_weight" multiplies in fp32 and
            rounds once to x.dtype, as GemmaRMSNorm and Olmo2RMSNorm do. "mid" and "end" are older
            spellings of the two.

    Returns:
        (..., N). Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: x or weight is no tensor, on another device, or of another dtype or shape; eps
            is not finite or negative, offset is not finite, or cast is unknown.

    Source: https://arxiv.org/abs/1910.07467, equation 4.
    """
    check_tensors((X, WEIGHT), x, weight)
    options = norm_options(x, x.dtype, weight, eps, offset, cast)
    if x.numel() == 0 or is_left_to_compiler(x):
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return rms_norm_ref(x, weight, options.eps, offset=options.offset, cast=cast)
    return _RmsNorm.apply(x, weight, options)


def _sample(case: Case, dtype, device, generator) -> Sample:
    options = dict(case.options)
    weight_dtype = options.pop("weight_dtype", dtype)
    x = randn(case.shape, dtype, device, generator)
    x = lay_out(x, options.pop("layout", "contiguous"))
    weight = None
    if options.pop("has_weight", True):
        weight = randn(case.shape[-1:], weight_dtype, device, generator, shift=1.0)
    return Sample((x, weight), options)


OP = Op(
    name="rms_norm",
    aliases=("rmsnorm",),
    summary="Root mean square norm; keeps x and one number a row instead of two fp32 copies.",
    function=rms_norm,
    reference=rms_norm_ref,
    # Each rounding, kind of weight and layout once; widths on both sides of a power of two.
    cases=(
        Case("tiny", (2, 8)),
        Case("odd", (3, 127)),
        Case("gemma-odd", (5, 257), {"offset": 1.0, "cast": "after_weight"}),
        Case("olmo", (2, 3, 96), {"cast": "after_weight"}),
        Case("no-weight", (7, 40), {"has_weight": False}),
        Case("rank-1", (33,)),
        Case("rank-4", (2, 3, 5, 64), {"eps": 1e-5}),
        Case("transposed", (6, 48), {"layout": "transposed"}),
        Case("strided", (9, 65), {"layout": "strided"}),
        Case("one-wide", (4, 1)),
        Case("fp32-weight", (4, 64), {"weight_dtype": torch.float32}),
        Case("fp32-weight-end", (4, 64), {"weight_dtype": torch.float32, "cast": "after_weight"}),
        Case("many-rows", (5000, 16)),
        Case("two-parts", (2000, 40)),
        Case("real", (4096, 2048), needs_gpu=True),
        Case("real-qk-norm", (65536, 128), needs_gpu=True),
        Case("real-wide", (512, 8192), {"offset": 1.0, "cast": "after_weight"}, needs_gpu=True),
        Case("widest", (300, 65536), needs_gpu=True),
        Case("real-not-power", (512, 5120), needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(2, 3),
    tensors=(X, WEIGHT),
    options=(EPS, OFFSET, CAST),
)
