"""The kernels of moe_activation.py: gate, up and the bias of an expert, forward and backward.

A program has BLOCK_S slots; backward takes their rows in steps of BLOCK_N columns.
"""

from liger_kernels.ops.backend import fp32, tl, triton
from liger_kernels.ops.glu import _activate


@triton.jit
def _gate(g, u, alpha, limit, ACTIVATION: tl.constexpr):
    """Return act(g) * u and its derivatives in g and u, all fp32."""
    if ACTIVATION == "gpt_oss":
        kept = tl.minimum(g, limit)
        s = tl.sigmoid(alpha * kept)
        act = kept * s
        shifted = tl.minimum(tl.maximum(u, -limit), limit) + 1.0
        slope = tl.where(g <= limit, s * (1.0 + alpha * kept * (1.0 - s)), 0.0)
        du = tl.where((u >= -limit) & (u <= limit), act, 0.0)
        return act * shifted, slope * shifted, du
    if ACTIVATION == "relu2":
        positive = tl.maximum(g, 0.0)
        act = positive * positive
        slope = 2.0 * positive
    else:
        act, slope = _activate(g, ACTIVATION)
    return act * u, slope * u, act


@triton.jit
def _load_gate_up(ptr, row, mask, start, N, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return gate and up of rows (BLOCK_S,) and BLOCK_N columns in fp32; up is 1 if there is none.

    mask: (BLOCK_S,), the rows that are there.
    """
    if LAYOUT == "interleaved":
        # Neighbours are loaded together and parted in registers.
        cols = 2 * start + tl.arange(0, 2 * BLOCK_N)
        is_read = mask[:, None] & (cols[None, :] < 2 * N)
        both = tl.load(ptr + row[:, None] * (2 * N) + cols[None, :], mask=is_read, other=0.0)
        gate, up = tl.split(tl.reshape(both.to(tl.float32), (row.shape[0], BLOCK_N, 2)))
    else:
        cols = start + tl.arange(0, BLOCK_N)
        is_read = mask[:, None] & (cols[None, :] < N)
        if LAYOUT == "none":
            places = ptr + row[:, None] * N + cols[None, :]
            gate = tl.load(places, mask=is_read, other=0.0).to(tl.float32)
            up = tl.full((row.shape[0], BLOCK_N), 1.0, tl.float32)
        else:
            places = ptr + row[:, None] * (2 * N) + cols[None, :]
            gate = tl.load(places, mask=is_read, other=0.0).to(tl.float32)
            up = tl.load(places + N, mask=is_read, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _store_gate_up(ptr, gate, up, row, mask, start, N, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store what _load_gate_up loads, in the dtype of ptr."""
    if LAYOUT == "interleaved":
        cols = 2 * start + tl.arange(0, 2 * BLOCK_N)
        is_written = mask[:, None] & (cols[None, :] < 2 * N)
        both = tl.reshape(tl.join(gate, up), (row.shape[0], 2 * BLOCK_N)).to(ptr.dtype.element_ty)
        tl.store(ptr + row[:, None] * (2 * N) + cols[None, :], both, mask=is_written)
    else:
        cols = start + tl.arange(0, BLOCK_N)
        is_written = mask[:, None] & (cols[None, :] < N)
        if LAYOUT == "none":
            places = ptr + row[:, None] * N + cols[None, :]
        else:
            places = ptr + row[:, None] * (2 * N) + cols[None, :]
            tl.store(places + N, up.to(ptr.dtype.element_ty), mask=is_written)
        tl.store(places, gate.to(ptr.dtype.element_ty), mask=is_written)


@triton.jit
def _load_biased(
    gate_up_ptr, bias_ptr, row, expert, mask, start, N,
    HAS_BIAS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return gate and up with the bias of the rows' experts."""
    g, u = _load_gate_up(gate_up_ptr, row, mask, start, N, LAYOUT, BLOCK_N)
    if HAS_BIAS:
        bg, bu = _load_gate_up(bias_ptr, expert, mask, start, N, LAYOUT, BLOCK_N)
        g += bg
        if LAYOUT != "none":
            u += bu
    return g, u


@triton.jit
def _fwd_kernel(
    gate_up_ptr,  # (S, 2 N), or (S, N) where LAYOUT is "none"
    rows_ptr,  # (S,) int32
    expert_ids_ptr,  # (S,)
    weights_ptr,  # (S,) or None
    bias_ptr,  # (E, 2 N) or None
    h_ptr,  # (S, N)
    S,
    N,
    alpha,
    limit,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    start = tl.program_id(1) * BLOCK_N
    row = tl.load(rows_ptr + slots, mask=slots < S, other=-1).to(tl.int64)
    is_used = row >= 0
    expert = tl.load(expert_ids_ptr + slots, mask=is_used, other=0).to(tl.int64)
    g, u = _load_biased(
        gate_up_ptr, bias_ptr, row, expert, is_used, start, N, HAS_BIAS, LAYOUT, BLOCK_N
    )
    h, _, _ = _gate(g, u, fp32(alpha), fp32(limit), ACTIVATION)
    if HAS_WEIGHTS:
        h *= tl.load(weights_ptr + slots, mask=is_used, other=0.0).to(tl.float32)[:, None]
    cols = start + tl.arange(0, BLOCK_N)
    mask = is_used[:, None] & (cols[None, :] < N)
    tl.store(h_ptr + row[:, None] * N + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    dh_ptr,  # (S, N); h is written over it when REMAKES_H
    gate_up_ptr,  # (S, 2 N), or (S, N) where LAYOUT is "none"
    rows_ptr,  # (S,) int32
    expert_ids_ptr,  # (S,)
    weights_ptr,  # (S,) or None
    bias_ptr,  # (E, 2 N) or None
    dots_ptr,  # (T, E) fp32 or None
    dgate_up_ptr,  # as gate_up
    dweights_ptr,  # (S,) fp32 or None
    S,
    N,
    K,
    E,
    alpha,
    limit,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    REMAKES_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tl.load(rows_ptr + slots, mask=slots < S, other=-1).to(tl.int64)
    is_used = row >= 0
    expert = tl.load(expert_ids_ptr + slots, mask=is_used, other=0).to(tl.int64)
    dweights = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + slots, mask=is_used, other=0.0).to(tl.float32)[:, None]
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = is_used[:, None] & (cols[None, :] < N)
        places = row[:, None] * N + cols[None, :]
        g, u = _load_biased(
            gate_up_ptr, bias_ptr, row, expert, is_used, start, N, HAS_BIAS, LAYOUT, BLOCK_N
        )
        dh = tl.load(dh_ptr + places, mask=mask, other=0.0).to(tl.float32)
        h, dg, du = _gate(g, u, fp32(alpha), fp32(limit), ACTIVATION)
        if HAS_WEIGHTS:
            dweights += dh * h
            dh *= weight
            h *= weight
        _store_gate_up(dgate_up_ptr, dh * dg, dh * du, row, is_used, start, N, LAYOUT, BLOCK_N)
        if REMAKES_H:
            tl.store(dh_ptr + places, h.to(dh_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHTS:
        dweight = tl.sum(dweights, 1)
        if HAS_DOTS:
            dweight += tl.load(dots_ptr + slots // K * E + expert, mask=is_used, other=0.0)
        tl.store(dweights_ptr + slots, dweight, mask=slots < S)
