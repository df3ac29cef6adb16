"""Forwards of experts, whose weights are 3-D, and of blocks that route to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from liger_kernels.ops import moe_experts
from liger_kernels.ops.backend import is_traced_as_torch
from liger_kernels.ops.moe_experts import moe_experts_graph
from liger_kernels.transformers.recognise import ExpertsSpec, MoeBlockSpec, experts_options
from liger_kernels.transformers.replacements.calls import is_bare, is_plain, record_call
from liger_kernels.transformers.replacements.subclasses import is_as_patched
from liger_kernels.transformers.replacements.tiles import is_tiled, run_in_tiles

_ID_DTYPES = (torch.int64, torch.int32)


def experts_forward(base: Any, spec: ExpertsSpec) -> Callable[..., Any]:
    """Return the forward of an experts class that calls moe_experts.

    The stock forward runs, and with it what the configuration chose, once experts_implementation
    is another than it was at patching, as it is while transformers generates.
    """
    stock_gate = base._apply_gate

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_chosen = getattr(self.config, "_experts_implementation", None) == spec.implementation
        is_plain_call = len(args) == 3 and not kwargs and is_chosen and is_as_patched(self)
        if not is_plain_call or base._apply_gate is not stock_gate or _is_parallel(self):
            return base.forward(self, *args, **kwargs)
        hidden, ids, weights = args
        gate_up, down = self.gate_up_proj, self.down_proj
        biases = (None, None)
        if spec.has_bias:
            biases = self.gate_up_proj_bias, self.down_proj_bias
        if spec.is_transposed and gate_up.dim() == down.dim() == 3:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        if not is_id(ids) or not is_served(hidden, weights, gate_up, down, *biases):
            return base.forward(self, *args, **kwargs)
        # torch's grouped product is none that autocast knows; it has the dtype of the weights.
        dtype = gate_up.dtype
        if spec.implementation != "grouped_mm":
            dtype = autocast_dtype(hidden) or hidden.dtype
        hidden, gate_up, down = (x.to(dtype) for x in (hidden, gate_up, down))
        gate_up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in biases)
        shared = (gate_up, down, gate_up_bias, down_bias)
        y = run_experts(self, (hidden, weights, ids), shared, experts_options(self, spec))
        return y.to(args[0].dtype)

    return forward


def moe_block_forward(base: Any, spec: MoeBlockSpec) -> Callable[..., Any]:
    """Return the forward of a block as Llama4's, in which the chosen experts alone compute."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not is_as_patched(self) or not is_bare(self.experts):
            return base.forward(self, *args, **kwargs)
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        hidden = args[0]
        if gate_up.dim() == down.dim() == 3 and is_plain(hidden):
            hidden = hidden.reshape(-1, gate_up.shape[1])
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        if not is_served(hidden, hidden, gate_up, down, None, None):
            return base.forward(self, *args, **kwargs)
        scores, logits = self.router(hidden)
        # The others have a score of 0: they are given zeros, and return zeros.
        weights, ids = scores.topk(self.top_k, dim=1)
        out = self.shared_expert(hidden)
        dtype = autocast_dtype(hidden) or hidden.dtype
        hidden, gate_up, down = (x.to(dtype) for x in (hidden, gate_up, down))
        options = experts_options(self.experts, spec)
        routed = run_experts(self, (hidden, weights, ids), (gate_up, down), options)
        return out + routed.to(out.dtype), logits

    return forward


def run_experts(
    module: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    shared: tuple[Any, ...],
    options: Mapping[str, Any],
) -> Tensor:
    """Compute moe_experts for a patched module, over pieces of tokens where it is to.

    Args:
        module: The module.
        rows: Tokens (T, H), routing weights (T, K) and ids (T, K).
        shared: Weights and biases.
        options: The other options of moe_experts.
    """
    record_call(module)
    run = functools.partial(_run, {"keeps_products": not module._saves_memory, **options})
    if is_tiled(module, rows[0]):
        return run_in_tiles(module, run, rows, shared)
    return run(*rows, *shared)


def _run(
    options: Mapping[str, Any],
    hidden: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    makes_output: bool = True,
) -> Tensor:
    compute = moe_experts if makes_output else moe_experts_graph
    biases: dict[str, Any] = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    return compute(hidden, weights, ids, gate_up, down, **biases, **options)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of products under autocast on x's device; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _is_parallel(module: Any) -> bool:
    """Return whether other devices hold some of the experts; older versions do not say."""
    return bool(getattr(module, "_is_expert_parallel", False))


def is_id(ids: Any) -> bool:
    return type(ids) is Tensor and ids.dtype in _ID_DTYPES and ids.dim() == 2


def is_served(
    hidden: Any, weights: Any, gate_up: Any, down: Any, gate_up_bias: Any, down_bias: Any
) -> bool:
    """Return whether moe_experts computes what the stock forward would on these tensors."""
    parts = [x for x in (gate_up, down, gate_up_bias, down_bias) if x is not None]
    if not is_plain(hidden, weights, *parts) or hidden.dim() != 2 or weights.dim() != 2:
        return False
    if gate_up.dim() != 3 or down.dim() != 3 or is_traced_as_torch(hidden):
        return False
    if any(x.dtype != gate_up.dtype or x.device != hidden.device for x in parts):
        return False
    if hidden.dtype != gate_up.dtype and autocast_dtype(hidden) is None:
        return False
    num_experts, width, inner = down.shape
    wide = 2 * inner
    if gate_up.shape != (num_experts, wide, width) or hidden.shape[1] != width:
        return False
    shapes = ((gate_up_bias, (num_experts, wide)), (down_bias, (num_experts, width)))
    return all(bias is None or bias.shape == shape for bias, shape in shapes)
