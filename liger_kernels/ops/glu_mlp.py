"""Gated MLP: y = (act(x Wg') * (x Wu')) Wd', the three products and the gate in one function.

Legend: M rows, H width, I intermediate width, h = act(gate) * up.
Rounding: as the parts do one after another, except for dx: the product with Wu is added to the one
with Wg in fp32, before it is rounded, where autograd would round both and add.
Memory: saves x, gate and up. h is recomputed in backward, by the kernel that has gate and up at
hand anyway, into the buffer of its gradient: one more write, and no memory at all. dgate and
dup lie side by side, so that one product gives the gradients of both weights.
Source: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202, eq. 6.
"""

from typing import Any

import torch
import torch.nn.functional as F

from liger_kernels.ops.arguments import Choice, Flag, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import is_left_to_compiler
from liger_kernels.ops.glu import _act, _glu_bwd, _glu_fwd
from liger_kernels.ops.op import Case, Op, Sample, randn
from liger_kernels.ops.rows import no_values, rows_of

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_TENSORS = (
    TensorArgument("x", "(..., H)", shares_dtype=True),
    TensorArgument("gate_weight", "(I, H)", shares_dtype=True),
    TensorArgument("up_weight", "(I, H)", is_optional=True, shares_dtype=True),
    TensorArgument("down_weight", "(H_out, I)", shares_dtype=True),
)
_ACTIVATION, _KEEPS_PRODUCT = Choice("activation", ACTIVATIONS), Flag("keeps_product")


def glu_mlp_ref(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor | None,
    down_weight: torch.Tensor,
    *,
    activation: str = "silu",
    keeps_product: bool = False,
) -> torch.Tensor:
    """The definition, in plain torch; what is kept for backward changes no number."""
    if up_weight is None:
        gate, up = F.linear(x, gate_weight).chunk(2, -1)
    else:
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    return F.linear(_act(gate, activation) * up, down_weight)


@differentiable_once("glu_mlp")
class _GluMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor | None,
        down_weight: torch.Tensor,
        activation: str,
        keeps_product: bool,
        makes_output: bool,
    ):
        if up_weight is None:
            gate, up = F.linear(x, gate_weight).chunk(2, -1)
        else:
            gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        h: Any = None
        if makes_output or keeps_product:
            h = _glu_fwd(gate, up, activation)
        needs_x = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(
            x if needs_x else None,
            gate,
            up,
            h if keeps_product else None,
            gate_weight,
            up_weight,
            down_weight,
        )
        ctx.activation = activation
        if not makes_output:
            return no_values(gate, down_weight.shape[0])
        return F.linear(h, down_weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        x, gate, up, h, gate_weight, up_weight, down_weight = ctx.saved_tensors
        needs_dx, needs_dgate, needs_dup, needs_ddown = ctx.needs_input_grad[:4]
        dy = rows_of(dy)
        dx = dgate_weight = dup_weight = ddown_weight = None
        if needs_dx or needs_dgate or needs_dup:
            dh = dy @ down_weight
            num_rows, inner = gate.shape
            both = torch.empty(num_rows, 2 * inner, dtype=gate.dtype, device=gate.device)
            dgate, dup = both[:, :inner], both[:, inner:]
            remakes_h = needs_ddown and h is None
            _glu_bwd(dh, gate, up, ctx.activation, dgate, dup, remakes_y=remakes_h)
            h = dh if remakes_h else h
        elif h is None:
            h = _glu_fwd(gate, up, ctx.activation)
        if needs_ddown:
            ddown_weight = dy.t() @ h
        del h
        if up_weight is None:
            dgate_weight = both.t() @ x if needs_dgate else None
            dx = both @ gate_weight if needs_dx else None
            return dx, dgate_weight, None, ddown_weight, None, None, None
        if needs_dgate and needs_dup:
            dgate_weight, dup_weight = (both.t() @ x).split(inner)
        elif needs_dgate:
            dgate_weight = dgate.t() @ x
        elif needs_dup:
            dup_weight = dup.t() @ x
        if needs_dx:
            dx = dgate @ gate_weight
            dx.addmm_(dup, up_weight)
        return dx, dgate_weight, dup_weight, ddown_weight, None, None, None


def glu_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor | None,
    down_weight: torch.Tensor,
    *,
    activation: str = "silu",
    keeps_product: bool = False,
) -> torch.Tensor:
    """Return (act(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T.

    Args:
        x: (..., H) fp32, bf16 or fp16, the dtype and device of the weights.
        gate_weight: (I, H), or (2 I, H) with the rows of gate above those of up.
        up_weight: (I, H), or None where gate_weight holds both.
        down_weight: (H_out, I).
        activation: "silu", "gelu_tanh" or "gelu", the exact, erf form.
        keeps_product: Keep act(gate) * up for backward instead of recomputing it: I numbers a row
            more, the same gradients bit for bit.

    Returns:
        (..., H_out) in x's dtype. Differentiable once; a second differentiation raises
        RuntimeError.

    Raises:
        ValueError: types, devices, shapes or dtypes do not fit together, keeps_product is no bool,
            or activation is unknown.

    Source: https://arxiv.org/abs/2002.05202, equation 6.
    """
    check_tensors(_TENSORS, x, gate_weight, up_weight, down_weight)
    _ACTIVATION.of(activation)
    _KEEPS_PRODUCT.of(keeps_product)
    for row, tensor in ((_TENSORS[0], x), (_TENSORS[3], down_weight)):
        if tensor.dim() == 0:
            raise ValueError(f"{row.name} must be floating {row.shape}, got {tensor.dtype} ()")
    width, inner = x.shape[-1], down_weight.shape[-1]
    num_gates = 1 if up_weight is not None else 2
    expected = {
        "gate_weight": (gate_weight, (num_gates * inner, width)),
        "up_weight": (up_weight, (inner, width)),
        "down_weight": (down_weight, (down_weight.shape[0], inner)),
    }
    for name, (weight, shape) in expected.items():
        if weight is not None and (weight.shape != shape or weight.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {shape} {x.dtype} to go with x {tuple(x.shape)} and down_weight "
                f"{tuple(down_weight.shape)}, got {tuple(weight.shape)} {weight.dtype}"
            )
    if is_left_to_compiler(x):
        return glu_mlp_ref(x, gate_weight, up_weight, down_weight, activation=activation)
    if x.numel() == 0 or inner == 0:
        # A grid of size zero is no launch; this keeps the graph and gives zero gradients.
        gate = F.linear(x, gate_weight)
        up = F.linear(x, up_weight) if up_weight is not None else 1.0
        return F.linear((gate * up)[..., :inner], down_weight)
    weights = gate_weight, up_weight, down_weight
    y = _GluMlp.apply(rows_of(x), *weights, activation, keeps_product, True)
    return y.view(*x.shape[:-1], down_weight.shape[0])


def glu_mlp_graph(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor | None,
    down_weight: torch.Tensor,
    *,
    activation: str = "silu",
    keeps_product: bool = False,
) -> torch.Tensor:
    """Record the graph of glu_mlp without its last product: the values returned are undefined.

    The arguments are those of a call of glu_mlp that has run; x is (M, H).
    """
    weights = gate_weight, up_weight, down_weight
    return _GluMlp.apply(x, *weights, activation, keeps_product, False)


def _sample(case: Case, dtype, device, generator) -> Sample:
    *lead, width, inner = case.shape
    options = dict(case.options)
    layout = options.pop("layout", "separate")
    # Wide enough to reach both flat ends of the activations.
    x = randn((*lead, width), dtype, device, generator, scale=options.pop("scale", 2.0))

    def weight(num_rows, num_columns):
        # Products of about the size of their input, as a freshly made layer gives.
        return randn((num_rows, num_columns), dtype, device, generator, scale=num_columns**-0.5)

    if layout == "halves":
        gate_weight, up_weight = weight(2 * inner, width), None
    else:
        gate_weight, up_weight = weight(inner, width), weight(inner, width)
    return Sample((x, gate_weight, up_weight, weight(width, inner)), options)


def _num_bytes(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Forward reads x and the weights and writes gate, up and y; backward reads dy as well,
    and writes the gradients of x and of the weights."""
    *lead, width, inner = case.shape
    num_rows = torch.Size(lead).numel()
    forward = num_rows * (2 * width + 2 * inner) + 3 * width * inner
    backward = num_rows * (3 * width + 2 * inner) + 6 * width * inner
    return forward * dtype.itemsize, backward * dtype.itemsize


OP = Op(
    name="glu_mlp",
    aliases=(),
    summary="A whole gated MLP; keeps x, gate and up, not the activation or the product.",
    function=glu_mlp,
    reference=glu_mlp_ref,
    # The tiling and the activations are swiglu's and geglu's; what differs are the products, the
    # layouts of the weights, and the product made in backward over the buffer of its gradient.
    cases=(
        Case("tiny", (2, 8, 16)),
        Case("odd", (3, 33, 127)),
        Case("rank-1", (16, 24)),
        Case("rank-4", (2, 3, 5, 12, 20)),
        Case("gelu-tanh", (5, 24, 40), {"activation": "gelu_tanh"}),
        Case("gelu", (5, 24, 40), {"activation": "gelu"}),
        Case("halves", (2, 5, 24, 44), {"layout": "halves"}),
        Case("keeps-product", (5, 24, 40), {"keeps_product": True}),
        Case("halves-keeps-product", (5, 24, 40), {"layout": "halves", "keeps_product": True}),
        Case("two-tiles", (3, 40, 2065)),
        Case("far", (4, 16, 64), {"scale": 30.0}),
        Case("one-wide", (5, 12, 1), {"layout": "halves"}),
        Case("no-rows", (0, 8, 16)),
        Case("real", (2048, 2048, 8192), needs_gpu=True),
        Case("real-halves", (1024, 4096, 11008), {"layout": "halves"}, needs_gpu=True),
        Case("real-gelu", (1024, 2304, 9216), {"activation": "gelu_tanh"}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=_num_bytes,
    # Three products, and in backward twice as many.
    num_flops=lambda case: 18 * torch.Size(case.shape).numel(),
    part_of=("swiglu", "geglu"),
    tensors=_TENSORS,
    options=(_ACTIVATION, _KEEPS_PRODUCT),
)
