"""Gated RMS norm: y = weight * x_hat * act(gate), or weight * x_hat of x * act(gate).

x_hat = u * rstd, rstd = 1 / sqrt(mean(u^2) + eps), each group of the last dimension by itself;
u = x * act(gate) when the gate comes first (Mamba 2), else x (Gated DeltaNet); act is silu or
sigmoid.
Legend: M rows, N width, G groups, W = N / G, P persistent programs a group of the backward.
Rounding: act(gate), u and x_hat are computed in fp32. cast="before_weight" (Qwen3-Next, Mamba 2)
rounds x_hat to x's dtype and its product with the weight to the promoted dtype of the two; a gate
that comes after multiplies that in fp32, rounded to x's dtype. cast="after_weight" (Kimi Linear,
Falcon H1) multiplies everything in fp32 and rounds once, to x's dtype.
Memory: saves x, gate, weight and one fp32 number a group; eager code also keeps up to five fp32
copies of x.
Source: Dao and Gu, Transformers are SSMs, section 7, https://arxiv.org/abs/2405.21060; Zhang and
Sennrich, Root Mean Square Layer Normalization, eq. 4, https://arxiv.org/abs/1910.07467
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from liger_kernels.ops.arguments import EPS, Choice, Flag, Integer, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import is_left_to_compiler, runs_triton_rows
from liger_kernels.ops.gated_rms_norm_kernel import (
    gated_rms_norm_bwd_kernel,
    gated_rms_norm_fwd_kernel,
)
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, lookup, num_sms
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn, traffic, upcast
from liger_kernels.ops.rms_norm import CAST, WEIGHT, X
from liger_kernels.ops.rows import row_stages, row_tile, rows_of, sum_partials

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
_TENSORS = (X, TensorArgument("gate", "(..., N)"), WEIGHT)
_GATE_FIRST, _ACTIVATION = Flag("gate_first"), Choice("activation", ACTIVATIONS)
_NUM_GROUPS = Integer("num_groups", "an int that divides x's width")


def gated_rms_norm_ref(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    gate_first: bool = False,
    activation: str = "silu",
    cast: str = "before_weight",
    num_groups: int = 1,
) -> torch.Tensor:
    """The definition, in plain torch."""
    opened = ACTIVATIONS[activation](upcast(gate))
    u = upcast(x) * opened if gate_first else upcast(x)
    u = u.unflatten(-1, (num_groups, u.shape[-1] // num_groups))
    y = (u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)
    cast = CAST.of(cast)
    if cast == "before_weight":
        y = y.to(x.dtype) if weight is None else weight * y.to(x.dtype)
    elif weight is not None:
        y = upcast(weight) * y
    if not gate_first:
        y = y * opened
    return y if gate_first and cast == "before_weight" else y.to(x.dtype)


# (width, warps): elements a lane stays at 8 to 32. First guess, to be replaced by measurements.
_FWD_WARPS = ((1024, 4), (4096, 8), (16384, 16), (65536, 32))
_BWD_WARPS = ((2048, 4), (4096, 8), (16384, 16), (65536, 32))
# (width, programs a multiprocessor) of the persistent backward.
_BWD_PROGRAMS = ((1024, 4), (4096, 2), (65536, 1))


@dataclass(frozen=True)
class _Options:
    eps: float
    gate_first: bool
    activation: str
    cast: str
    num_groups: int
    # What x_hat times the weight is rounded to.
    product_dtype: torch.dtype
    out_dtype: torch.dtype


def _flags(dtype: torch.dtype, has_weight: bool, options: _Options) -> dict[str, Any]:
    """Return the constants that both kernels take."""
    return {
        "GATE_FIRST": options.gate_first,
        "ACTIVATION": options.activation,
        "HAS_WEIGHT": has_weight,
        "ROUND_BEFORE_WEIGHT": options.cast == "before_weight",
        # Two dtypes promote to x's or to fp32, in which the product is computed anyway.
        "ROUND_PRODUCT": options.cast == "before_weight" and options.product_dtype == dtype,
    }


def _groups(x, options: _Options):
    return x.unflatten(-1, (options.num_groups, x.shape[-1] // options.num_groups))


def _product(x_hat, x, weight, options: _Options):
    """Return x_hat, rounded, and its product with the weight, rounded, both in fp32 at least."""
    rounded = upcast(x_hat.to(x.dtype)) if options.cast == "before_weight" else x_hat
    product = rounded if weight is None else rounded * upcast(weight)
    if options.cast == "before_weight":
        product = upcast(product.to(options.product_dtype))
    return rounded, product


def _gated_rms_norm_fwd(x, gate, weight, options):
    num_rows, width = x.shape
    if not runs_triton_rows(x):
        opened = ACTIVATIONS[options.activation](upcast(gate))
        u = _groups(upcast(x) * opened if options.gate_first else upcast(x), options)
        # One fused reduction; squaring into a copy would double the traffic on a CPU.
        norm = torch.linalg.vector_norm(u, dim=-1)
        rstd = (norm.square() / u.shape[-1] + options.eps).rsqrt()
        y = _product((u * rstd[..., None]).flatten(-2), x, weight, options)[1]
        if not options.gate_first:
            y = y * opened
        return y.to(options.out_dtype), rstd
    num_groups = options.num_groups
    y = torch.empty((num_rows, width), dtype=options.out_dtype, device=x.device)
    rstd = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x.device)
    strides = x.stride(0), gate.stride(0)
    launch = _fwd_launch(num_rows, width, strides, x.dtype, weight is not None, options)
    launch(x, gate, weight, y, rstd)
    return y, rstd


@cache_by_shape
def _fwd_launch(
    num_rows: int,
    width: int,
    strides: tuple[int, int],
    dtype: torch.dtype,
    has_weight: bool,
    options: _Options,
) -> Launch:
    group_width = width // options.num_groups
    block_m, block_n = row_tile(group_width, num_rows)
    return Launch(
        gated_rms_norm_fwd_kernel,
        (cdiv(num_rows, block_m), options.num_groups),
        stride_xm=strides[0],
        stride_gatem=strides[1],
        M=num_rows,
        N=width,
        W=group_width,
        eps=options.eps,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=lookup(_FWD_WARPS, group_width),
        **_flags(dtype, has_weight, options),
    )


def _gated_rms_norm_bwd(dy, x, gate, weight, rstd, options, needs_dw):
    num_rows, width = x.shape
    if not runs_triton_rows(x):
        return _torch_bwd(upcast(dy), x, gate, weight, rstd, options, needs_dw)
    dx = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    dgate = torch.empty((num_rows, width), dtype=gate.dtype, device=x.device)
    launch = _bwd_launch(
        num_rows,
        width,
        (dy.stride(0), x.stride(0), gate.stride(0)),
        x.element_size() + dy.element_size() + gate.element_size(),
        x.dtype,
        x.device,
        weight is not None,
        needs_dw,
        options,
    )
    dw = None
    if needs_dw:
        dw = torch.empty((launch.grid[0], width), dtype=torch.float32, device=x.device)
    launch(dy, x, gate, weight, rstd, dx, dgate, dw)
    return dx, dgate, sum_partials(dw, weight.dtype) if needs_dw else None


@cache_by_shape
def _bwd_launch(
    num_rows: int,
    width: int,
    strides: tuple[int, int, int],
    itemsize: int,
    dtype: torch.dtype,
    device: torch.device,
    has_weight: bool,
    has_dw: bool,
    options: _Options,
) -> Launch:
    num_groups = options.num_groups
    group_width = width // num_groups
    block_m, block_n = row_tile(group_width, num_rows)
    programs = num_sms(device) * lookup(_BWD_PROGRAMS, group_width)
    programs = min(cdiv(programs, num_groups), cdiv(num_rows, block_m))
    return Launch(
        gated_rms_norm_bwd_kernel,
        (programs, num_groups),
        stride_dym=strides[0],
        stride_xm=strides[1],
        stride_gatem=strides[2],
        M=num_rows,
        N=width,
        W=group_width,
        HAS_DW=has_dw,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        NUM_STAGES=row_stages(block_m * block_n, itemsize),
        num_warps=lookup(_BWD_WARPS, group_width),
        **_flags(dtype, has_weight, options),
    )


def _torch_bwd(dy, x, gate, weight, rstd, options, needs_dw):
    g = upcast(gate)
    s = torch.sigmoid(g)
    if options.activation == "silu":
        act, slope = g * s, s * (1 + g * (1 - s))
    else:
        act, slope = s, s * (1 - s)
    u = upcast(x) * act if options.gate_first else upcast(x)
    x_hat = _groups(u, options) * rstd[..., None]
    rounded, product = _product(x_hat.flatten(-2), x, weight, options)
    if not options.gate_first:
        dgate = dy * product * slope
        dy = dy * act
    dw = (dy * rounded).sum(0).to(weight.dtype) if needs_dw else None
    dy = _groups(dy if weight is None else dy * upcast(weight), options)
    # Not einsum: autocast would make it a bf16 product.
    mean = (dy * x_hat).mean(-1, keepdim=True)
    dx = ((dy - x_hat * mean) * rstd[..., None]).flatten(-2)
    if options.gate_first:
        dgate = dx * upcast(x) * slope
        dx = dx * act
    return dx.to(x.dtype), dgate.to(gate.dtype), dw


@differentiable_once("gated_rms_norm")
class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gate, weight, options: _Options):
        y, rstd = _gated_rms_norm_fwd(x, gate, weight, options)
        ctx.save_for_backward(x, gate, weight, rstd)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        x, gate, weight, rstd = ctx.saved_tensors
        needs_dw = ctx.needs_input_grad[2]
        grads = _gated_rms_norm_bwd(rows_of(dy), x, gate, weight, rstd, ctx.options, needs_dw)
        return *grads, None


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    gate_first: bool = False,
    activation: str = "silu",
    cast: str = "before_weight",
    num_groups: int = 1,
) -> torch.Tensor:
    """Return x over its root mean square, times weight and act(gate), over the last dimension.

    Args:
        x: (..., N) fp32, bf16 or fp16; the last dimension contiguous after a copy at most.
        gate: x's shape, in any floating dtype.
        weight: (N,) of any floating dtype, or None for no product.
        eps: Added to the mean of squares.
        gate_first: True multiplies x with act(gate) before the norm, as Mamba 2 does.
        activation: "silu" or "sigmoid".
        cast: "before_weight" rounds x / rms to x.dtype before the product with the weight, and the
            product to the promoted dtype of x and weight, as Qwen3NextRMSNormGated and
            MambaRMSNormGated do; "after_weight" multiplies in fp32 and rounds once, as the norms of
            Kimi Linear and Falcon H1 do. "mid" and "end" are older spellings of the two.
        num_groups: Equal parts of the last dimension, each with its own root mean square.

    Returns:
        (..., N) in x.dtype; in the promoted dtype of x and weight for gate_first with
        cast="before_weight". Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: x, gate or weight is no tensor, on another device, or of another dtype or shape;
            eps is not finite or negative, num_groups does not divide N, gate_first is no bool, or
            activation or cast is unknown.

    Source: https://arxiv.org/abs/2405.21060, section 7.
    """
    _check(x, gate, weight, activation, cast, num_groups)
    cast = CAST.of(cast)
    product_dtype = x.dtype
    if weight is not None and cast == "before_weight":
        product_dtype = torch.promote_types(x.dtype, weight.dtype)
    options = _Options(
        EPS.of(eps),
        _GATE_FIRST.of(gate_first),
        activation,
        cast,
        _NUM_GROUPS.of(num_groups),
        product_dtype,
        out_dtype=product_dtype if gate_first else x.dtype,
    )
    if x.numel() == 0 or is_left_to_compiler(x):
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        rest: Any = {"activation": activation, "cast": cast, "num_groups": options.num_groups}
        return gated_rms_norm_ref(x, gate, weight, options.eps, gate_first=gate_first, **rest)
    weight = None if weight is None else weight.contiguous()
    return _GatedRmsNorm.apply(rows_of(x), rows_of(gate), weight, options).view(x.shape)


def _check(x, gate, weight, activation, cast, num_groups) -> None:
    check_tensors(_TENSORS, x, gate, weight)
    if x.dim() == 0:
        raise ValueError(f"x must be a floating tensor (..., N), got {x.dtype} {tuple(x.shape)}")
    if gate.shape != x.shape:
        raise ValueError(
            f"gate must be floating {tuple(x.shape)} as x, got {gate.dtype} {tuple(gate.shape)}"
        )
    width = x.shape[-1]
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be ({width},) as x's width, got {tuple(weight.shape)}")
    if _NUM_GROUPS.of(num_groups) < 1 or width % num_groups:
        raise ValueError(f"num_groups must divide x's width {width}, got {num_groups}")
    _ACTIVATION.of(activation)
    CAST.of(cast)


def _sample(case: Case, dtype, device, generator) -> Sample:
    options = dict(case.options)
    weight_dtype = options.pop("weight_dtype", dtype)
    gate_dtype = options.pop("gate_dtype", dtype)
    layout = options.pop("layout", "contiguous")
    x, gate = (
        lay_out(randn(case.shape, kind, device, generator, scale=2.0), layout)
        for kind in (dtype, gate_dtype)
    )
    weight = None
    if options.pop("has_weight", True):
        weight = randn(case.shape[-1:], weight_dtype, device, generator, shift=1.0)
    return Sample((x, gate, weight), options)


_FIRST = {"gate_first": True}
_GROUPS = {"gate_first": True, "num_groups": 3}

OP = Op(
    name="gated_rms_norm",
    aliases=("gated_rmsnorm", "rms_norm_gated", "rmsnorm_gated"),
    summary="RMS norm with a gate before or after it; keeps x, gate and one number a group.",
    function=gated_rms_norm,
    reference=gated_rms_norm_ref,
    # Each place of the gate with each rounding, kind of weight and layout once; widths of a group
    # on both sides of a power of two.
    cases=(
        Case("tiny", (2, 8)),
        Case("odd", (3, 127)),
        Case("mamba", (5, 65), _FIRST),
        Case("mamba-groups", (2, 3, 51), _GROUPS),
        Case("kimi", (3, 40), {"cast": "after_weight", "activation": "sigmoid"}),
        Case("falcon-h1", (4, 96), {"cast": "after_weight", **_GROUPS}),
        Case("falcon-h1-after", (4, 96), {"cast": "after_weight", "num_groups": 2}),
        Case("sigmoid-first", (4, 33), {"activation": "sigmoid", **_FIRST}),
        Case("no-weight", (7, 40), {"has_weight": False}),
        Case("no-weight-first", (7, 40), {"has_weight": False, "cast": "after_weight", **_FIRST}),
        Case("rank-1", (33,)),
        Case("rank-4", (2, 3, 5, 64), {"eps": 1e-5}),
        Case("transposed", (6, 48), {"layout": "transposed"}),
        Case("strided", (9, 66), {"layout": "strided", **_GROUPS}),
        Case("one-wide", (4, 3), _GROUPS),
        Case("fp32-weight", (4, 64), {"weight_dtype": torch.float32}),
        Case("fp32-weight-first", (4, 64), {"weight_dtype": torch.float32, **_FIRST}),
        Case("fp32-gate", (4, 64), {"gate_dtype": torch.float32}),
        Case("many-rows", (700, 16)),
        Case("many-rows-groups", (700, 15), _GROUPS),
        Case("real-qwen3-next", (131072, 128), needs_gpu=True),
        Case("real-mamba", (4096, 5120), _FIRST, needs_gpu=True),
        Case("real-groups", (4096, 8192), {"gate_first": True, "num_groups": 8}, needs_gpu=True),
        Case("widest", (300, 65536), needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=traffic(3, 5),
    tensors=_TENSORS,
    options=(EPS, _GATE_FIRST, _ACTIVATION, CAST, _NUM_GROUPS),
)
