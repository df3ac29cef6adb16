"""Gated MLP of frozen layers with LoRA adapters: y = down(act(gate(x)) * up(x)) as one function.

Legend, rounding and memory of the layers: adapted_linear.py. gate and up are one group, or one
layer whose output holds both; a layer may be without an adapter.
Memory: saves x, gate, up and the adapters' small products. h = act(gate) * up is recomputed in
backward, into the buffer of its gradient, and only where the adapter of down is trained.
Sources: Hu et al., LoRA, https://arxiv.org/abs/2106.09685, eq. 3; Shazeer, GLU Variants Improve
Transformer, https://arxiv.org/abs/2002.05202, eq. 6.
"""

from collections.abc import Sequence
from typing import Any

import torch

from liger_kernels.ops.adapted_linear import (
    AdaptedLinear,
    LayerGradients,
    LayerGroup,
    check_versions,
    flat_gradients,
    flatten,
    needs_of,
    own_dtype,
    versions_of,
)
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.glu import _glu_bwd, _glu_fwd
from liger_kernels.ops.rows import no_values, rows_of


@differentiable_once("a gated MLP with LoRA adapters")
class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: Sequence[AdaptedLinear],
        activation: str,
        makes_output: bool,
        *tensors: Any,
    ):
        *heads, down = layers
        first, last = LayerGroup(heads, x.dtype), LayerGroup([down], x.dtype)
        with own_dtype(x.device):
            xa = first.down(x)
            ys = first.forward(x, xa)
            gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
            h = _glu_fwd(gate, up, activation)
            ha = last.down(h)
            if makes_output:
                (y,) = last.forward(h, ha)
            else:
                y = no_values(gate, _out_width(down))
        needs_x = False
        for head in heads:
            needs_x = needs_x or (head.a is not None and head.a.requires_grad)
        ctx.save_for_backward(x if needs_x else None, xa, gate, up, ha)
        ctx.versions = versions_of(layers) if any(ctx.needs_input_grad) else []
        ctx.layers, ctx.activation = layers, activation
        ctx.states = first.states, last.states
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        x, xa, gate, up, ha = ctx.saved_tensors
        check_versions(ctx.layers, ctx.versions)
        *heads, down = ctx.layers
        *needs, last_need = needs_of(ctx.layers, ctx.needs_input_grad[4:])
        needs_dx = ctx.needs_input_grad[0]
        first = LayerGroup(heads, gate.dtype, ctx.states[0])
        last = LayerGroup([down], gate.dtype, ctx.states[1])
        needs_dh = needs_dx or any(flag for need in needs for flag in need)
        dx, dxa, grads = None, None, [LayerGradients()] * len(heads)
        da: list[Any] = [None] * len(heads)
        last_da: list[Any] = [None]
        with own_dtype(dy.device):
            dh, dha, last_grads = last.backward([rows_of(dy)], ha, [last_need], needs_dh)
            if dh is None:
                h, dys = _glu_fwd(gate, up, ctx.activation), None
            else:
                h, dys = dh, _gate_gradients(dh, gate, up, len(heads), ctx, bool(last_need.a))
            if last_need.a:
                last_da = last.a_gradients(dha, h, [last_need])
            del h, dh
            if dys is not None:
                dx, dxa, grads = first.backward(dys, xa, needs, needs_dx)
            if x is not None:
                da = first.a_gradients(dxa, x, needs)
        flat = flat_gradients(ctx.layers, [*grads, *last_grads], [*da, *last_da])
        return dx, None, None, None, *flat


def _out_width(layer: AdaptedLinear) -> int:
    if layer.b is not None:
        return int(layer.b.shape[0])
    # The shape of a packed weight is that of its bytes.
    shape = getattr(layer.weight, "quant_state", layer.weight).shape
    return int(shape[0])


def _gate_gradients(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    num_heads: int,
    ctx: Any,
    remakes_h: bool,
) -> list[torch.Tensor]:
    """Return the gradient of each head's output; h is written over dh where it is remade."""
    if num_heads == 2:
        grads = [torch.empty_like(gate), torch.empty_like(up)]
        dgate, dup = grads
    else:
        num_rows, inner = gate.shape
        grads = [gate.new_empty((num_rows, 2 * inner))]
        dgate, dup = grads[0][:, :inner], grads[0][:, inner:]
    _glu_bwd(dh, gate, up, ctx.activation, dgate, dup, remakes_y=remakes_h)
    return grads


def lora_mlp(
    x: torch.Tensor,
    layers: Sequence[AdaptedLinear],
    activation: str,
    dtype: torch.dtype,
    *,
    makes_output: bool = True,
) -> torch.Tensor:
    """Apply a gated MLP whose layers are frozen and have adapters.

    Args:
        x: (..., H), cast to dtype once; with one row at least.
        layers: gate, up and down, or gate and up as one (2 I, H) with the rows of gate first, and
            down.
        activation: "silu", "gelu_tanh" or "gelu".
        dtype: Of the products.
        makes_output: False leaves out the product with the weight of down, for backward alone: the
            values returned are undefined.

    Returns:
        (..., H_out) in dtype. Differentiable once in x, biases, a and b.
    """
    x = x.to(dtype)
    y = _LoraMlp.apply(rows_of(x), layers, activation, makes_output, *flatten(layers))
    return y.view(*x.shape[:-1], y.shape[-1])
