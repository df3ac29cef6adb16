"""The kernel of rope.py, which see: q and k in one launch, a tile of tokens and heads a program."""

from dataclasses import dataclass
from typing import NamedTuple

from liger_kernels.ops.backend import tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, next_power_of_2


@dataclass(frozen=True)
class RopeOptions:
    """The options of rope that hold for all heads."""

    style: str
    rotary_dim: int
    # Counted from the right: -3 in (B, H, T, D), -2 in (B, T, H, D).
    head_axis: int


class _Tile(NamedTuple):
    """The part of a tensor that one program rotates."""

    # Of q or k, padding included.
    num_elements: int
    # They share cos and sin; alone, a head would read as much of those as of itself.
    num_heads: int
    num_warps: int


# H100, share of one read and one write at the rate of a copy, forward / backward
# (docs/results/tune-rope-h100.jsonl):
#                             4x4096x32/8x128   8x2048x32/8x64
#   2048, 8 heads, 4 warps        0.94 / 0.94      0.91 / 0.91
#   2048, 8 heads, 8 warps        0.95 / 0.94      0.90 / 0.90
#   2048, 32 heads, 4 warps       0.92 / 0.93      0.91 / 0.91
#   4096, 8 heads, 4 warps        0.93 / 0.93      0.89 / 0.88
#   8192, 8 heads, 8 warps        0.93 / 0.93      0.88 / 0.89
_TILE = _Tile(2048, 8, 4)


@triton.jit
def _turn_rows(
    x_rows,  # [BLOCK_T, BLOCK_H, 1] pointers to the first element of a head
    y_rows,
    mask,  # [BLOCK_T, BLOCK_H, 1]
    cos_at,  # [BLOCK_T, 1, BLOCK_R] pointers
    sin_at,
    mask_cos,  # [BLOCK_T, 1, BLOCK_R]
    D: tl.constexpr,
    R: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    halves = tl.arange(0, BLOCK_R)[None, None, :]
    mask_halves = mask & (halves < R // 2)
    pairs = tl.arange(0, 2 * BLOCK_R)[None, None, :]
    mask_pairs = mask & (pairs < R)
    if PAIRS_IN:
        # Neighbours move in one piece and are parted in registers; two accesses of stride 2 would
        # take every sector twice.
        x = tl.load(x_rows + pairs, mask=mask_pairs, other=0.0)
        x1, x2 = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_T, BLOCK_H, BLOCK_R, 2)))
    else:
        x1 = tl.load(x_rows + halves, mask=mask_halves, other=0.0).to(tl.float32)
        x2 = tl.load(x_rows + (R // 2 + halves), mask=mask_halves, other=0.0).to(tl.float32)
    # Each head loads them for itself, out of L1: one load for all heads would have to pass through
    # shared memory, with barriers, to reach the lanes that hold those heads.
    shape: tl.constexpr = (BLOCK_T, BLOCK_H, BLOCK_R)
    cos_at, sin_at = tl.broadcast_to(cos_at, shape), tl.broadcast_to(sin_at, shape)
    mask_cos = tl.broadcast_to(mask_cos, shape)
    cos = tl.load(cos_at, mask=mask_cos, other=0.0).to(tl.float32)
    sin = tl.load(sin_at, mask=mask_cos, other=0.0).to(tl.float32)
    if IS_BACKWARD:
        sin = -sin
    y1 = (x1 * cos - x2 * sin).to(y_rows.dtype.element_ty)
    y2 = (x2 * cos + x1 * sin).to(y_rows.dtype.element_ty)
    if PAIRS_OUT:
        y = tl.reshape(tl.join(y1, y2), (BLOCK_T, BLOCK_H, 2 * BLOCK_R))
        tl.store(y_rows + pairs, y, mask=mask_pairs)
    else:
        tl.store(y_rows + halves, y1, mask=mask_halves)
        tl.store(y_rows + (R // 2 + halves), y2, mask=mask_halves)
    if R < D:
        tail = R + tl.arange(0, BLOCK_TAIL)[None, None, :]
        mask_tail = mask & (tail < D)
        x = tl.load(x_rows + tail, mask=mask_tail, other=0.0)
        tl.store(y_rows + tail, x, mask=mask_tail)


@triton.jit
def rope_kernel(
    q_ptr,  # (B, HQ, T, D) in whatever order its strides say; D is contiguous
    k_ptr,  # (B, HK, T, D) likewise, or None where HK is 0
    yq_ptr,
    yk_ptr,
    cos_ptr,  # (B, T, R / 2)
    sin_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_yqb,
    stride_yqh,
    stride_yqt,
    stride_ykb,
    stride_ykh,
    stride_ykt,
    stride_cb,
    stride_ct,
    stride_cr,
    T,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    PAIRS_IN: tl.constexpr,
    PAIRS_OUT: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    groups_q: tl.constexpr = (HQ + BLOCK_H - 1) // BLOCK_H
    groups_k: tl.constexpr = (HK + BLOCK_H - 1) // BLOCK_H
    # Head groups run fastest, so that the programs of a token find its cos and sin in the cache.
    group = tl.program_id(0) % (groups_q + groups_k)
    block = tl.program_id(0) // (groups_q + groups_k)
    num_blocks = tl.cdiv(T, BLOCK_T)
    batch = (block // num_blocks).to(tl.int64)
    tokens = (block % num_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens = tokens.to(tl.int64)[:, None, None]
    mask_t = tokens < T
    halves = tl.arange(0, BLOCK_R)[None, None, :].to(tl.int64)
    mask_cos = mask_t & (halves < R // 2)
    offsets = batch * stride_cb + tokens * stride_ct + halves * stride_cr
    if group < groups_q:
        q_heads = (group * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
        _turn_rows(
            x_rows=q_ptr + batch * stride_qb + tokens * stride_qt + q_heads * stride_qh,
            y_rows=yq_ptr + batch * stride_yqb + tokens * stride_yqt + q_heads * stride_yqh,
            mask=mask_t & (q_heads < HQ),
            cos_at=cos_ptr + offsets,
            sin_at=sin_ptr + offsets,
            mask_cos=mask_cos,
            D=D,
            R=R,
            PAIRS_IN=PAIRS_IN,
            PAIRS_OUT=PAIRS_OUT,
            IS_BACKWARD=IS_BACKWARD,
            BLOCK_T=BLOCK_T,
            BLOCK_H=BLOCK_H,
            BLOCK_R=BLOCK_R,
            BLOCK_TAIL=BLOCK_TAIL,
        )
    elif HK > 0:
        k_heads = (group - groups_q) * BLOCK_H + tl.arange(0, BLOCK_H)
        k_heads = k_heads.to(tl.int64)[None, :, None]
        _turn_rows(
            x_rows=k_ptr + batch * stride_kb + tokens * stride_kt + k_heads * stride_kh,
            y_rows=yk_ptr + batch * stride_ykb + tokens * stride_ykt + k_heads * stride_ykh,
            mask=mask_t & (k_heads < HK),
            cos_at=cos_ptr + offsets,
            sin_at=sin_ptr + offsets,
            mask_cos=mask_cos,
            D=D,
            R=R,
            PAIRS_IN=PAIRS_IN,
            PAIRS_OUT=PAIRS_OUT,
            IS_BACKWARD=IS_BACKWARD,
            BLOCK_T=BLOCK_T,
            BLOCK_H=BLOCK_H,
            BLOCK_R=BLOCK_R,
            BLOCK_TAIL=BLOCK_TAIL,
        )


def launch_rope(q, k, yq, yk, cos, sin, options: RopeOptions, is_backward: bool) -> None:
    """Fill yq and yk, whose last dimensions are contiguous as those of q and k are."""
    launch = _launch_of(
        (q.shape, q.stride(), yq.stride()),
        None if k is None else (k.shape, k.stride(), yk.stride()),
        (cos.shape, cos.stride()),
        options,
        is_backward,
        _TILE,
    )
    launch(q, k, yq, yk, cos, sin)


@cache_by_shape
def _launch_of(q_layout, k_layout, table_layout, options, is_backward, tile) -> Launch:
    """Return the launch for such tensors; a layout is a shape and strides."""
    axis, width = options.head_axis, options.rotary_dim
    shape, strides_q, strides_yq = q_layout
    num_tokens, num_q_heads, num_k_heads = shape[-5 - axis], shape[axis], 0
    strides_q, strides_yq = _strides(strides_q, axis), _strides(strides_yq, axis)
    strides_k = strides_yk = (0, 0, 0)
    if k_layout is not None:
        k_shape, strides_k, strides_yk = k_layout
        num_k_heads = k_shape[axis]
        strides_k, strides_yk = _strides(strides_k, axis), _strides(strides_yk, axis)
    table_shape, strides_table = table_layout
    reads_pairs, writes_pairs = pair_layouts(options, is_backward)
    block_r = next_power_of_2(width // 2)
    block_h = min(next_power_of_2(max(num_q_heads, num_k_heads)), tile.num_heads)
    block_t = max(1, tile.num_elements // (2 * block_r * block_h))
    groups = cdiv(num_q_heads, block_h) + cdiv(num_k_heads, block_h)
    batch = shape[0] if len(shape) == 4 else 1
    has_batch = len(table_shape) == 3 and table_shape[0] > 1
    return Launch(
        rope_kernel,
        (batch * cdiv(num_tokens, block_t) * groups,),
        stride_qb=strides_q[0],
        stride_qh=strides_q[1],
        stride_qt=strides_q[2],
        stride_kb=strides_k[0],
        stride_kh=strides_k[1],
        stride_kt=strides_k[2],
        stride_yqb=strides_yq[0],
        stride_yqh=strides_yq[1],
        stride_yqt=strides_yq[2],
        stride_ykb=strides_yk[0],
        stride_ykh=strides_yk[1],
        stride_ykt=strides_yk[2],
        stride_cb=strides_table[0] if has_batch else 0,
        stride_ct=strides_table[-2],
        stride_cr=strides_table[-1],
        T=num_tokens,
        HQ=num_q_heads,
        HK=num_k_heads,
        D=shape[-1],
        R=width,
        PAIRS_IN=reads_pairs,
        PAIRS_OUT=writes_pairs,
        IS_BACKWARD=is_backward,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_R=block_r,
        BLOCK_TAIL=next_power_of_2(shape[-1] - width),
        num_warps=tile.num_warps,
    )


def _strides(strides: tuple[int, ...], head_axis: int) -> tuple[int, int, int]:
    """Return those of batch (0 if there is none), heads and tokens."""
    return strides[0] if len(strides) == 4 else 0, strides[head_axis], strides[-5 - head_axis]


def pair_layouts(options: RopeOptions, is_backward: bool) -> tuple[bool, bool]:
    """Return whether the two elements of a pair are neighbours where they are read, and written."""
    layouts = options.style != "half", options.style == "pairs"
    return layouts[::-1] if is_backward else layouts
