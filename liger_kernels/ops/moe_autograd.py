"""The autograd function of moe_experts: products of sorted rows, and kernels between them.

Legend: moe_experts.py; S = T K rows, sorted by expert (moe_routing.py).
Memory: saves x, ids, w and the gate_up products. The gathered rows, and the activation times w, are
recomputed in backward, the latter into the buffer of its gradient.
Nothing waits for the device, and nothing is added by atomics. The gradient of w is made from the
gradient of the activation, which is narrower than the output.
Source for what backward needs: Guo et al., SonicMoE, https://arxiv.org/abs/2512.14080.
"""

from typing import Any, NamedTuple

import torch

from liger_kernels.ops.adapted_linear import own_dtype
from liger_kernels.ops.autograd import differentiable_once
from liger_kernels.ops.backend import runs_triton
from liger_kernels.ops.grouped_products import grouped_outer, grouped_product
from liger_kernels.ops.moe_activation import Gating, Slots, activate_rows, activate_rows_backward
from liger_kernels.ops.moe_routing import Routing, route
from liger_kernels.ops.moe_rows import combine_rows, gather_rows, sum_groups
from liger_kernels.ops.products import wide_product
from liger_kernels.ops.rows import no_values, rows_of


class MoeSettings(NamedTuple):
    """The options of a call.

    Attributes:
        makes_output: False leaves out the last products, for backward alone.
    """

    gating: Gating
    weights_output: bool
    keeps_products: bool
    makes_output: bool


@differentiable_once("moe_experts")
class MoeExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        routing_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        expert_ids: torch.Tensor,
        settings: MoeSettings,
    ):
        routing = route(expert_ids, gate_up.shape[0], triton_runs=runs_triton(hidden))
        on_output, on_input = _places(routing_weights, settings)
        with own_dtype(hidden.device):
            x = gather_rows(hidden, routing, on_input)
            products = grouped_product(x, gate_up.transpose(1, 2), routing.offsets)
            keeps = settings.keeps_products
            kept_x = x if keeps and ctx.needs_input_grad[2] else None
            # Freed before the next products.
            del x
            h: Any = None
            if settings.makes_output or keeps:
                slots = Slots(routing, on_output, gate_up_bias)
                h = activate_rows(products, slots, settings.gating)
            if settings.makes_output:
                rows = grouped_product(h, down.transpose(1, 2), routing.offsets)
                y = combine_rows(rows, routing, bias=down_bias, bias_weights=on_output).y
            else:
                y = no_values(hidden, hidden.shape[1])
        kept_h = h if keeps and ctx.needs_input_grad[3] else None
        ctx.save_for_backward(
            hidden, routing_weights, gate_up, down, gate_up_bias, down_bias, products,
            kept_x, kept_h, *routing,
        )  # fmt: skip
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):
        # All at once: a checkpoint gives them once.
        hidden, routing_weights, gate_up, down, gate_up_bias, down_bias, *rest = ctx.saved_tensors
        products, x, h, *parts = rest
        del rest
        needs = _Needs(*ctx.needs_input_grad[:6])
        routing, settings = Routing(*parts), ctx.settings
        on_output, on_input = _places(routing_weights, settings)
        slots = Slots(routing, on_output, gate_up_bias)
        grads = _Gradients()
        with own_dtype(dy.device):
            dy = rows_of(dy)
            rows = gather_rows(dy, routing)
            if needs.down_bias:
                grads.down_bias = sum_groups(rows, routing, on_output)
            dh = grouped_product(rows, down, routing.offsets)
            dots = None
            if down_bias is not None and on_output is not None and needs.routing_weights:
                dots = wide_product(dy, down_bias.t())
            remakes_h = needs.down and h is None
            found = activate_rows_backward(
                dh, products, slots, settings.gating, dots=dots, remakes_h=remakes_h
            )
            if needs.down:
                grads.down = _weight_gradient(rows, h if h is not None else found.h, down, routing)
            dproducts, dweights = found.dgate_up, found.dweights
            del rows, dh, h, found
            if needs.gate_up_bias:
                grads.gate_up_bias = sum_groups(dproducts, routing)
            if needs.gate_up:
                x = gather_rows(hidden, routing, on_input) if x is None else x
                grads.gate_up = _weight_gradient(dproducts, x, gate_up, routing)
            x = None
            needs_dots = needs.routing_weights and on_input is not None
            if needs.hidden or needs_dots:
                dx = grouped_product(dproducts, gate_up, routing.offsets)
                summed = combine_rows(
                    dx, routing, routing_weights=on_input, x=hidden if needs_dots else None
                )
                grads.hidden = summed.y
                dweights = summed.dots if needs_dots else dweights
        if dweights is not None:
            grads.routing_weights = dweights.to(routing_weights.dtype)
        return (*grads.wanted(needs), None, None)


class _Needs(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    routing_weights: bool
    gate_up: bool
    down: bool
    gate_up_bias: bool
    down_bias: bool


class _Gradients:
    """The gradients of the inputs that may have one."""

    hidden: torch.Tensor | None = None
    routing_weights: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def wanted(self, needs: _Needs) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients in the order of the inputs, None where none is needed."""
        names = _Needs._fields
        return tuple(
            getattr(self, name) if is_needed else None
            for name, is_needed in zip(names, needs, strict=True)
        )


def _places(
    routing_weights: torch.Tensor, settings: MoeSettings
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the routing weights as (factor of the output, factor of the input)."""
    return (routing_weights, None) if settings.weights_output else (None, routing_weights)


def _weight_gradient(
    dy: torch.Tensor, x: Any, weight: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """Return the gradient (E, N, K) of weight, laid out as weight is, so that nobody copies it."""
    if weight.stride(2) == 1 or weight.stride(1) != 1:
        return grouped_outer(dy, x, routing.offsets)
    return grouped_outer(x, dy, routing.offsets).transpose(1, 2)
