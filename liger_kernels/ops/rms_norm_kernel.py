"""Kernels and launchers of rms_norm.py and fused_add_rms_norm.py, and their torch code.

Legend: M rows, N width, P persistent programs of the backward.
x is the tensor that is normed; the fused op makes it in its forward, out of x and residual, and
adds the gradient of that sum in its backward. Tensors come as in_rows() leaves them.
"""

from typing import NamedTuple

import torch

from liger_kernels.ops.backend import fp32, runs_triton_rows, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, lookup
from liger_kernels.ops.op import upcast
from liger_kernels.ops.rows import RowShape, persistent_row_plan, row_plan, row_stride, sum_partials

# (width, launch), from docs/results/tune-norms-h100.jsonl. Shares of a copy's rate on an H100, in
# bf16: 0.89 at 128 columns, 0.89 at 2048, 0.94 at 4096, 0.90 at 5120, 0.94 at 8192; with the sum of
# fused_add_rms_norm 0.94 to 0.98.
_FWD_SHAPES = (
    (1024, RowShape(4096, 4)),
    (2048, RowShape(4096, 4)),
    (6144, RowShape(2048, 8)),
    (16384, RowShape(2048, 16)),
    (65536, RowShape(2048, 32)),
)
# 0.82 at 128 columns, 0.83 at 2048, 0.90 at 4096, 0.81 at 5120, 0.90 at 8192.
_BWD_SHAPES = (
    (2048, RowShape(8192, 8)),
    (3072, RowShape(2048, 8, 2)),
    (4096, RowShape(8192, 8)),
    (6144, RowShape(2048, 8, splits=False)),
    (16384, RowShape(2048, 16)),
    (65536, RowShape(2048, 32)),
)
# With the gradient of the sum there is a third tensor to load ahead, and the same tiles overflow
# shared memory: 0.83, 0.86, 0.93, 0.88, 0.89.
_ADD_BWD_SHAPES = (
    (1024, RowShape(4096, 4, 2)),
    (2048, RowShape(4096, 8, num_stages=5)),
    (3072, RowShape(8192, 8)),
    (4096, RowShape(2048, 8, num_stages=5)),
    (8192, RowShape(2048, 8)),
    (16384, RowShape(2048, 16)),
    (65536, RowShape(2048, 32)),
)


class NormOptions(NamedTuple):
    """How a norm computes. Every call makes one: a tuple costs a third of a frozen dataclass."""

    eps: float
    offset: float
    # "before_weight" rounds x_hat to x's dtype before the product with the weight; "after_weight"
    # rounds the product alone.
    cast: str
    out_dtype: torch.dtype


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    weight_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    total_ptr,  # (M, N) x + residual, or None
    rstd_ptr,  # (M,) fp32; read if HAS_RSTD, else written
    stride_xm,
    stride_residualm,
    M,
    N,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask_m = rows < M
    mask_n = cols < N
    mask = mask_m[:, None] & mask_n[None, :]
    out = rows[:, None] * N + cols[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = residual_ptr + rows[:, None] * stride_residualm + cols[None, :]
        residual = tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        # Rounded before the norm: y belongs to the sum that the next layer reads.
        total = (x.to(tl.float32) + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, total, mask=mask)
    else:
        total = x
    x = total.to(tl.float32)
    if HAS_RSTD:
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    else:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / N + fp32(eps))
        tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        if ROUND_BEFORE_WEIGHT:
            y = y.to(total.dtype).to(tl.float32)
        w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)
        y = y * (w + fp32(offset))[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(weight_ptr, cols, N, offset, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + fp32(offset)
    else:
        w = tl.full(cols.shape, 1.0, tl.float32)
    return w[None, :]


@triton.jit
def _terms(x, dy, w, rstd, ROUND_BEFORE_WEIGHT: tl.constexpr):
    """Return x_hat, its gradient before the mean is taken off, and what is to be added to dw."""
    x_hat = x.to(tl.float32) * rstd
    dy = dy.to(tl.float32)
    rounded = x_hat
    if ROUND_BEFORE_WEIGHT:
        rounded = x_hat.to(x.dtype).to(tl.float32)
    return x_hat, dy * w, dy * rounded


@triton.jit
def _store_dx(dx, dx_ptr, dtotal_ptr, out, dtotal_at, mask, HAS_DTOTAL: tl.constexpr):
    if HAS_DTOTAL:
        dx += tl.load(dtotal_ptr + dtotal_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    dtotal_ptr,  # (M, N), added to dx, or None
    x_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    rstd_ptr,  # (M,) fp32
    dx_ptr,  # (M, N)
    dw_ptr,  # (P, N) fp32 partial sums, (N,) the sum if P is 1, or None
    stride_dym,
    stride_dtotalm,
    stride_xm,
    M,
    N,
    offset,
    HAS_DTOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DW: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """A row is BLOCK_N columns and then, if BLOCK_REST is not 0, at most that many more."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    w = _load_weight(weight_ptr, cols, N, offset, HAS_WEIGHT)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_REST:
        cols_r = BLOCK_N + tl.arange(0, BLOCK_REST)
        w_r = _load_weight(weight_ptr, cols_r, N, offset, HAS_WEIGHT)
        dw_r = tl.zeros((BLOCK_M, BLOCK_REST), tl.float32)
    # Tiles are dealt out in turn, so that all programs stream neighbouring memory.
    for start in tl.range(
        program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M, num_stages=NUM_STAGES
    ):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = rows < M
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)[:, None]
        rows, mask_m = rows[:, None], mask_m[:, None]
        mask = mask_m & (cols < N)[None, :]
        x = tl.load(x_ptr + rows * stride_xm + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows * stride_dym + cols[None, :], mask=mask, other=0.0)
        x_hat, dx_hat, dw_rows = _terms(x, dy, w, rstd, ROUND_BEFORE_WEIGHT)
        if HAS_DW:
            dw += dw_rows
        mean = tl.sum(dx_hat * x_hat, 1) / N
        if BLOCK_REST:
            mask_r = mask_m & (cols_r < N)[None, :]
            x = tl.load(x_ptr + rows * stride_xm + cols_r[None, :], mask=mask_r, other=0.0)
            dy = tl.load(dy_ptr + rows * stride_dym + cols_r[None, :], mask=mask_r, other=0.0)
            x_hat_r, dx_hat_r, dw_rows_r = _terms(x, dy, w_r, rstd, ROUND_BEFORE_WEIGHT)
            if HAS_DW:
                dw_r += dw_rows_r
            mean += tl.sum(dx_hat_r * x_hat_r, 1) / N
        mean = mean[:, None]
        dx = rstd * (dx_hat - x_hat * mean)
        out, dtotal = rows * N + cols[None, :], rows * stride_dtotalm + cols[None, :]
        _store_dx(dx, dx_ptr, dtotal_ptr, out, dtotal, mask, HAS_DTOTAL)
        if BLOCK_REST:
            dx = rstd * (dx_hat_r - x_hat_r * mean)
            out, dtotal = rows * N + cols_r[None, :], rows * stride_dtotalm + cols_r[None, :]
            _store_dx(dx, dx_ptr, dtotal_ptr, out, dtotal, mask_r, HAS_DTOTAL)
    if HAS_DW:
        dw_ptr += program.to(tl.int64) * N
        dtype = dw_ptr.dtype.element_ty
        tl.store(dw_ptr + cols, tl.sum(dw, 0).to(dtype), mask=cols < N)
        if BLOCK_REST:
            tl.store(dw_ptr + cols_r, tl.sum(dw_r, 0).to(dtype), mask=cols_r < N)


def rms_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    options: NormOptions,
    *,
    residual: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, rstd and what was normed: x, or x + residual. A given rstd is not recomputed."""
    if not runs_triton_rows(x):
        return _torch_fwd(x, weight, options, residual, rstd)
    width = x.shape[-1]
    num_rows = x.numel() // width
    packed = torch.contiguous_format
    y = torch.empty_like(x, dtype=options.out_dtype, memory_format=packed)
    total = x
    if residual is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        total = torch.empty_like(x, dtype=dtype, memory_format=packed)
    has_rstd = rstd is not None
    if rstd is None:
        rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    launch = _fwd_launch(
        lookup(_FWD_SHAPES, width),
        width,
        num_rows,
        row_stride(x),
        None if residual is None else row_stride(residual),
        weight is not None,
        has_rstd,
        options,
    )
    launch(
        x,
        residual,
        None if weight is None else weight.contiguous(),
        y,
        None if residual is None else total,
        rstd,
    )
    return y, rstd, total


@cache_by_shape
def _fwd_launch(
    shape, width, num_rows, stride_x, stride_residual, has_weight, has_rstd, options
) -> Launch:
    plan = row_plan(shape, width, num_rows)
    return Launch(
        rms_norm_fwd_kernel,
        (plan.num_programs,),
        stride_xm=stride_x,
        stride_residualm=stride_residual or 0,
        M=num_rows,
        N=width,
        eps=options.eps,
        offset=options.offset,
        HAS_RESIDUAL=stride_residual is not None,
        HAS_WEIGHT=has_weight,
        HAS_RSTD=has_rstd,
        ROUND_BEFORE_WEIGHT=options.cast == "before_weight",
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        num_warps=plan.num_warps,
    )


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    options: NormOptions,
    needs_dw: bool,
    *,
    dtotal: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return dx, with dtotal added, and dw, or None where it is not needed."""
    if not runs_triton_rows(x):
        return _torch_bwd(dy, x, weight, rstd, options, needs_dw, dtotal)
    width = x.shape[-1]
    num_rows = x.numel() // width
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    itemsize = x.element_size() + dy.element_size()
    shapes = _BWD_SHAPES
    if dtotal is not None:
        itemsize += dtotal.element_size()
        shapes = _ADD_BWD_SHAPES
    launch = _bwd_launch(
        lookup(shapes, width),
        width,
        num_rows,
        itemsize,
        x.device,
        row_stride(dy),
        None if dtotal is None else row_stride(dtotal),
        row_stride(x),
        weight is not None,
        needs_dw,
        options,
    )
    num_programs = launch.grid[0]
    dw = None
    if needs_dw and num_programs == 1:
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    elif needs_dw:
        dw = torch.empty((num_programs, width), dtype=torch.float32, device=x.device)
    launch(dy, dtotal, x, None if weight is None else weight.contiguous(), rstd, dx, dw)
    if needs_dw and num_programs > 1:
        dw = sum_partials(dw, weight.dtype)
    return dx, dw


@cache_by_shape
def _bwd_launch(
    shape,
    width,
    num_rows,
    itemsize,
    device,
    stride_dy,
    stride_dtotal,
    stride_x,
    has_weight,
    has_dw,
    options,
) -> Launch:
    plan = persistent_row_plan(shape, width, num_rows, itemsize, device)
    return Launch(
        rms_norm_bwd_kernel,
        (plan.num_programs,),
        stride_dym=stride_dy,
        stride_dtotalm=stride_dtotal or 0,
        stride_xm=stride_x,
        M=num_rows,
        N=width,
        offset=options.offset,
        HAS_DTOTAL=stride_dtotal is not None,
        HAS_WEIGHT=has_weight,
        HAS_DW=has_dw,
        ROUND_BEFORE_WEIGHT=options.cast == "before_weight",
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_REST=plan.block_rest,
        NUM_STAGES=plan.num_stages,
        num_warps=plan.num_warps,
    )


def _torch_fwd(x, weight, options, residual, rstd):
    if residual is not None:
        x = x + residual.reshape(x.shape)
    if rstd is None:
        # One fused reduction; squaring into a copy would double the traffic on a CPU.
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
        rstd = (norm.square() / x.shape[-1] + options.eps).rsqrt()
    y = upcast(x) * rstd[..., None]
    if weight is not None and options.cast == "before_weight":
        y = y.to(x.dtype) * (weight + options.offset if options.offset else weight)
    elif weight is not None:
        y = y * (upcast(weight) + options.offset)
    return y.to(options.out_dtype), rstd, x


def _torch_bwd(dy, x, weight, rstd, options, needs_dw, dtotal):
    rstd = rstd.reshape(x.shape[:-1])[..., None]
    x_hat = upcast(x) * rstd
    dy = upcast(dy).reshape(x.shape)
    dw = None
    if needs_dw:
        rounded = upcast(x_hat.to(x.dtype)) if options.cast == "before_weight" else x_hat
        dw = (dy * rounded).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if weight is not None:
        dy = dy * (upcast(weight) + options.offset)
    # Not einsum: autocast would make it a bf16 product.
    mean = (dy * x_hat).mean(-1, keepdim=True)
    dx = (dy - x_hat * mean) * rstd
    if dtotal is not None:
        dx = dx + upcast(dtotal).reshape(x.shape)
    return dx.to(x.dtype), dw
