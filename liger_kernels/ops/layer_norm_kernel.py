"""The kernels of layer_norm.py, whose legend this is, their launchers, and torch code beside.

Tensors come as in_rows() leaves them.
"""

from typing import NamedTuple

import torch

from liger_kernels.ops.backend import fp32, runs_triton_rows, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, lookup
from liger_kernels.ops.rows import RowShape, persistent_row_plan, row_plan, row_stride, sum_partials

# (width, launch), from docs/results/tune-norms-h100.jsonl. Shares of a copy's rate on an H100, in
# bf16: 0.87 at 128 columns, 0.88 at 2048, 0.93 at 4096, 0.82 at 5120, 0.94 at 8192.
_FWD_SHAPES = (
    (1024, RowShape(2048, 4)),
    (2048, RowShape(4096, 8)),
    (3072, RowShape(2048, 4)),
    (4096, RowShape(2048, 8)),
    (6144, RowShape(2048, 4)),
    (16384, RowShape(2048, 16)),
    (65536, RowShape(2048, 32)),
)
# 0.79, 0.82, 0.90, 0.79, 0.89. It holds two sums more than the forward: 16384 columns already need
# 32 warps.
_BWD_SHAPES = (
    (2048, RowShape(8192, 8)),
    (3072, RowShape(2048, 8, 2)),
    (4096, RowShape(8192, 8)),
    (6144, RowShape(2048, 8, splits=False)),
    (8192, RowShape(2048, 16)),
    (65536, RowShape(2048, 32)),
)


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    bias_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    stats_ptr,  # (2, M) fp32: mean and rstd
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
    tl.store(stats_ptr + rows, mean, mask=mask_m)
    tl.store(stats_ptr + M + rows, rstd, mask=mask_m)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(weight_ptr, cols, N, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    else:
        w = tl.full(cols.shape, 1.0, tl.float32)
    return w[None, :]


@triton.jit
def _terms(x, dy, mean, rstd, w):
    """Return x_hat, its gradient, what is to be added to dw, and what to db.

    Lanes past the width hold an x_hat that is not 0, but dy is, and every sum is a product with it.
    """
    x_hat = (x.to(tl.float32) - mean) * rstd
    dy = dy.to(tl.float32)
    return x_hat, dy * w, dy * x_hat, dy


@triton.jit
def _store_sum(rows, out_ptr, cols, N):
    tl.store(out_ptr + cols, tl.sum(rows, 0).to(out_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    stats_ptr,  # (2, M) fp32: mean and rstd
    dx_ptr,  # (M, N)
    dw_ptr,  # (P, N) fp32 partial sums; the sum itself, of any dtype, if P is 1; or None
    db_ptr,  # as dw
    stride_dym,
    stride_xm,
    stride_sumsp,
    M,
    N,
    HAS_WEIGHT: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """A row is BLOCK_N columns and then, if BLOCK_REST is not 0, at most that many more."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    w = _load_weight(weight_ptr, cols, N, HAS_WEIGHT)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_REST:
        cols_r = BLOCK_N + tl.arange(0, BLOCK_REST)
        w_r = _load_weight(weight_ptr, cols_r, N, HAS_WEIGHT)
        dw_r = tl.zeros((BLOCK_M, BLOCK_REST), tl.float32)
        db_r = tl.zeros((BLOCK_M, BLOCK_REST), tl.float32)
    # Tiles are dealt out in turn, so that all programs stream neighbouring memory.
    for start in tl.range(
        program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=NUM_STAGES
    ):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        mean = tl.load(stats_ptr + rows, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(stats_ptr + M + rows, mask=mask_m, other=0.0)[:, None]
        rows, mask_m = rows[:, None], mask_m[:, None]
        mask = mask_m & (cols < N)[None, :]
        x = tl.load(x_ptr + rows * stride_xm + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows * stride_dym + cols[None, :], mask=mask, other=0.0)
        x_hat, dx_hat, dw_rows, db_rows = _terms(x, dy, mean, rstd, w)
        if HAS_DW:
            dw += dw_rows
        if HAS_DB:
            db += db_rows
        sum_dx_hat = tl.sum(dx_hat, 1)
        sum_product = tl.sum(dx_hat * x_hat, 1)
        if BLOCK_REST:
            mask_r = mask_m & (cols_r < N)[None, :]
            x = tl.load(x_ptr + rows * stride_xm + cols_r[None, :], mask=mask_r, other=0.0)
            dy = tl.load(dy_ptr + rows * stride_dym + cols_r[None, :], mask=mask_r, other=0.0)
            x_hat_r, dx_hat_r, dw_rows_r, db_rows_r = _terms(x, dy, mean, rstd, w_r)
            if HAS_DW:
                dw_r += dw_rows_r
            if HAS_DB:
                db_r += db_rows_r
            sum_dx_hat += tl.sum(dx_hat_r, 1)
            sum_product += tl.sum(dx_hat_r * x_hat_r, 1)
        c1 = (sum_dx_hat / N)[:, None]
        c2 = (sum_product / N)[:, None]
        dx = rstd * (dx_hat - c1 - x_hat * c2)
        out = dx_ptr + rows * N
        tl.store(out + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if BLOCK_REST:
            dx = rstd * (dx_hat_r - c1 - x_hat_r * c2)
            tl.store(out + cols_r[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask_r)
    partial = program.to(tl.int64) * stride_sumsp
    if HAS_DW:
        _store_sum(dw, dw_ptr + partial, cols, N)
        if BLOCK_REST:
            _store_sum(dw_r, dw_ptr + partial, cols_r, N)
    if HAS_DB:
        _store_sum(db, db_ptr + partial, cols, N)
        if BLOCK_REST:
            _store_sum(db_r, db_ptr + partial, cols_r, N)


class LayerNormOptions(NamedTuple):
    eps: float
    out_dtype: torch.dtype


def _widen(x: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return all in x's dtype, at least fp32: torch's kernel wants one dtype for everything.

    It keeps its statistics in that dtype too, so that bf16 ones would spoil the backward.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [None if other is None else other.to(dtype) for other in (x, *others)]


def layer_norm_fwd(x, weight, bias, options):
    """Return y and the statistics (2, M)."""
    width = x.shape[-1]
    if not runs_triton_rows(x):
        wide, weight, bias = _widen(x, weight, bias)
        y, mean, rstd = torch.native_layer_norm(wide, (width,), weight, bias, options.eps)
        return y.to(options.out_dtype), torch.stack((mean, rstd))
    num_rows = x.numel() // width
    y = torch.empty_like(x, dtype=options.out_dtype, memory_format=torch.contiguous_format)
    stats = torch.empty((2, num_rows), dtype=torch.float32, device=x.device)
    launch = _fwd_launch(
        lookup(_FWD_SHAPES, width),
        width,
        num_rows,
        row_stride(x),
        weight is not None,
        bias is not None,
        options.eps,
    )
    launch(
        x,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        stats,
    )
    return y, stats


@cache_by_shape
def _fwd_launch(shape, width, num_rows, stride_x, has_weight, has_bias, eps) -> Launch:
    plan = row_plan(shape, width, num_rows)
    return Launch(
        layer_norm_fwd_kernel,
        (plan.num_programs,),
        stride_xm=stride_x,
        M=num_rows,
        N=width,
        eps=eps,
        HAS_WEIGHT=has_weight,
        HAS_BIAS=has_bias,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        num_warps=plan.num_warps,
    )


def layer_norm_bwd(dy, x, weight, stats, dw_dtype, db_dtype):
    """Return dx, dw, db; dw and db are None where their dtype is."""
    if not runs_triton_rows(x):
        return _torch_bwd(dy, x, weight, stats, dw_dtype, db_dtype)
    width = x.shape[-1]
    num_rows = x.numel() // width
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    has_dw, has_db = dw_dtype is not None, db_dtype is not None
    stride = width * (has_dw + has_db)
    launch = _bwd_launch(
        lookup(_BWD_SHAPES, width),
        width,
        num_rows,
        x.element_size() + dy.element_size(),
        x.device,
        row_stride(dy),
        row_stride(x),
        stride,
        weight is not None,
        has_dw,
        has_db,
    )
    num_programs = launch.grid[0]
    sums = None
    if num_programs == 1:
        dw = torch.empty(width, dtype=dw_dtype, device=x.device) if has_dw else None
        db = torch.empty(width, dtype=db_dtype, device=x.device) if has_db else None
    else:
        # Side by side, so that one reduction serves both.
        sums = torch.empty((num_programs, stride), dtype=torch.float32, device=x.device)
        dw = sums[:, :width] if has_dw else None
        db = sums[:, -width:] if has_db else None
    launch(dy, x, None if weight is None else weight.contiguous(), stats, dx, dw, db)
    if sums is not None and stride:
        dtype = dw_dtype if dw_dtype == db_dtype else torch.float32
        sums = sum_partials(sums, dtype)
        dw = sums[:width].to(dw_dtype) if has_dw else None
        db = sums[-width:].to(db_dtype) if has_db else None
    return dx, dw, db


@cache_by_shape
def _bwd_launch(
    shape,
    width,
    num_rows,
    itemsize,
    device,
    stride_dy,
    stride_x,
    stride_sums,
    has_weight,
    has_dw,
    has_db,
) -> Launch:
    plan = persistent_row_plan(shape, width, num_rows, itemsize, device)
    return Launch(
        layer_norm_bwd_kernel,
        (plan.num_programs,),
        stride_dym=stride_dy,
        stride_xm=stride_x,
        stride_sumsp=stride_sums,
        M=num_rows,
        N=width,
        HAS_WEIGHT=has_weight,
        HAS_DW=has_dw,
        HAS_DB=has_db,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_REST=plan.block_rest,
        NUM_STAGES=plan.num_stages,
        num_warps=plan.num_warps,
    )


def _torch_bwd(dy, x, weight, stats, dw_dtype, db_dtype):
    width = x.shape[-1]
    wide, wide_dy, weight = _widen(x, dy.reshape(x.shape), weight)
    has_dw, has_db = dw_dtype is not None, db_dtype is not None
    # The bias has no part in its own gradient; the call asks only whether there is one.
    bias = wide.new_empty(width) if has_db else None
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        wide_dy, wide, (width,), stats[0], stats[1], weight, bias, (True, has_dw, has_db)
    )
    dw = dw.to(dw_dtype) if has_dw else None
    db = db.to(db_dtype) if has_db else None
    return dx.to(x.dtype), dw, db
