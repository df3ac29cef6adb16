"""Rows of experts: tokens gathered as rows, rows added up to tokens, and summed for each expert.

Legend: moe_routing.py; H width. Nothing is added by atomics: a token reads its K rows itself, in
the order of its choices, so that results are reproducible to the bit.
"""

from typing import NamedTuple

import torch

from liger_kernels.ops.backend import INTERPRETED, runs_triton, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, next_power_of_2
from liger_kernels.ops.moe_routing import Routing

# Tokens, columns at most, and warps of a program that moves rows.
_MOVE_TILE = (8, 64, 4) if INTERPRETED else (1, 2048, 8)
# Rows, columns and warps of a program that adds up the rows of an expert.
_SUM_ROWS, _SUM_BLOCK, _SUM_WARPS = 32, 64, 4


def gather_rows(
    x: torch.Tensor, routing: Routing, routing_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each slot's token as a row.

    Args:
        x: (T, H), rows contiguous.
        routing: Where each slot's row is.
        routing_weights: (T, K) contiguous; rows are multiplied with them, and rounded once.

    Returns:
        (S, H) in x's dtype; rows past the last group hold anything.
    """
    num_tokens, width = x.shape
    if not runs_triton(x):
        slots = routing.slots.long()
        rows = x[slots // routing.top_k]
        if routing_weights is None:
            return rows
        return (rows * routing_weights.flatten()[slots, None]).to(x.dtype)
    out = torch.empty((routing.slots.numel(), width), dtype=x.dtype, device=x.device)
    has_weights = routing_weights is not None
    sizes = (num_tokens, width, routing.top_k)
    launch = _gather_launch(sizes, x.stride(0), has_weights, _MOVE_TILE)
    launch(x, routing.rows, routing_weights, out)
    return out


@triton.jit
def _gather_kernel(
    x_ptr,  # (T, H)
    rows_ptr,  # (T, K) int32
    weights_ptr,  # (T, K) or None
    out_ptr,  # (S, H)
    stride_xt,
    T,
    H,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # A token is read once and written K times.
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_token = tokens < T
    mask = is_token[:, None] & (cols[None, :] < H)
    x = tl.load(x_ptr + tokens[:, None] * stride_xt + cols[None, :], mask=mask, other=0.0)
    for k in tl.static_range(K):
        row = tl.load(rows_ptr + tokens * K + k, mask=is_token, other=-1).to(tl.int64)
        value = x
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + tokens * K + k, mask=is_token, other=0.0)
            value = x.to(tl.float32) * weight.to(tl.float32)[:, None]
            value = value.to(x_ptr.dtype.element_ty)
        is_written = (row >= 0)[:, None] & (cols[None, :] < H)
        tl.store(out_ptr + row[:, None] * H + cols[None, :], value, mask=is_written)


@cache_by_shape
def _gather_launch(
    sizes: tuple[int, int, int], stride: int, has_weights: bool, tile: tuple[int, int, int]
) -> Launch:
    (num_tokens, width, top_k), (block_t, most, num_warps) = sizes, tile
    block_h = min(most, next_power_of_2(width))
    return Launch(
        _gather_kernel,
        (cdiv(num_tokens, block_t), cdiv(width, block_h)),
        stride_xt=stride,
        T=num_tokens,
        H=width,
        K=top_k,
        HAS_WEIGHTS=has_weights,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        num_warps=num_warps,
    )


class Combined(NamedTuple):
    """The sum of each token's rows, and the products of the rows with it."""

    y: torch.Tensor  # (T, H)
    dots: torch.Tensor | None  # (T, K) fp32


def combine_rows(
    rows: torch.Tensor,
    routing: Routing,
    *,
    routing_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bias_weights: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
) -> Combined:
    """Add up the rows of each token, in fp32 and rounded once.

    Args:
        rows: (S, H), contiguous.
        routing: Where each slot's row is; empty slots add nothing.
        routing_weights: (T, K) contiguous; a factor of the rows.
        bias: (E, H) contiguous, added to the rows of each expert.
        bias_weights: (T, K) contiguous; a factor of the bias alone.
        x: (T, H), rows contiguous; also return each slot's row times its token's row of x, summed.
    """
    (num_tokens, top_k), width = routing.rows.shape, rows.shape[1]
    if not runs_triton(rows):
        return _combine_torch(rows, routing, routing_weights, bias, bias_weights, x)
    y = torch.empty((num_tokens, width), dtype=rows.dtype, device=rows.device)
    dots = None
    if x is not None:
        dots = torch.empty((num_tokens, top_k), dtype=torch.float32, device=rows.device)
    has = (routing_weights is not None, bias is not None, bias_weights is not None, x is not None)
    stride = 0 if x is None else x.stride(0)
    launch = _combine_launch((num_tokens, width, top_k), has, stride, _MOVE_TILE)
    launch(rows, routing.rows, routing.expert_ids, routing_weights, bias, bias_weights, x, y, dots)
    return Combined(y, dots)


def _combine_torch(rows, routing, routing_weights, bias, bias_weights, x) -> Combined:
    is_used = (routing.rows >= 0)[..., None]
    wide = torch.promote_types(rows.dtype, torch.float32)
    values = rows[routing.rows.clamp(min=0).long()].to(wide).where(is_used, 0)
    dots = None if x is None else (values * x[:, None]).sum(-1)
    if routing_weights is not None:
        values = values * routing_weights[..., None]
    if bias is not None:
        ids = routing.expert_ids.long().where(is_used[..., 0], 0)
        biases = bias.to(wide)[ids].where(is_used, 0)
        values += biases if bias_weights is None else biases * bias_weights[..., None]
    return Combined(values.sum(1).to(rows.dtype), dots)


@triton.jit
def _combine_kernel(
    values_ptr,  # (S, H)
    rows_ptr,  # (T, K) int32
    expert_ids_ptr,  # (T, K)
    weights_ptr,  # (T, K) or None
    bias_ptr,  # (E, H) or None
    bias_weights_ptr,  # (T, K) or None
    x_ptr,  # (T, H) or None
    y_ptr,  # (T, H)
    dots_ptr,  # (T, K) fp32 or None
    stride_xt,
    T,
    H,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BIAS_WEIGHTS: tl.constexpr,
    HAS_X: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_token = tokens < T
    mask = is_token[:, None] & (cols[None, :] < H)
    acc = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    if HAS_X:
        x = tl.load(x_ptr + tokens[:, None] * stride_xt + cols[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
    for k in tl.static_range(K):
        slots = tokens * K + k
        row = tl.load(rows_ptr + slots, mask=is_token, other=-1).to(tl.int64)
        is_read = (row >= 0)[:, None] & (cols[None, :] < H)
        places = values_ptr + row[:, None] * H + cols[None, :]
        value = tl.load(places, mask=is_read, other=0.0).to(tl.float32)
        if HAS_X:
            tl.store(dots_ptr + slots, tl.sum(value * x, 1), mask=is_token)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + slots, mask=is_token, other=0.0).to(tl.float32)
            value *= weight[:, None]
        if HAS_BIAS:
            expert = tl.load(expert_ids_ptr + slots, mask=is_token, other=0).to(tl.int64)
            places = bias_ptr + expert[:, None] * H + cols[None, :]
            bias = tl.load(places, mask=is_read, other=0.0).to(tl.float32)
            if HAS_BIAS_WEIGHTS:
                weight = tl.load(bias_weights_ptr + slots, mask=is_token, other=0.0)
                bias *= weight.to(tl.float32)[:, None]
            value += bias
        acc += value
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tokens[:, None] * H + cols[None, :], y, mask=mask)


@cache_by_shape
def _combine_launch(
    sizes: tuple[int, int, int],
    has: tuple[bool, bool, bool, bool],
    stride: int,
    tile: tuple[int, int, int],
) -> Launch:
    (num_tokens, width, top_k), (block_t, most, num_warps) = sizes, tile
    has_weights, has_bias, has_bias_weights, has_x = has
    # A program that sums over a row takes all of it.
    block_h = next_power_of_2(width) if has_x else min(most, next_power_of_2(width))
    return Launch(
        _combine_kernel,
        (cdiv(num_tokens, block_t), cdiv(width, block_h)),
        stride_xt=stride,
        T=num_tokens,
        H=width,
        K=top_k,
        HAS_WEIGHTS=has_weights,
        HAS_BIAS=has_bias,
        HAS_BIAS_WEIGHTS=has_bias_weights,
        HAS_X=has_x,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        num_warps=num_warps,
    )


def sum_groups(
    rows: torch.Tensor, routing: Routing, routing_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum of the rows of each expert, (E, H) in the rows' dtype, added up in fp32.

    Args:
        rows: (S, H), contiguous.
        routing: Where each slot's row is.
        routing_weights: (T, K) contiguous; a factor of the rows.
    """
    num_experts, width = routing.offsets.numel(), rows.shape[1]
    if not runs_triton(rows):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if routing_weights is not None:
            wide = wide * routing_weights.flatten()[routing.slots.long(), None]
        wide = wide[: routing.rows.numel()]
        sums = wide.new_zeros((num_experts + 1, width))
        places = torch.arange(rows.shape[0], device=rows.device)
        experts = torch.searchsorted(routing.offsets.long(), places, right=True)
        return sums.index_add_(0, experts, wide)[:num_experts].to(rows.dtype)
    out = torch.empty((num_experts, width), dtype=rows.dtype, device=rows.device)
    launch = _sum_launch(num_experts, width, routing_weights is not None)
    launch(rows, routing.offsets, routing.slots, routing_weights, out)
    return out


@triton.jit
def _sum_kernel(
    rows_ptr,  # (S, H)
    offsets_ptr,  # (E,) int32
    slots_ptr,  # (S,) int32
    weights_ptr,  # (S,) or None
    out_ptr,  # (E, H)
    H,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_S, BLOCK_H), tl.float32)
    for begin in range(start, end, BLOCK_S):
        rows = begin + tl.arange(0, BLOCK_S)
        mask = (rows[:, None] < end) & (cols[None, :] < H)
        offsets = rows[:, None].to(tl.int64) * H + cols[None, :]
        value = tl.load(rows_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            slot = tl.load(slots_ptr + rows, mask=rows < end, other=0)
            weight = tl.load(weights_ptr + slot, mask=rows < end, other=0.0).to(tl.float32)
            value *= weight[:, None]
        acc += value
    out = tl.sum(acc, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert * H + cols, out, mask=cols < H)


@cache_by_shape
def _sum_launch(num_experts: int, width: int, has_weights: bool) -> Launch:
    return Launch(
        _sum_kernel,
        (num_experts, cdiv(width, _SUM_BLOCK)),
        H=width,
        HAS_WEIGHTS=has_weights,
        BLOCK_S=_SUM_ROWS,
        BLOCK_H=_SUM_BLOCK,
        num_warps=_SUM_WARPS,
    )
