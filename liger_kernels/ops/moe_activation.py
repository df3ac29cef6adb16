"""Activation of experts with the routing weight: h = w act(gate + b) (up + b), one row a slot.

Legend: moe_routing.py; N intermediate width, w routing weight, b bias of the expert. Everything is
computed in fp32 and rounded once. The backward makes the gradient of w from what it has at hand,
and h again, over its gradient, for the gradient of the next weight.
Sources: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202, eq. 5; So et
al., Primer, https://arxiv.org/abs/2109.08668, for relu2; gpt-oss's clamped form as in
https://github.com/openai/gpt-oss: min(gate, limit) sigmoid(alpha gate) (clamp(up, limit) + 1).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from liger_kernels.ops.backend import INTERPRETED, runs_triton
from liger_kernels.ops.launcher import Launch, cache_by_shape, cdiv, lookup, next_power_of_2
from liger_kernels.ops.moe_activation_kernel import _bwd_kernel, _fwd_kernel
from liger_kernels.ops.moe_routing import Routing

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2", "gpt_oss")
# By inner width: slots of a program, its columns at most (backward takes whole rows in steps of
# them), its warps. Milliseconds at widths 768 and 2880, docs/results/moe-h200.json: forward
# (4, 256, 4) 0.153 and 0.313, (1, 1024, 4) 0.158 and 0.296; backward (4, 256, 4) 0.310 and 0.745,
# (1, 1024, 8) 0.385 and 0.582.
_FWD_TILES = ((0, (16, 64, 4)),) if INTERPRETED else ((1024, (4, 256, 4)), (2880, (1, 1024, 4)))
_BWD_TILES = ((0, (16, 8, 4)),) if INTERPRETED else ((1024, (4, 256, 4)), (2880, (1, 1024, 8)))


class Gating(NamedTuple):
    """How experts gate."""

    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0
    # Of gate and up: "halves", "interleaved", or "none" where there is no up.
    layout: str = "halves"


def gated(gate_up: torch.Tensor, gating: Gating) -> torch.Tensor:
    """Return act(gate) * up in plain torch, rounded where eager code rounds.

    Args:
        gate_up: (..., 2 N), or (..., N) where there is no up.
        gating: The form.
    """
    if gating.layout == "none":
        return _act(gate_up, gating)
    if gating.layout == "interleaved":
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, -1)
    if gating.activation == "gpt_oss":
        gate = gate.clamp(max=gating.limit)
        up = up.clamp(-gating.limit, gating.limit) + 1
    return _act(gate, gating) * up


def _act(gate: torch.Tensor, gating: Gating) -> torch.Tensor:
    if gating.activation == "silu":
        return F.silu(gate)
    if gating.activation == "relu2":
        return F.relu(gate).square()
    if gating.activation == "gpt_oss":
        return gate.clamp(max=gating.limit) * torch.sigmoid(gate * gating.alpha)
    return F.gelu(gate, approximate="tanh" if gating.activation == "gelu_tanh" else "none")


class Slots(NamedTuple):
    """The other inputs of an activation: routing, weights and bias."""

    routing: Routing
    routing_weights: torch.Tensor | None  # (T, K) contiguous; None where h has no factor
    bias: torch.Tensor | None  # (E, 2 N) contiguous


def activate_rows(gate_up: torch.Tensor, slots: Slots, gating: Gating) -> torch.Tensor:
    """Return h for every row.

    Args:
        gate_up: (S, 2 N), or (S, N) where there is no up; contiguous.
        slots: Routing, weights and bias.
        gating: The form.

    Returns:
        (S, N) in gate_up's dtype; rows past the last group hold anything.
    """
    num_rows, width = gate_up.shape
    inner = width if gating.layout == "none" else width // 2
    if not runs_triton(gate_up):
        h = gated(_biased(gate_up, slots), gating)
        if slots.routing_weights is not None:
            h = h * slots.routing_weights.flatten()[slots.routing.slots.long(), None]
        return h.to(gate_up.dtype)
    h = torch.empty((num_rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    has = (slots.routing_weights is not None, slots.bias is not None)
    routing = slots.routing
    launch = _fwd_launch(num_rows, inner, has, gating, lookup(_FWD_TILES, inner))
    launch(gate_up, routing.rows, routing.expert_ids, slots.routing_weights, slots.bias, h)
    return h


def _biased(gate_up: torch.Tensor, slots: Slots) -> torch.Tensor:
    if slots.bias is None:
        return gate_up
    places = torch.arange(gate_up.shape[0], device=gate_up.device)
    experts = torch.searchsorted(slots.routing.offsets.long(), places, right=True)
    return gate_up + slots.bias[experts.clamp(max=slots.bias.shape[0] - 1)]


class ActivationGradients(NamedTuple):
    """The gradients of activate_rows, and its result."""

    dgate_up: torch.Tensor  # (S, 2 N) or (S, N)
    dweights: torch.Tensor | None  # (T, K) fp32, or fp64 of fp64
    h: torch.Tensor | None  # (S, N), over the gradient it was given


def activate_rows_backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    slots: Slots,
    gating: Gating,
    *,
    dots: torch.Tensor | None = None,
    remakes_h: bool,
) -> ActivationGradients:
    """Return the gradients of activate_rows.

    Args:
        dh: (S, N), contiguous; h is written over it if remakes_h.
        gate_up: As activate_rows took it.
        slots: As activate_rows took it.
        gating: The form.
        dots: (T, E) fp32 contiguous; what the bias of the next product adds to the gradient of a
            routing weight.
        remakes_h: Whether h is wanted.
    """
    routing, routing_weights, bias = slots
    if not runs_triton(gate_up):
        return _backward_torch(dh, gate_up, slots, gating, dots, remakes_h)
    dgate_up = torch.empty_like(gate_up)
    dweights = None
    if routing_weights is not None:
        shape = routing.rows.shape
        dweights = torch.empty(shape, dtype=torch.float32, device=dh.device)
    has = (routing_weights is not None, bias is not None, dots is not None, remakes_h)
    sizes = (*dh.shape, routing.top_k, routing.offsets.numel())
    launch = _bwd_launch(sizes, has, gating, lookup(_BWD_TILES, dh.shape[1]))
    launch(
        dh, gate_up, routing.rows, routing.expert_ids, routing_weights, bias, dots, dgate_up,
        dweights,
    )  # fmt: skip
    return ActivationGradients(dgate_up, dweights, dh if remakes_h else None)


def _backward_torch(dh, gate_up, slots, gating, dots, remakes_h) -> ActivationGradients:
    routing = slots.routing
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        h = gated(_biased(leaf, slots), gating)
    dweights, scaled = None, dh
    if slots.routing_weights is not None:
        wide = torch.promote_types(dh.dtype, torch.float32)
        is_used = routing.rows >= 0
        dweights = (dh.to(wide) * h.detach()).sum(-1)[routing.rows.clamp(min=0).long()]
        if dots is not None:
            ids = routing.expert_ids.long().where(is_used, 0)
            dweights = dweights + dots.gather(1, ids)
        dweights = dweights.where(is_used, 0)
        factor = slots.routing_weights.flatten()[routing.slots.long(), None]
        scaled = (dh * factor).to(dh.dtype)
    with torch.enable_grad():
        (dgate_up,) = torch.autograd.grad(h, leaf, scaled)
    if remakes_h:
        h = h.detach()
        h = h if slots.routing_weights is None else (h * factor).to(dh.dtype)
    return ActivationGradients(dgate_up, dweights, h if remakes_h else None)


@cache_by_shape
def _fwd_launch(
    num_slots: int,
    inner: int,
    has: tuple[bool, bool],
    gating: Gating,
    tile: tuple[int, int, int],
) -> Launch:
    block_s, most, num_warps = tile
    block_n = min(most, next_power_of_2(inner))
    return Launch(
        _fwd_kernel,
        (cdiv(num_slots, block_s), cdiv(inner, block_n)),
        S=num_slots,
        N=inner,
        alpha=gating.alpha,
        limit=gating.limit,
        HAS_WEIGHTS=has[0],
        HAS_BIAS=has[1],
        ACTIVATION=gating.activation,
        LAYOUT=gating.layout,
        BLOCK_S=block_s,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )


@cache_by_shape
def _bwd_launch(
    sizes: tuple[int, int, int, int],
    has: tuple[bool, bool, bool, bool],
    gating: Gating,
    tile: tuple[int, int, int],
) -> Launch:
    (num_slots, inner, top_k, num_experts), (block_s, most, num_warps) = sizes, tile
    return Launch(
        _bwd_kernel,
        (cdiv(num_slots, block_s),),
        S=num_slots,
        N=inner,
        K=top_k,
        E=num_experts,
        alpha=gating.alpha,
        limit=gating.limit,
        HAS_WEIGHTS=has[0],
        HAS_BIAS=has[1],
        HAS_DOTS=has[2],
        REMAKES_H=has[3],
        ACTIVATION=gating.activation,
        LAYOUT=gating.layout,
        BLOCK_S=block_s,
        BLOCK_N=min(most, next_power_of_2(inner)),
        num_warps=num_warps,
    )
