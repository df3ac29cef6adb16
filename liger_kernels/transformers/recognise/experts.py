"""Experts as 3-D weights: how they gate, and whether their loop is the plain one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from liger_kernels.ops.moe_activation import Gating, gated
from liger_kernels.ops.moe_experts import moe_experts_ref
from liger_kernels.transformers.recognise.mlps import CLAMPS, SHIFTS, Activations
from liger_kernels.transformers.recognise.probe import (
    Halved,
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
    EXPERTS_ACTIVATIONS,
    BlockRefusal,
    ExpertsSpec,
    Layout,
    MoeBlockSpec,
    Refusal,
    other_activation,
    unserved,
)

_ROWS = 32
# Implementations of transformers' own, in torch operations, whose place the op takes.
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


def recognise_experts(module: nn.Module) -> ExpertsSpec | Refusal | None:
    """Return how 3-D experts gate, for modules of transformers' experts interface."""
    fused, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if fused is None or down is None or fused.dim() != 3 or down.dim() != 3:
        return None
    cls = original_class(type(module))
    gate = getattr(cls, "_apply_gate", None)
    if gate is None:
        in_order = _probe_sorted(module) if takes_one_tensor(cls) else None
        if isinstance(in_order, tuple):
            return unserved("experts of sorted rows in a block of another form than Llama4's")
        return in_order or unserved("experts whose activation runs inside their own forward")
    is_transposed = bool(getattr(module, "is_transposed", False))
    inner = fused.shape[2 if is_transposed else 1] // 2
    x = 3 * randn(new_generator(), _ROWS, 2 * inner)
    call = functools.partial(gate, probe_copy(module))
    found = _gate_of(module, call, lambda gated: gated, x, x)
    clamped = None if isinstance(found, tuple) else _clamped_gate_of(module, call, x)
    if clamped is None and not isinstance(found, tuple):
        return found or unserved("experts with a gate of their own")
    config = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    has_bias = "gate_up_proj_bias" in module._parameters
    spec = clamped if clamped is not None else ExpertsSpec(*cast(tuple[Layout, str], found))
    spec = replace(
        spec, is_transposed=is_transposed, has_bias=has_bias, implementation=implementation
    )
    if not _has_plain_loop(module, spec):
        return unserved("experts whose loop computes something else too")
    if implementation not in _IMPLEMENTATIONS:
        return Refusal(
            f"experts_implementation {implementation!r} was chosen, whose code runs: choose "
            "'eager' or 'grouped_mm' to have moe_experts in its place",
            is_known_form=True,
        )
    return spec


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
                    if activation in EXPERTS_ACTIVATIONS:
                        return cast(Layout, layout), activation
                    return other_activation(activation)
            # What else it does: a limit is out of the reach of small numbers.
            for shift, what in ((0.0, CLAMPS), (1.0, SHIFTS)):
                if best(ACTIVATIONS, 0.1, shift):
                    return unserved(what)
    except Exception:
        return None
    return None


def _clamped_gate_of(
    module: nn.Module, call: Callable[[Tensor], Any], x: Tensor
) -> ExpertsSpec | None:
    """Return the form of gpt-oss's gate, with the two attributes that hold its numbers."""
    numbers = {
        name: float(value) for name, value in vars(module).items() if type(value) in (int, float)
    }
    try:
        with quiet():
            # Near 0 alpha shows, far out the limit.
            results = [(scale * x, call(scale * x)) for scale in (0.3, 30.0)]
            # The names decide between attributes of one value.
            alphas = sorted(numbers, key=lambda name: "alpha" not in name)
            limits = sorted(numbers, key=lambda name: "limit" not in name)
            for layout, alpha, limit in itertools.product(
                ("interleaved", "gate_first"), alphas, limits
            ):
                form = "interleaved" if layout == "interleaved" else "halves"
                gating = Gating("gpt_oss", numbers[alpha], numbers[limit], form)
                wanted = [gated(value, gating) for value, _ in results]
                pairs = zip(results, wanted, strict=True)
                if all(_is_near(found, other) for (_, found), other in pairs):
                    return ExpertsSpec(
                        cast(Layout, layout), "gpt_oss", alpha_attr=alpha, limit_attr=limit
                    )
    except Exception:
        return None
    return None


def _is_near(found: Any, wanted: Tensor) -> bool:
    errors = ranked_errors(found, {("",): wanted})
    return bool(errors) and errors[0][0] < 2e-5  # type: ignore[index]


def split_gate(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return views (gate, up) of x (..., 2 * I) in one of the fused layouts."""
    if layout == "interleaved":
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return (first, second) if layout == "gate_first" else (second, first)


def experts_options(module: Any, spec: ExpertsSpec | MoeBlockSpec) -> Mapping[str, Any]:
    """Return the options of moe_experts for experts of a form; numbers are the module's, now."""
    options: dict[str, Any] = {
        "activation": spec.activation,
        "is_interleaved": spec.layout == "interleaved",
    }
    if isinstance(spec, MoeBlockSpec):
        return {**options, "weight_on": "input"}
    if spec.activation == "gpt_oss":
        options["alpha"] = getattr(module, spec.alpha_attr)
        options["limit"] = getattr(module, spec.limit_attr)
    return options


def _has_plain_loop(module: nn.Module, spec: ExpertsSpec) -> bool:
    """Return whether the class's own (eager) forward is the loop of moe_experts_ref."""
    cls: Any = original_class(type(module))
    # transformers' decorator chooses an implementation by name and keeps the eager one here.
    loop = getattr(cls.forward, "__wrapped__", None)
    if loop is None:
        return False
    generator = new_generator()
    num_experts = cast(Tensor, module._parameters["gate_up_proj"]).shape[0]
    inner, width, num_tokens = 4, 6, 5
    shapes = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}
    views = {name: randn(generator, num_experts, *shape) for name, shape in shapes.items()}
    stored = {n: w.transpose(1, 2) if spec.is_transposed else w for n, w in views.items()}
    biases = {
        f"{name}_bias": randn(generator, num_experts, shape[0])
        for name, shape in shapes.items()
        if spec.has_bias
    }
    hidden = randn(generator, num_tokens, width)
    ids = torch.randint(num_experts, (num_tokens, 2), generator=generator, device="cpu")
    weights = uniform(generator, num_tokens, 2)
    try:
        with quiet():
            wanted = moe_experts_ref(
                hidden, weights, ids, *views.values(),
                gate_up_bias=biases.get("gate_up_proj_bias"),
                down_bias=biases.get("down_proj_bias"),
                **experts_options(module, spec),
            )  # fmt: skip
            clone = probe_copy(module, {**stored, **biases})
            return is_close(loop(clone, hidden, ids, weights), wanted)
    except Exception:
        return False


# Experts of sorted rows --------------------------------------------------------------------------


def recognise_moe_block(module: nn.Module) -> MoeBlockSpec | Refusal | None:
    """Return the form of a block of router, shared expert and experts of sorted rows."""
    experts = module._modules.get("experts")
    parts = [module._modules.get(name) for name in ("router", "shared_expert")]
    if experts is None or None in parts or not takes_one_tensor(original_class(type(module))):
        return None
    found = _probe_sorted(experts)
    if found is None or isinstance(found, Refusal):
        return found and BlockRefusal(found.reason, found.is_known_form)
    spec = MoeBlockSpec(*found)
    return spec if _routes_as_llama4(module, experts, spec) else None


def _routes_as_llama4(module: Any, experts: nn.Module, spec: MoeBlockSpec) -> bool:
    generator, num_tokens = new_generator(), 7
    width = 16
    clone, parameters = _small_sorted(experts, generator, width)
    num_experts, top_k = parameters["gate_up_proj"].shape[0], getattr(module, "top_k", None)
    router = module.router
    try:
        with quiet():
            weight = randn(generator, num_experts, width)
            router = probe_copy(router, {"weight": weight}, attributes={"in_features": width})
            block = probe_copy(
                module,
                modules={"experts": clone, "router": router, "shared_expert": Halved()},
                attributes={"hidden_dim": width},
            )
            hidden = randn(generator, num_tokens, width)
            scores, logits = call_forward(router, hidden)
            weights, ids = scores.topk(top_k, dim=1)
            if not bool((scores.count_nonzero(1) == top_k).all()):
                return False
            views = (parameters[n].transpose(1, 2) for n in ("gate_up_proj", "down_proj"))
            wanted = moe_experts_ref(hidden, weights, ids, *views, **experts_options(experts, spec))
            y, found_logits = call_forward(block, hidden[None])
            return is_close(y, wanted + 0.5 * hidden) and is_close(found_logits, logits)
    except Exception:
        return False


def _small_sorted(
    module: nn.Module, generator: torch.Generator, width: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a probe copy of experts of sorted rows with small weights, and these."""
    num_experts, inner = cast(Tensor, module._parameters["gate_up_proj"]).shape[0], 24
    parameters = {
        "gate_up_proj": width**-0.5 * randn(generator, num_experts, width, 2 * inner),
        "down_proj": inner**-0.5 * randn(generator, num_experts, inner, width),
    }
    # Sizes that forward may read; of other names it would fail on the small weights.
    sizes = {"hidden_size": width, "intermediate_size": inner, "expert_dim": inner}
    sizes = {name: size for name, size in sizes.items() if name in vars(module)}
    return probe_copy(module, parameters, attributes=sizes), parameters


def _probe_sorted(module: nn.Module) -> tuple[Layout, str] | Refusal | None:
    """Return the gate of experts that each take their share of the rows, in one product of all."""
    fused, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if fused is None or down is None or fused.dim() != 3:
        return None
    num_experts, wide, twice = fused.shape
    if down.shape != (num_experts, twice // 2, wide):
        return None
    generator, width = new_generator(), 16
    clone, parameters = _small_sorted(module, generator, width)
    x = 3 * randn(generator, num_experts * _ROWS, width)
    h = torch.bmm(x.view(num_experts, -1, width), parameters["gate_up_proj"])

    def finish(gated: Tensor) -> Tensor:
        return torch.bmm(gated, parameters["down_proj"]).view(-1, width)

    return _gate_of(module, functools.partial(call_forward, clone), finish, x, h)
