"""Experts as 3-D weights: how they gate, and whether their loop is the plain one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernels.transformers.recognise.mlps import CLAMPS, SHIFTS, Activations
from liger_kernels.transformers.recognise.probe import (
    call_forward,
    is_close,
    new_generator,
    original_class,
    probe_copy,
    quiet,
    randn,
    ranked_errors,
    takes_one_tensor,
    uniform,
)
from liger_kernels.transformers.recognise.specs import (
    ACTIVATIONS,
    GLU_OPS,
    ExpertsSpec,
    Layout,
    Refusal,
    other_activation,
    unserved,
)

_ROWS = 32


def recognise_experts(module: nn.Module) -> ExpertsSpec | Refusal | None:
    """Return how 3-D experts gate, for modules of transformers' experts interface."""
    fused, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if fused is None or down is None or fused.dim() != 3 or down.dim() != 3:
        return None
    cls = original_class(type(module))
    gate = getattr(cls, "_apply_gate", None)
    if gate is None:
        in_order = _probe_sorted(module, fused, down) if takes_one_tensor(cls) else None
        return in_order or unserved("experts whose activation runs inside their own forward")
    inner = fused.shape[2 if getattr(module, "is_transposed", False) else 1] // 2
    x = 3 * randn(new_generator(), _ROWS, 2 * inner)
    found = _gate_of(module, functools.partial(gate, probe_copy(module)), lambda gated: gated, x, x)
    if found is None:
        return unserved("experts with a gate of their own")
    if isinstance(found, Refusal):
        return found
    return ExpertsSpec(*found, _has_plain_loop(module))


def _gate_of(
    module: nn.Module,
    call: Callable[[Tensor], Any],
    finish: Callable[[Tensor], Tensor],
    x: Tensor,
    h: Tensor,
) -> tuple[Layout, str] | Refusal | None:
    """Return the layout and activation of a gate: call(x) is finish(gated h), linear in x."""

    def best(activations: Activations, scale: float, shift: float = 0.0) -> Any:
        candidates: dict[tuple[str, ...], Tensor] = {
            (layout, name): finish(function(gate) * (up + shift))
            for layout in ("gate_first", "interleaved")
            for gate, up in (split_gate(scale * h, layout),)
            for name, function in activations.items()
        }
        errors = ranked_errors(call(scale * x), candidates)
        return errors[0][1] if errors and errors[0][0] < 2e-5 else None

    own = {type(child).__name__: child for child in module.children()}
    try:
        with quiet():
            for activations in (ACTIVATIONS, own):
                found = best(activations, 1.0)
                # A clamp inside the gate shows only far out.
                if found and best(activations, 30.0):
                    layout, activation = found
                    if activation in GLU_OPS:
                        return cast(Layout, layout), activation
                    return other_activation(activation)
            # What else it does: a limit is out of the reach of small numbers.
            for shift, what in ((0.0, CLAMPS), (1.0, SHIFTS)):
                if best(ACTIVATIONS, 0.1, shift):
                    return unserved(what)
    except Exception:
        return None
    return None


def split_gate(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return views (gate, up) of x (..., 2 * I) in one of the fused layouts."""
    if layout == "interleaved":
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return (first, second) if layout == "gate_first" else (second, first)


def run_experts(
    module: Any,
    hidden: Tensor,  # (T, H)
    expert_ids: Tensor,  # (T, K), num_experts or more where a slot is empty
    weights: Tensor,  # (T, K)
    gate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the weighted sum of each token's experts: transformers' eager loop."""
    out = torch.zeros_like(hidden)
    for expert in expert_ids.unique().tolist():
        if expert >= module.gate_up_proj.shape[0]:
            continue
        slot, token = torch.where(expert_ids.t() == expert)
        h = F.linear(hidden[token], module.gate_up_proj[expert])
        h = F.linear(gate(h), module.down_proj[expert]) * weights[token, slot, None]
        out.index_add_(0, token, h.to(out.dtype))
    return out


def _has_plain_loop(module: nn.Module) -> bool:
    """Return whether the class's own (eager) forward is the loop of `run_experts`."""
    cls: Any = original_class(type(module))
    # transformers' decorator chooses an implementation by name and keeps the eager one here.
    loop = getattr(cls.forward, "__wrapped__", None)
    fused = module._parameters["gate_up_proj"]
    if loop is None or fused is None:
        return False
    generator = new_generator()
    num_experts, inner, width, num_tokens = fused.shape[0], 4, 6, 5
    parameters = {
        "gate_up_proj": randn(generator, num_experts, 2 * inner, width),
        "down_proj": randn(generator, num_experts, width, inner),
    }
    hidden = randn(generator, num_tokens, width)
    ids = torch.randint(num_experts, (num_tokens, 2), generator=generator, device="cpu")
    weights = uniform(generator, num_tokens, 2)
    clone = probe_copy(module, parameters)
    try:
        with quiet():
            gate = functools.partial(cls._apply_gate, clone)
            wanted = run_experts(clone, hidden, ids, weights, gate)
            return is_close(loop(clone, hidden, ids, weights), wanted)
    except Exception:
        return False


def _probe_sorted(module: nn.Module, fused: Tensor, down: Tensor) -> ExpertsSpec | Refusal | None:
    """Return the gate of experts that each take their share of the rows, in one product of all."""
    num_experts, wide, twice = fused.shape
    if down.shape != (num_experts, twice // 2, wide):
        return None
    generator = new_generator()
    inner, width = 24, 16
    parameters = {
        "gate_up_proj": width**-0.5 * randn(generator, num_experts, width, 2 * inner),
        "down_proj": inner**-0.5 * randn(generator, num_experts, inner, width),
    }
    # Sizes that forward may read; of other names it would fail on the small weights.
    sizes = {"hidden_size": width, "intermediate_size": inner, "expert_dim": inner}
    sizes = {name: size for name, size in sizes.items() if name in vars(module)}
    clone = probe_copy(module, parameters, attributes=sizes)
    x = 3 * randn(generator, num_experts * _ROWS, width)

    h = torch.bmm(x.view(num_experts, -1, width), parameters["gate_up_proj"])

    def finish(gated: Tensor) -> Tensor:
        return torch.bmm(gated, parameters["down_proj"]).view(-1, width)

    found = _gate_of(module, functools.partial(call_forward, clone), finish, x, h)
    if found is None or isinstance(found, Refusal):
        return found
    return ExpertsSpec(*found, False, is_sorted=True)
