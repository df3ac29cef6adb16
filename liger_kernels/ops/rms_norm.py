"""RMS norm: y = (weight + offset) * x_hat, x_hat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps).

Legend: M rows, N width, P persistent programs of the backward.
Rounding: the mean and x_hat are computed in fp32. cast="mid" (Llama, Mistral, Qwen) rounds x_hat to
x's dtype before the product with the weight, and the result has the promoted dtype of x and weight;
cast="end" (Gemma, OLMo 2) multiplies in fp32 and rounds once, to x's dtype.
Memory: saves x, weight and one fp32 number a row; eager code also keeps two fp32 copies of x.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, eq. 4,
https://arxiv.org/abs/1910.07467
"""

from dataclasses import dataclass
from typing import Any

import torch

from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.launch import (
    cdiv,
    device_guard,
    fp32,
    lookup,
    num_sms,
    row_stages,
    row_tile,
    rows_of,
    runs_triton_rows,
    sum_partials,
    tl,
    triton,
)
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn, traffic, upcast

CASTS = ("mid", "end")


def rms_norm_ref(x, weight=None, eps=1e-6, *, offset=0.0, cast="mid"):
    """The definition, in plain torch."""
    wide = upcast(x)
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return x_hat.to(x.dtype)
    if cast == "mid":
        return (weight + offset if offset else weight) * x_hat.to(x.dtype)
    return ((upcast(weight) + offset) * x_hat).to(x.dtype)


# (width, warps): elements a lane stays at 8 to 32. First guess, to be replaced by measurements.
_FWD_WARPS = ((1024, 4), (4096, 8), (16384, 16), (65536, 32))
_BWD_WARPS = ((2048, 4), (4096, 8), (16384, 16), (65536, 32))
# (width, programs a multiprocessor) of the persistent backward.
_BWD_PROGRAMS = ((1024, 4), (4096, 2), (65536, 1))


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    rstd_ptr,  # (M,) fp32
    stride_xm,
    M,
    N,
    eps,
    offset,
    HAS_WEIGHT: tl.constexpr,
    ROUND_MID: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask_m = rows < M
    mask_n = cols < N
    mask = mask_m[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / N + fp32(eps))
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        if ROUND_MID:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
        y = y * (w + fp32(offset))[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    rstd_ptr,  # (M,) fp32
    dx_ptr,  # (M, N)
    dw_ptr,  # (P, N) fp32 partial sums, or None
    stride_dym,
    stride_xm,
    M,
    N,
    offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_DW: tl.constexpr,
    ROUND_MID: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
        w += fp32(offset)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Tiles are dealt out in turn, so that all programs stream neighbouring memory.
    for start in tl.range(
        program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=NUM_STAGES
    ):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)[:, None]
        x_hat = x.to(tl.float32) * rstd
        dy = dy.to(tl.float32)
        if HAS_DW:
            if ROUND_MID:
                dw += dy * x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
            else:
                dw += dy * x_hat
        if HAS_WEIGHT:
            dy *= w[None, :]
        dx = rstd * (dy - x_hat * (tl.sum(dy * x_hat, 1) / N)[:, None])
        out = dx_ptr + rows[:, None] * N + cols[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_DW:
        tl.store(dw_ptr + program.to(tl.int64) * N + cols, tl.sum(dw, 0), mask=mask_n)


@dataclass(frozen=True)
class _Options:
    eps: float
    offset: float
    cast: str
    out_dtype: torch.dtype


def _rms_norm_fwd(x, weight, options):
    num_rows, width = x.shape
    if not runs_triton_rows(x):
        # One fused reduction; squaring into a copy would double the traffic on a CPU.
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
        rstd = (norm.square() / width + options.eps).rsqrt()
        y = upcast(x) * rstd[:, None]
        if weight is not None and options.cast == "mid":
            y = y.to(x.dtype) * (weight + options.offset if options.offset else weight)
        elif weight is not None:
            y = y * (upcast(weight) + options.offset)
        return y.to(options.out_dtype), rstd
    y = torch.empty((num_rows, width), dtype=options.out_dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block_m, block_n = row_tile(width, num_rows)
    with device_guard(x):
        _rms_norm_fwd_kernel[(cdiv(num_rows, block_m),)](
            x_ptr=x,
            weight_ptr=weight,
            y_ptr=y,
            rstd_ptr=rstd,
            stride_xm=x.stride(0),
            M=num_rows,
            N=width,
            eps=options.eps,
            offset=options.offset,
            HAS_WEIGHT=weight is not None,
            ROUND_MID=options.cast == "mid",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=lookup(_FWD_WARPS, width),
        )
    return y, rstd


def _rms_norm_bwd(dy, x, weight, rstd, options, needs_dw):
    num_rows, width = x.shape
    if not runs_triton_rows(x):
        x_hat = upcast(x) * rstd[:, None]
        dy = upcast(dy)
        dw = None
        if needs_dw:
            rounded = upcast(x_hat.to(x.dtype)) if options.cast == "mid" else x_hat
            dw = (dy * rounded).sum(0).to(weight.dtype)
        if weight is not None:
            dy = dy * (upcast(weight) + options.offset)
        # Not einsum: autocast would make it a bf16 product.
        mean = (dy * x_hat).mean(-1)
        dx = (dy - x_hat * mean[:, None]) * rstd[:, None]
        return dx.to(x.dtype), dw
    dx = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    block_m, block_n = row_tile(width, num_rows)
    programs = num_sms(x.device) * lookup(_BWD_PROGRAMS, width)
    programs = min(programs, cdiv(num_rows, block_m))
    partial = None
    if needs_dw:
        partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    with device_guard(x):
        _rms_norm_bwd_kernel[(programs,)](
            dy_ptr=dy,
            x_ptr=x,
            weight_ptr=weight,
            rstd_ptr=rstd,
            dx_ptr=dx,
            dw_ptr=partial,
            stride_dym=dy.stride(0),
            stride_xm=x.stride(0),
            M=num_rows,
            N=width,
            offset=options.offset,
            HAS_WEIGHT=weight is not None,
            HAS_DW=needs_dw,
            ROUND_MID=options.cast == "mid",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            NUM_STAGES=row_stages(block_m, block_n, x, dy),
            num_warps=lookup(_BWD_WARPS, width),
        )
        return dx, sum_partials(partial, weight.dtype) if needs_dw else None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, options: _Options):
        y, rstd = _rms_norm_fwd(x, weight, options)
        ctx.save_for_backward(x, weight, rstd)
        ctx.options = options
        return y

    @staticmethod
    @differentiable_once("rms_norm")
    def backward(ctx: Any, dy: torch.Tensor):
        x, weight, rstd = ctx.saved_tensors
        needs_dw = ctx.needs_input_grad[1]
        dx, dw = _rms_norm_bwd(rows_of(dy), x, weight, rstd, ctx.options, needs_dw)
        return dx, dw, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: str = "mid",
) -> torch.Tensor:
    """Return x divided by its root mean square over the last dimension, times (weight + offset).

    Args:
        x: (..., N) fp32, bf16 or fp16; the last dimension contiguous after a copy at most.
        weight: (N,) of any floating dtype, or None for no product.
        eps: Added to the mean of squares.
        offset: Added to the weight in fp32; 1.0 for Gemma.
        cast: "mid" rounds x / rms to x.dtype before the product and returns the promoted dtype of x
            and weight, as LlamaRMSNorm does; "end" multiplies in fp32 and rounds once to x.dtype,
            as GemmaRMSNorm and Olmo2RMSNorm do.

    Returns:
        (..., N). Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: x is a scalar or not floating, weight is not (N,), or cast is unknown.

    Source: https://arxiv.org/abs/1910.07467, equation 4.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor (..., N), got {x.dtype} {tuple(x.shape)}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be ({x.shape[-1]},) as x's width, got {tuple(weight.shape)}")
    if cast not in CASTS:
        raise ValueError(f"cast must be one of {', '.join(CASTS)}, got {cast!r}")
    out_dtype = x.dtype
    if weight is not None and cast == "mid":
        out_dtype = torch.promote_types(x.dtype, weight.dtype)
    if x.numel() == 0:
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return rms_norm_ref(x, weight, eps, offset=offset, cast=cast)
    options = _Options(float(eps), float(offset), cast, out_dtype)
    weight = None if weight is None else weight.contiguous()
    return _RmsNorm.apply(rows_of(x), weight, options).view(x.shape)


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
        Case("gemma-odd", (5, 257), {"offset": 1.0, "cast": "end"}),
        Case("olmo", (2, 3, 96), {"cast": "end"}),
        Case("no-weight", (7, 40), {"has_weight": False}),
        Case("rank-1", (33,)),
        Case("rank-4", (2, 3, 5, 64), {"eps": 1e-5}),
        Case("transposed", (6, 48), {"layout": "transposed"}),
        Case("strided", (9, 65), {"layout": "strided"}),
        Case("one-wide", (4, 1)),
        Case("fp32-weight", (4, 64), {"weight_dtype": torch.float32}),
        Case("fp32-weight-end", (4, 64), {"weight_dtype": torch.float32, "cast": "end"}),
        Case("many-rows", (700, 16)),
        Case("real", (4096, 2048), needs_gpu=True),
        Case("real-qk-norm", (65536, 128), needs_gpu=True),
        Case("real-wide", (512, 8192), {"offset": 1.0, "cast": "end"}, needs_gpu=True),
        Case("widest", (300, 65536), needs_gpu=True),
        Case("real-not-power", (512, 5120), needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(2, 3),
)
