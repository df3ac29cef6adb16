"""Linear layer with a LoRA adapter: y = x W' + bias + s (x A') B', where W is frozen.

With a magnitude it is DoRA's: y = m * (x W' + s (x A') B') + bias (magnitude.py).
Legend, rounding and memory: adapted_linear.py, which has the products. Nothing is computed for W.
lora_linears is the same for several layers that read one x, such as q, k and v of attention, with
dropout on the adapters' inputs: torch's own masks, drawn as peft draws them, one a layer, and drawn
once more in backward from the generator's state.
Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685, eq. 3.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from liger_kernels.ops.adapted_linear import (
    AdaptedLinear,
    LayerGroup,
    Magnified,
    check_versions,
    flat_gradients,
    flatten,
    needs_of,
    own_dtype,
    rows_of_all,
    versions_of,
)
from liger_kernels.ops.arguments import Number, TensorArgument, check_tensors
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.magnitude import direction_norms
from liger_kernels.ops.op import Case, Op, Sample, lay_out, randn
from liger_kernels.ops.packed_weight import frozen_weight, is_packed
from liger_kernels.ops.rows import rows_of

_TENSORS = (
    TensorArgument("x", "(..., K)", shares_dtype=True),
    TensorArgument("weight", "(N, K)", is_constant=True, shares_dtype=True),
    TensorArgument("a", "(r, K)"),
    TensorArgument("b", "(N, r)"),
    TensorArgument("bias", "(N,)", is_optional=True, shares_dtype=True),
    TensorArgument("magnitude", "(N,)", is_optional=True),
)
_SCALE = Number("scale")


def lora_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """The definition, in plain torch."""
    added = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * float(scale)
    if magnitude is None:
        return F.linear(x, weight, bias) + added
    directions = weight + float(scale) * (b @ a).to(x.dtype)
    factors = magnitude / torch.linalg.norm(directions, dim=1).detach()
    y = (F.linear(x, weight) + added) * factors
    return (y if bias is None else y + bias).to(x.dtype)


@differentiable_once("lora_linear")
class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: Sequence[AdaptedLinear],
        kept: "_Kept | None",
        *tensors: torch.Tensor,
    ):
        group = LayerGroup(layers, x.dtype)
        with own_dtype(x.device):
            xa = group.down(x) if kept is None else kept.xa
            ys = group.forward(x, xa)
        ctx.layers, ctx.states, ctx.dtype = layers, group.states, x.dtype
        ctx.kept = kept
        ctx.magnified = tuple(group.magnified)
        ctx.versions = versions_of(layers) if any(ctx.needs_input_grad) else []
        if kept is None:
            _save(ctx, group, x, xa)
        else:
            ctx.states, kept.xa = kept.states, None
        # Gradients of outputs that nobody reads stay None.
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None):
        rows = rows_of_all(dys)
        devices = [dy.device for dy in rows if dy is not None]
        if not devices:
            return (None,) * len(ctx.needs_input_grad)
        layers, needs_dx = ctx.layers, ctx.needs_input_grad[0]
        check_versions(layers, ctx.versions)
        needs = needs_of(layers, ctx.needs_input_grad[3:])
        x, xa, *saved = (ctx if ctx.kept is None else ctx.kept.node).saved_tensors
        magnified = {i: Magnified(saved.pop(0), saved.pop(0)) for i in ctx.magnified}
        group = LayerGroup(layers, ctx.dtype, ctx.states, magnified)
        with own_dtype(devices[0]):
            dx, dxa, grads = group.backward(rows, xa, needs, needs_dx)
            da: list[Any] = [None] * len(needs)
            if x is not None:
                da = group.a_gradients(dxa, x, needs)
        return dx, None, None, *flat_gradients(layers, grads, da)


def _save(ctx: Any, group: LayerGroup, x: torch.Tensor, xa: Any) -> None:
    """Save what backward reads."""
    needs_x = needs_xa = False
    for layer in group.layers:
        if layer.a is not None:
            needs_x, needs_xa = needs_x or layer.a.requires_grad, needs_xa or layer.b.requires_grad
    magnified: list[Any] = []
    for i, (z, norms) in group.magnified.items():
        magnified += [z if group.layers[i].magnitude.requires_grad else None, norms]
    ctx.save_for_backward(x if needs_x else None, xa if needs_xa else None, *magnified)


class _Kept:
    """Tensors that a forward in a checkpoint saved before its products, for their backward."""

    def __init__(self) -> None:
        self.node: Any = None
        self.xa: torch.Tensor | None = None
        self.states: Any = ()


class _Save(torch.autograd.Function):
    """Save the tensors of a call that follows.

    A checkpoint that recomputes stops once the last tensor is saved: an autograd function saves
    its tensors after its forward, and the products with the weights would run for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: Sequence[AdaptedLinear], kept: _Kept, *tensors: Any
    ):
        group = LayerGroup(layers, x.dtype)
        with own_dtype(x.device):
            kept.xa = group.down(x)
        _save(ctx, group, x, kept.xa)
        kept.node, kept.states = ctx, group.states
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor | None):
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


def lora_linears(
    x: torch.Tensor,
    layers: Sequence[AdaptedLinear],
    dtype: torch.dtype,
    *,
    is_checkpointed: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Apply linear layers with adapters to one x.

    Args:
        x: (..., K), cast to dtype once.
        layers: Their weights and biases of any floating dtype; packed weights are dequantised.
        dtype: Of the products.
        is_checkpointed: Whether a checkpoint's hooks save the tensors: what backward needs is then
            saved before the products with the weights, which a recomputation need not repeat.

    Returns:
        (..., N) in dtype for each layer. Differentiable once in x, biases, a and b.
    """
    x = x.to(dtype)
    if torch.compiler.is_compiling():
        with own_dtype(x.device):
            return tuple(_plain(x, layer) for layer in layers)
    tensors = flatten(layers)
    rows, kept = rows_of(x), None
    if is_checkpointed and torch.is_grad_enabled():
        is_trained = any(tensor.requires_grad for tensor in (x, *tensors))
        # What a magnitude scales is a product, and saved after it.
        if is_trained and all(layer.magnitude is None for layer in layers):
            kept = _Kept()
            rows = _Save.apply(rows, layers, kept, *tensors)
    ys = _LoraLinears.apply(rows, layers, kept, *tensors)
    return tuple([y.view(*x.shape[:-1], y.shape[-1]) for y in ys])


def _plain(x: torch.Tensor, layer: AdaptedLinear) -> torch.Tensor:
    """Return one layer's output in torch code that a compiler differentiates and fuses itself."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    weight = frozen_weight(layer.weight, x.dtype).detach()
    if layer.a is None or layer.b is None:
        return F.linear(x, weight, bias)
    dropped = x
    if layer.dropout:
        dropped = F.dropout(x.to(layer.dropout_dtype or x.dtype), layer.dropout).to(x.dtype)
    xa = F.linear(dropped, (layer.a * layer.scale).to(x.dtype))
    added = F.linear(xa, layer.b.to(x.dtype))
    if layer.magnitude is None:
        return F.linear(x, weight, bias) + added
    factors = layer.magnitude / direction_norms(weight, layer.a, layer.b, layer.scale)
    y = (F.linear(dropped, weight) + added) * factors
    if bias is not None:
        y = y + bias
    return (y + F.linear(x - dropped, weight) if layer.dropout else y).to(x.dtype)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return x @ weight.T + bias + scale * (x @ a.T) @ b.T, where weight is frozen.

    With a magnitude, all but the bias is times magnitude / ||weight + scale * b @ a||, the norm of
    each row, through which no gradient flows (DoRA).

    Args:
        x: (..., K) fp32, bf16 or fp16.
        weight: (N, K) in x's dtype; it gets no gradient and must not ask for one. Or a weight that
            bitsandbytes packed in 4 bits (Params4bit).
        a: (r, K) of any floating dtype; it is cast to x's, its gradient has its own.
        b: (N, r) likewise.
        bias: (N,) in x's dtype, or None.
        magnitude: (N,) of any floating dtype, which is its gradient's; or None.
        scale: What the adapter's output is times: lora_alpha / r, or / sqrt(r) of rsLoRA.

    Returns:
        (..., N) in x's dtype. Differentiable once; a second differentiation raises RuntimeError.

    Raises:
        ValueError: types, devices, shapes or dtypes do not fit together, the weight requires grad,
            or scale is not finite.

    Sources: https://arxiv.org/abs/2106.09685, equation 3; DoRA, https://arxiv.org/abs/2402.09353,
    equations 5 and 11.
    """
    rows = dict(zip(_TENSORS, (x, weight, a, b, bias, magnitude), strict=True))
    if is_packed(weight):
        del rows[_TENSORS[1]]
    check_tensors(tuple(rows), *rows.values())
    scale = _SCALE.of(scale)
    if x.dim() == 0:
        raise ValueError(f"x must be floating (..., K), got {x.dtype} ()")
    _check_shapes(x, weight, a, b, bias)
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise _misfit("magnitude", f"({b.shape[0]},)", b, magnitude)
    (y,) = lora_linears(x, [AdaptedLinear(weight, bias, a, b, magnitude, scale)], x.dtype)
    return y


def _check_shapes(x: Any, weight: Any, a: Any, b: Any, bias: Any) -> None:
    """Raise a ValueError for a tensor that does not fit the others, or a weight that is trained."""
    width = x.shape[-1]
    if not is_packed(weight):
        if weight.dim() != 2 or weight.shape[1] != width or weight.dtype != x.dtype:
            raise _misfit("weight", f"(N, {width}) {x.dtype}", x, weight)
        if weight.requires_grad:
            raise ValueError(
                "weight must not require grad, for it gets no gradient here: call "
                "weight.requires_grad_(False), or torch's own operation to train it"
            )
    size = (weight.quant_state if is_packed(weight) else weight).shape[0]
    if a.dim() != 2 or a.shape[1] != width or a.shape[0] == 0:
        raise _misfit("a", f"(r, {width}) with a rank r of 1 at least", x, a)
    if b.shape != (size, a.shape[0]):
        raise _misfit("b", f"({size}, {a.shape[0]})", a, b)
    if bias is not None and (bias.shape != (size,) or bias.dtype != x.dtype):
        raise _misfit("bias", f"({size},) {x.dtype}", x, bias)


def _misfit(name: str, wanted: str, other: torch.Tensor, found: torch.Tensor) -> ValueError:
    return ValueError(
        f"{name} must be {wanted} to go with {tuple(other.shape)} {other.dtype}, "
        f"got {tuple(found.shape)} {found.dtype}"
    )


def _sample(case: Case, dtype, device, generator) -> Sample:
    *lead, width, out, rank = case.shape
    options = dict(case.options)
    adapter_dtype = options.pop("adapter_dtype", dtype)
    layout = options.pop("layout", "contiguous")
    has_bias = options.pop("has_bias", False)
    has_magnitude = options.pop("has_magnitude", False)
    x = randn((*lead, width), dtype, device, generator)
    if layout != "contiguous":
        x = lay_out(x, layout)
    weight = randn((out, width), dtype, device, generator, scale=width**-0.5, requires_grad=False)
    # The adapter's part is about as large as the layer's.
    a = randn((rank, width), adapter_dtype, device, generator, scale=width**-0.5)
    b = randn((out, rank), adapter_dtype, device, generator, scale=rank**-0.5)
    bias = randn((out,), dtype, device, generator) if has_bias else None
    magnitude = randn((out,), adapter_dtype, device, generator) if has_magnitude else None
    return Sample((x, weight, a, b, bias, magnitude), options)


def _num_bytes(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Forward reads x, weight and adapter and writes y; backward reads dy, x, weight and adapter
    and writes the gradients of x and of the adapter."""
    *lead, width, out, rank = case.shape
    num_rows = torch.Size(lead).numel()
    adapter = rank * (width + out)
    forward = num_rows * (width + out) + width * out + adapter
    backward = num_rows * (2 * width + out) + width * out + 2 * adapter
    return forward * dtype.itemsize, backward * dtype.itemsize


def _num_flops(case: Case) -> int:
    """Two products with the weight, and three times the two of the adapter."""
    *lead, width, out, rank = case.shape
    return torch.Size(lead).numel() * (4 * width * out + 6 * rank * (width + out))


OP = Op(
    name="lora_linear",
    aliases=("lora",),
    summary="A frozen linear layer and its LoRA or DoRA adapter; keeps x once, nothing for W.",
    function=lora_linear,
    reference=lora_linear_ref,
    # Every rank people use and those around a tile of a product, fp32 adapters beside x of any
    # dtype, and each layout of x.
    cases=(
        Case("tiny", (2, 8, 16, 4)),
        Case("rank-1", (5, 24, 16, 1)),
        Case("odd", (3, 33, 47, 5)),
        Case("one-row", (24, 16, 8)),
        Case("rank-4", (2, 3, 5, 12, 20, 3)),
        Case("bias", (4, 12, 20, 8), {"has_bias": True}),
        Case("scaled", (7, 40, 24, 16), {"scale": 2.0}),
        Case("rslora", (7, 40, 24, 6), {"scale": 16 / 6**0.5}),
        Case("no-scale", (7, 40, 24, 6), {"scale": 0.0}),
        Case("fp32", (9, 32, 48, 8), {"adapter_dtype": torch.float32, "scale": 2.0}),
        Case("transposed", (6, 48, 16, 4), {"layout": "transposed"}),
        Case("strided", (9, 65, 8, 4), {"layout": "strided", "has_bias": True}),
        Case("rank-64", (16, 96, 80, 64), {"scale": 0.5}),
        Case("dora", (4, 12, 20, 8), {"has_magnitude": True, "has_bias": True, "scale": 2.0}),
        Case(
            "dora-fp32",
            (2, 9, 32, 48, 4),
            {"has_magnitude": True, "adapter_dtype": torch.float32, "scale": 0.5},
        ),
        Case("wider-than-x", (4, 16, 24, 512), {"adapter_dtype": torch.float32}),
        Case("no-rows", (0, 8, 16, 4)),
        Case(
            "real",
            (8192, 4096, 4096, 16),
            {"adapter_dtype": torch.float32, "scale": 2.0},
            needs_gpu=True,
        ),
        Case(
            "real-dora",
            (8192, 4096, 4096, 16),
            {"has_magnitude": True, "adapter_dtype": torch.float32, "scale": 2.0},
            needs_gpu=True,
        ),
        Case("real-rank-64", (2048, 4096, 14336, 64), {"scale": 2.0}, needs_gpu=True),
    ),
    sample=_sample,
    num_bytes=_num_bytes,
    num_flops=_num_flops,
    tensors=_TENSORS,
    options=(_SCALE,),
)
