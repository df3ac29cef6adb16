"""Layer norm: y = weight * x_hat + bias, x_hat = (x - mean) * rstd, rstd = 1 / sqrt(var(x) + eps).

Legend: M rows, N width, P persistent programs of the backward.
Rounding: statistics, product and sum are computed in fp32, and the result is rounded once, to x's
dtype. The variance is the mean of the squared distances from the mean, over the true width.
Memory: saves x, weight and two fp32 numbers a row.
Source: Ba, Kiros and Hinton, Layer Normalization, https://arxiv.org/abs/1607.06450, eq. 3 and 4.
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


def layer_norm_ref(x, weight=None, bias=None, eps=1e-5):
    """The definition, in plain torch."""
    wide = upcast(x)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * upcast(weight)
    if bias is not None:
        y = y + upcast(bias)
    return y.to(x.dtype)


# (width, warps): elements a lane stays at 8 to 32. First guess, to be replaced by measurements.
_FWD_WARPS = ((1024, 4), (4096, 8), (16384, 16), (65536, 32))
# The backward holds two sums more than the forward: 8192 columns already need 16 warps.
_BWD_WARPS = ((2048, 4), (4096, 8), (8192, 16), (65536, 32))
# (width, programs a multiprocessor) of the persistent backward.
_BWD_PROGRAMS = ((1024, 4), (4096, 2), (65536, 1))


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    bias_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    stride_xm,
    M,
    N,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    mean = tl.sum(x, 1) / N
    # Lanes past the width hold 0, not the mean: each would add mean^2 to the variance.
    centred = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + fp32(eps))
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    dx_ptr,  # (M, N)
    partial_ptr,  # (P, N or 2 N) fp32: partial sums of dw, then of db, those that are asked for
    stride_dym,
    stride_xm,
    M,
    N,
    HAS_WEIGHT: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    mask_n = cols < N
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Tiles are dealt out in turn, so that all programs stream neighbouring memory.
    for start in tl.range(
        program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=NUM_STAGES
    ):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)[:, None]
        # Lanes past the width are not 0 here; dy is, and every sum below is a product with it.
        x_hat = (x.to(tl.float32) - mean) * rstd
        dy = dy.to(tl.float32)
        if HAS_DW:
            dw += dy * x_hat
        if HAS_DB:
            db += dy
        if HAS_WEIGHT:
            dy *= w[None, :]
        mean_dy = (tl.sum(dy, 1) / N)[:, None]
        mean_dy_x_hat = (tl.sum(dy * x_hat, 1) / N)[:, None]
        dx = rstd * (dy - mean_dy - x_hat * mean_dy_x_hat)
        out = dx_ptr + rows[:, None] * N + cols[None, :]
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_DW or HAS_DB:
        width = N * 2 if HAS_DW and HAS_DB else N
        out = partial_ptr + program.to(tl.int64) * width + cols
        if HAS_DW:
            tl.store(out, tl.sum(dw, 0), mask=mask_n)
            out += N
        if HAS_DB:
            tl.store(out, tl.sum(db, 0), mask=mask_n)


@dataclass(frozen=True)
class _Options:
    eps: float
    out_dtype: torch.dtype


def _widen(x: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return all in x's dtype, at least fp32: torch's kernel wants one dtype for everything.

    It keeps its statistics in that dtype too, so that bf16 ones would spoil the backward.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [None if other is None else other.to(dtype) for other in (x, *others)]


def _layer_norm_fwd(x, weight, bias, options):
    num_rows, width = x.shape
    if not runs_triton_rows(x):
        wide, weight, bias = _widen(x, weight, bias)
        y, mean, rstd = torch.native_layer_norm(wide, (width,), weight, bias, options.eps)
        return y.to(options.out_dtype), mean, rstd
    y = torch.empty((num_rows, width), dtype=options.out_dtype, device=x.device)
    mean = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block_m, block_n = row_tile(width, num_rows)
    with device_guard(x):
        _layer_norm_fwd_kernel[(cdiv(num_rows, block_m),)](
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            stride_xm=x.stride(0),
            M=num_rows,
            N=width,
            eps=options.eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=lookup(_FWD_WARPS, width),
        )
    return y, mean, rstd


def _layer_norm_bwd(dy, x, weight, mean, rstd, dw_dtype, db_dtype):
    """Return dx, dw, db; dw and db are None where their dtype is."""
    num_rows, width = x.shape
    has_dw, has_db = dw_dtype is not None, db_dtype is not None
    if not runs_triton_rows(x):
        wide, wide_dy, weight = _widen(x, dy, weight)
        # The bias has no part in its own gradient; the call asks only whether there is one.
        bias = wide.new_empty(width) if has_db else None
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            wide_dy, wide, (width,), mean, rstd, weight, bias, (True, has_dw, has_db)
        )
        return (
            dx.to(x.dtype),
            dw.to(dw_dtype) if has_dw else None,
            db.to(db_dtype) if has_db else None,
        )
    dx = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    block_m, block_n = row_tile(width, num_rows)
    programs = num_sms(x.device) * lookup(_BWD_PROGRAMS, width)
    programs = min(programs, cdiv(num_rows, block_m))
    partial = None
    if has_dw or has_db:
        # Side by side, so that one reduction serves both.
        shape = (programs, width * (has_dw + has_db))
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    with device_guard(x):
        _layer_norm_bwd_kernel[(programs,)](
            dy_ptr=dy,
            x_ptr=x,
            weight_ptr=weight,
            mean_ptr=mean,
            rstd_ptr=rstd,
            dx_ptr=dx,
            partial_ptr=partial,
            stride_dym=dy.stride(0),
            stride_xm=x.stride(0),
            M=num_rows,
            N=width,
            HAS_WEIGHT=weight is not None,
            HAS_DW=has_dw,
            HAS_DB=has_db,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            NUM_STAGES=row_stages(block_m, block_n, x, dy),
            num_warps=lookup(_BWD_WARPS, width),
        )
        dw = db = None
        if partial is not None:
            dtypes = {dtype for dtype in (dw_dtype, db_dtype) if dtype is not None}
            sums = sum_partials(partial, dtypes.pop() if len(dtypes) == 1 else torch.float32)
            dw = sums[:width].to(dw_dtype) if has_dw else None
            db = sums[-width:].to(db_dtype) if has_db else None
    return dx, dw, db


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, options: _Options):
        y, mean, rstd = _layer_norm_fwd(x, weight, bias, options)
        ctx.save_for_backward(x, weight, mean, rstd)
        _, needs_dw, needs_db, _ = ctx.needs_input_grad
        ctx.dw_dtype = weight.dtype if needs_dw else None
        ctx.db_dtype = bias.dtype if needs_db else None
        return y

    @staticmethod
    @differentiable_once("layer_norm")
    def backward(ctx: Any, dy: torch.Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        grads = _layer_norm_bwd(rows_of(dy), x, weight, mean, rstd, ctx.dw_dtype, ctx.db_dtype)
        return *grads, None


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
        ValueError: x is a scalar or not floating, or weight or bias is not (N,).

    Source: https://arxiv.org/abs/1607.06450, equations 3 and 4.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor (..., N), got {x.dtype} {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must be ({x.shape[-1]},) as x's width, got {tuple(value.shape)}"
            )
    out_dtype = _out_dtype(x)
    if x.numel() == 0:
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return layer_norm_ref(x, weight, bias, eps).to(out_dtype)
    # A parameter cut out of a larger tensor may be strided; the kernels step by one.
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    options = _Options(float(eps), out_dtype)
    return _LayerNorm.apply(rows_of(x), weight, bias, options).view(x.shape)


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
)
