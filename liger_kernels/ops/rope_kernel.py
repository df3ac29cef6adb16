"""The kernel of rope.py, which see: q and k in one launch, a tile of tokens and heads a program."""

from liger_kernels.ops.launch import tl, triton


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
