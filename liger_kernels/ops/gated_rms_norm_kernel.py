"""The Triton kernels of gated_rms_norm.py, whose legend this is."""

from liger_kernels.ops.backend import fp32, tl, triton


@triton.jit
def _open(g, ACTIVATION: tl.constexpr):
    """Return act(g) and its derivative; g is fp32."""
    s = tl.sigmoid(g)
    if ACTIVATION == "silu":
        act = g * s
        slope = s * (1.0 + g * (1.0 - s))
    else:
        act = s
        slope = s * (1.0 - s)
    return act, slope


@triton.jit
def gated_rms_norm_fwd_kernel(
    x_ptr,  # (M, N)
    gate_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    rstd_ptr,  # (M, G) fp32
    stride_xm,
    stride_gatem,
    M,
    N,
    W,
    eps,
    GATE_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_N)
    cols = group * W + lanes
    mask_m = rows < M
    mask_n = lanes < W
    mask = mask_m[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    gate = tl.load(gate_ptr + rows[:, None] * stride_gatem + cols[None, :], mask=mask, other=0.0)
    y = x.to(tl.float32)
    act, _ = _open(gate.to(tl.float32), ACTIVATION)
    if GATE_FIRST:
        y *= act
    rstd = tl.rsqrt(tl.sum(y * y, 1) / W + fp32(eps))
    tl.store(rstd_ptr + rows * tl.num_programs(1) + group, rstd, mask=mask_m)
    y *= rstd[:, None]
    if ROUND_BEFORE_WEIGHT:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if not GATE_FIRST:
        if ROUND_PRODUCT:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y *= act
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_rms_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    gate_ptr,  # (M, N)
    weight_ptr,  # (N,) or None
    rstd_ptr,  # (M, G) fp32
    dx_ptr,  # (M, N)
    dgate_ptr,  # (M, N)
    dw_ptr,  # (P, N) fp32 partial sums, or None
    stride_dym,
    stride_xm,
    stride_gatem,
    M,
    N,
    W,
    GATE_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DW: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    group = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_N)
    cols = group * W + lanes
    mask_n = lanes < W
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[None, :]
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
        gate = gate_ptr + rows[:, None] * stride_gatem + cols[None, :]
        gate = tl.load(gate, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows * tl.num_programs(1) + group, mask=mask_m, other=0.0)
        rstd = rstd[:, None]
        x = x.to(tl.float32)
        dy = dy.to(tl.float32)
        act, slope = _open(gate, ACTIVATION)
        x_hat = x * rstd
        if GATE_FIRST:
            x_hat *= act
        rounded = x_hat
        if ROUND_BEFORE_WEIGHT:
            rounded = x_hat.to(x_ptr.dtype.element_ty).to(tl.float32)
        dgate = dy * slope
        if not GATE_FIRST:
            product = rounded
            if HAS_WEIGHT:
                product *= w
            if ROUND_PRODUCT:
                product = product.to(x_ptr.dtype.element_ty).to(tl.float32)
            dgate *= product
            dy *= act
        if HAS_DW:
            dw += dy * rounded
        if HAS_WEIGHT:
            dy *= w
        dx = rstd * (dy - x_hat * (tl.sum(dy * x_hat, 1) / W)[:, None])
        if GATE_FIRST:
            dgate = dx * x * slope
            dx *= act
        out = rows[:, None] * N + cols[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    if HAS_DW:
        tl.store(dw_ptr + program.to(tl.int64) * N + cols, tl.sum(dw, 0), mask=mask_n)
