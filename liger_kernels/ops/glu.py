"""Gated linear units: y = act(gate) * up; act is silu in swiglu and gelu in geglu.

Legend: M rows, N width.
Rounding: act(gate) is computed in fp32 and rounded to gate's dtype before the product, and so is
the gradient that reaches act: the places where eager code rounds.
Memory: saves gate and up, and computes act(gate) again in backward; eager code keeps it as well.
The backward can also make y again, into dy's buffer: glu_mlp.py need not keep it then.
Sources: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202, eq. 5;
Hendrycks and Gimpel, Gaussian Error Linear Units, https://arxiv.org/abs/1606.08415, for both gelus.
"""

from typing import Any

import torch
import torch.nn.functional as F

from liger_kernels.ops.arguments import Choice, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import is_left_to_compiler, runs_triton, tl, triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, next_power_of_2
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn, traffic
from liger_kernels.ops.rows import rows_of

# geglu's `approximate`, as torch spells it -> the kernels' name of the activation.
_GELUS = {"tanh": "gelu_tanh", "none": "gelu"}
_APPROXIMATE = Choice("approximate", _GELUS)
_TENSORS = tuple(
    TensorArgument(name, "(..., N)", "be a floating tensor (..., N)") for name in ("gate", "up")
)


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch."""
    return F.silu(gate) * up


def geglu_ref(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh") -> torch.Tensor:
    """The definition, in plain torch."""
    return F.gelu(gate, approximate=approximate) * up


# Elements and warps of a program: the rate of a copy on an H100 (docs/results/ops-h100.json).
_BLOCK = 2048
_NUM_WARPS = 8


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """Return act(g) and its derivative; g is fp32."""
    if ACTIVATION == "gelu":
        # The normal distribution's cdf and pdf; the factors are sqrt(1 / 2) and sqrt(1 / (2 pi)).
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        act = g * cdf
        slope = cdf + g * pdf
    else:
        inner = g
        inner_slope = 1.0
        if ACTIVATION == "gelu_tanh":
            # 0.5 (1 + tanh(u)) is sigmoid(2 u), which does not cancel where tanh nears -1.
            # The factors are 2 sqrt(2 / pi) and 0.044715 times it.
            inner = g * (1.5957691216057308 + 0.07135481627260025 * g * g)
            inner_slope = 1.5957691216057308 + 0.21406444881780076 * g * g
        s = tl.sigmoid(inner)
        act = g * s
        slope = s * (1.0 + g * (1.0 - s) * inner_slope)
    return act, slope


@triton.jit
def _tile_of(N, BLOCK_N: tl.constexpr):
    """Return the row and the columns of this program; rows are cut into tiles of BLOCK_N."""
    num_tiles = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)
    cols = (program % num_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, cols


@triton.jit
def _glu_fwd_kernel(
    gate_ptr,  # (M, N)
    up_ptr,  # (M, N)
    y_ptr,  # (M, N)
    stride_gatem,
    stride_upm,
    N,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, cols = _tile_of(N, BLOCK_N)
    mask = cols < N
    g = tl.load(gate_ptr + row * stride_gatem + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * stride_upm + cols, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activate(g, ACTIVATION)
    y = act.to(gate_ptr.dtype.element_ty).to(tl.float32) * u
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr,  # (M, N); y is written over it when REMAKES_Y
    gate_ptr,  # (M, N)
    up_ptr,  # (M, N)
    dgate_ptr,  # (M, N) or None
    dup_ptr,  # (M, N) or None
    stride_dym,
    stride_gatem,
    stride_upm,
    stride_dgatem,
    stride_dupm,
    N,
    HAS_DGATE: tl.constexpr,
    HAS_DUP: tl.constexpr,
    REMAKES_Y: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, cols = _tile_of(N, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * stride_gatem + cols, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activate(g, ACTIVATION)
    act = act.to(gate_ptr.dtype.element_ty).to(tl.float32)
    if HAS_DUP:
        dup = (dy * act).to(dup_ptr.dtype.element_ty)
        tl.store(dup_ptr + row * stride_dupm + cols, dup, mask=mask)
    if HAS_DGATE or REMAKES_Y:
        u = tl.load(up_ptr + row * stride_upm + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_DGATE:
        dact = (dy * u).to(gate_ptr.dtype.element_ty).to(tl.float32)
        dgate = (dact * slope).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * stride_dgatem + cols, dgate, mask=mask)
    if REMAKES_Y:
        y = (act * u).to(dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + row * stride_dym + cols, y, mask=mask)


def _tiling(
    num_rows: int, width: int, strides: tuple[int, ...]
) -> tuple[tuple[int], int, int, tuple[int, ...]]:
    """Return (grid, N, BLOCK_N, strides) of a launch over (M, N) tensors of these row strides.

    Packed tensors are one row of M * N elements, whatever their width: tiles of a fixed size then
    waste no lanes, and the tile does not follow the number of rows.
    """
    if all(stride == width for stride in strides):
        size = num_rows * width
        return (cdiv(size, _BLOCK),), size, _BLOCK, (0,) * len(strides)
    block = min(_BLOCK, next_power_of_2(width))
    return (num_rows * cdiv(width, block),), width, block, strides


def _act(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _act_bwd(dact, gate, activation, dgate) -> None:
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dact, gate, grad_input=dgate)
        return
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    torch.ops.aten.gelu_backward.grad_input(dact, gate, approximate=approximate, grad_input=dgate)


def _glu_fwd(gate, up, activation):
    out_dtype = torch.promote_types(gate.dtype, up.dtype)
    if not (runs_triton(gate) and runs_triton(up)):
        act = _act(gate, activation)
        return act.mul_(up) if act.dtype == out_dtype else act * up
    y = torch.empty(gate.shape, dtype=out_dtype, device=gate.device)
    _fwd_launch(*gate.shape, (gate.stride(0), up.stride(0)), activation)(gate, up, y)
    return y


@cache_by_shape
def _fwd_launch(num_rows: int, width: int, strides: tuple[int, ...], activation: str) -> Launch:
    grid, width, block_n, strides = _tiling(num_rows, width, strides)
    return Launch(
        _glu_fwd_kernel,
        grid,
        stride_gatem=strides[0],
        stride_upm=strides[1],
        N=width,
        ACTIVATION=activation,
        BLOCK_N=block_n,
        num_warps=_NUM_WARPS,
    )


def _glu_bwd(dy, gate, up, activation, dgate, dup, *, remakes_y=False):
    """Write the gradients into dgate and dup, (M, N) or None, and y over dy if remakes_y."""
    if not (runs_triton(gate) and runs_triton(up)):
        act = _act(gate, activation)
        if dup is not None:
            torch.mul(act, dy, out=dup)
        if dgate is not None:
            _act_bwd((dy * up).to(gate.dtype), gate, activation, dgate)
        if remakes_y:
            torch.mul(act, up, out=dy)
        return
    # An output that is not wanted takes the layout of gate, so that it decides nothing.
    outs = [gate if out is None else out for out in (dgate, dup)]
    strides = tuple(x.stride(0) for x in (dy, gate, up, *outs))
    has_dgate, has_dup = dgate is not None, dup is not None
    launch = _bwd_launch(*gate.shape, strides, activation, has_dgate, has_dup, remakes_y)
    launch(dy, gate, up, dgate, dup)


@cache_by_shape
def _bwd_launch(
    num_rows: int,
    width: int,
    strides: tuple[int, ...],
    activation: str,
    has_dgate: bool,
    has_dup: bool,
    remakes_y: bool,
) -> Launch:
    grid, width, block_n, strides = _tiling(num_rows, width, strides)
    return Launch(
        _glu_bwd_kernel,
        grid,
        stride_dym=strides[0],
        stride_gatem=strides[1],
        stride_upm=strides[2],
        stride_dgatem=strides[3],
        stride_dupm=strides[4],
        N=width,
        HAS_DGATE=has_dgate,
        HAS_DUP=has_dup,
        REMAKES_Y=remakes_y,
        ACTIVATION=activation,
        BLOCK_N=block_n,
        num_warps=_NUM_WARPS,
    )


def _packed_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@differentiable_once("a gated linear unit")
class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _glu_fwd(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        gate, up = ctx.saved_tensors
        needs_dgate, needs_dup, _ = ctx.needs_input_grad
        dgate = _packed_like(gate) if needs_dgate else None
        dup = _packed_like(up) if needs_dup else None
        _glu_bwd(rows_of(dy), gate, up, ctx.activation, dgate, dup)
        return dgate, dup, None


def _glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    check_tensors(_TENSORS, gate, up)
    if gate.dim() == 0:
        raise ValueError(f"gate must be a floating tensor (..., N), got {gate.dtype} ()")
    if up.shape != gate.shape:
        raise ValueError(f"up must be {tuple(gate.shape)} as gate is, got {tuple(up.shape)}")
    if gate.numel() == 0 or is_left_to_compiler(gate):
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        return _act(gate, activation) * up
    return _Glu.apply(rows_of(gate), rows_of(up), activation).view(gate.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up.

    Args:
        gate: (..., N) fp32, bf16 or fp16. Rows may lie apart, as in the halves of one (..., 2 N)
            tensor; the last dimension contiguous after a copy at most.
        up: gate's shape; its layout and dtype may be others.

    Returns:
        (..., N) in the promoted dtype of gate and up; silu(gate) is computed in fp32 and rounded to
        gate's dtype before the product, as eager code does. Differentiable once; a second
        differentiation raises RuntimeError.

    Raises:
        ValueError: gate or up is no tensor, on another device, or of another dtype or shape.

    Source: https://arxiv.org/abs/2002.05202, equation 5.
    """
    return _glu(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh") -> torch.Tensor:
    """Return gelu(gate) * up.

    Args:
        gate: (..., N) fp32, bf16 or fp16. Rows may lie apart, as in the halves of one (..., 2 N)
            tensor; the last dimension contiguous after a copy at most.
        up: gate's shape; its layout and dtype may be others.
        approximate: "tanh" (Gemma; torch's gelu_pytorch_tanh) or "none" for the exact, erf form.

    Returns:
        (..., N) in the promoted dtype of gate and up; gelu(gate) is computed in fp32 and rounded to
        gate's dtype before the product, as eager code does. Differentiable once; a second
        differentiation raises RuntimeError.

    Raises:
        ValueError: gate or up is no tensor, on another device, or of another dtype or shape, or
            approximate is unknown.

    Source: https://arxiv.org/abs/2002.05202, equation 5, and https://arxiv.org/abs/1606.08415.
    """
    return _glu(gate, up, _GELUS[_APPROXIMATE.of(approximate)])


def _sample(case: Case, dtype, device, generator) -> Sample:
    *lead, width = case.shape
    options = dict(case.options)
    layout = options.pop("layout", "contiguous")
    up_dtype = options.pop("up_dtype", dtype)
    # Wide enough to reach both flat ends of the activations.
    scale = options.pop("scale", 2.0)
    if layout == "halves":
        both = randn((*lead, 2 * width), dtype, device, generator, scale=scale).detach()
        gate, up = both[..., :width], both[..., width:]
    else:
        # up stays packed.
        gate = lay_out(randn(case.shape, dtype, device, generator, scale=scale), layout)
        up = randn(case.shape, up_dtype, device, generator)
    return Sample((gate.requires_grad_(), up.requires_grad_()), options)


SWIGLU = Op(
    name="swiglu",
    aliases=(),
    summary="silu(gate) * up; keeps gate and up, not silu(gate).",
    function=swiglu,
    reference=swiglu_ref,
    # Every kind of layout once, sizes around one tile of 2048, and one value far out on each side.
    cases=(
        Case("tiny", (2, 16)),
        Case("odd", (3, 127)),
        Case("rank-1", (33,)),
        Case("rank-4", (2, 3, 5, 12)),
        Case("two-tiles", (3, 1367)),
        Case("halves", (2, 5, 44), {"layout": "halves"}),
        Case("halves-two-tiles", (2, 2065), {"layout": "halves"}),
        Case("transposed", (6, 48), {"layout": "transposed"}),
        Case("strided", (9, 65), {"layout": "strided"}),
        Case("far", (4, 64), {"scale": 30.0}),
        Case("fp32-up", (4, 33), {"up_dtype": torch.float32}),
        Case("one-wide", (5, 1), {"layout": "halves"}),
        Case("real", (4096, 8192), needs_gpu=True),
        Case("real-not-power", (2048, 14336), needs_gpu=True),
        Case("real-halves", (2048, 11008), {"layout": "halves"}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(3, 5),
    tensors=_TENSORS,
)

GEGLU = Op(
    name="geglu",
    aliases=(),
    summary="gelu(gate) * up; keeps gate and up, not gelu(gate).",
    function=geglu,
    reference=geglu_ref,
    # The tiling is swiglu's; what differs is the activation, in both forms.
    cases=(
        Case("tiny", (2, 16)),
        Case("odd", (3, 127)),
        Case("exact", (3, 127), {"approximate": "none"}),
        Case("case_20", (64, 128)),
        Case("two-tiles", (3, 1367), {"approximate": "none"}),
        Case("halves", (2, 5, 44), {"layout": "halves"}),
        Case("transposed", (6, 48), {"layout": "transposed", "approximate": "none"}),
        Case("far", (4, 64), {"scale": 30.0}),
        Case("far-exact", (4, 64), {"scale": 30.0, "approximate": "none"}),
        Case("fp32-up", (4, 33), {"up_dtype": torch.float32}),
        Case("real", (4096, 8192), needs_gpu=True),
        Case("real-exact", (2048, 14336), {"approximate": "none"}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(3, 5),
    tensors=_TENSORS,
    options=(_APPROXIMATE,),
)
