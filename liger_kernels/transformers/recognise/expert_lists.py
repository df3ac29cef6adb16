"""Experts as a list of gated MLPs, as in transformers 4: how their block routes tokens to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.ops.moe_experts import moe_experts_ref
from liger_kernels.transformers.recognise.mlps import ProbeLinear, recognise_mlp
from liger_kernels.transformers.recognise.probe import (
    Halved,
    call_forward,
    is_close,
    is_linear,
    linear_sizes,
    new_generator,
    original_class,
    probe_copy,
    quiet,
    randn,
    takes_one_tensor,
    uniform,
)
from liger_kernels.transformers.recognise.specs import (
    ExpertListRefusal,
    ExpertListSpec,
    MlpSpec,
    SoftmaxRouting,
)

# Sizes of the probe.
_ROWS, _WIDTH, _INNER = 10, 16, 8
_ALONE = ": each expert runs by itself"


def recognise_expert_list(module: nn.Module) -> ExpertListSpec | ExpertListRefusal | None:
    """Return the form of a block with a list of experts; a refusal where they must run one by one.

    None: it has no list of gated MLPs.
    """
    experts = module._modules.get("experts")
    if type(experts) is not nn.ModuleList or not len(experts):
        return None
    mlp = recognise_mlp(experts[0])
    if not isinstance(mlp, MlpSpec) or mlp.layout != "separate":
        return None
    problem = _problem(experts, mlp)
    if problem is not None:
        return ExpertListRefusal(problem + _ALONE)
    others = tuple(n for n, m in module._modules.items() if m is not None and n != "experts")
    spec = ExpertListSpec(original_class(type(experts[0])), mlp, others, None)
    try:
        with quiet():
            if inspect.isfunction(getattr(original_class(type(module)), "moe", None)):
                return _given_spec(module, spec) or _other_routing()
            return _routed_spec(module, spec) or _other_routing()
    except Exception:
        return _other_routing()


def _other_routing() -> ExpertListRefusal:
    return ExpertListRefusal(
        "experts in a list, chosen in another way than as the top k of a softmax" + _ALONE
    )


def _problem(experts: nn.ModuleList, mlp: MlpSpec) -> str | None:
    """Return why the weights of a list of experts cannot be one tensor, or None."""
    if len({original_class(type(expert)) for expert in experts}) > 1:
        return "experts of several classes in a list"
    weights: list[Tensor] = []
    for expert in experts:
        for name in (mlp.gate, mlp.up, mlp.down):
            layer: Any = expert._modules[name]
            weight = getattr(layer, "weight", None)
            if "forward" in vars(layer):
                return (
                    "experts in a list with another forward set on their layers (as by accelerate)"
                )
            if "lora_A" in layer._modules:
                return (
                    "experts in a list with LoRA adapters (leave them out of lora_target_modules "
                    "to have moe_experts)"
                )
            if type(layer) is not nn.Linear or type(weight) is not nn.Parameter:
                kinds = f"{type(layer).__name__} with a {type(weight).__name__}"
                return f"experts in a list whose layers are no plain nn.Linear, but {kinds}"
            if layer.bias is not None:
                return "experts in a list whose layers have biases"
            weights.append(weight)
    if len(set(map(id, weights))) < len(weights):
        return "experts in a list that share weights"
    for index in range(3):
        if len({(w.shape, w.dtype, w.device) for w in weights[index::3]}) > 1:
            return "experts in a list of several sizes, dtypes or devices"
    return None


class _Counted(nn.Module):
    """An expert that counts its calls."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert, self.num_calls = expert, 0

    def forward(self, x: Tensor) -> Any:
        """Return the output of the expert."""
        self.num_calls += 1
        return call_forward(self.expert, x)


class _Small:
    """Copies of the experts of a block with small weights, and these as moe_experts takes them."""

    def __init__(self, experts: Any, mlp: MlpSpec, generator: torch.Generator) -> None:
        self.mlp = mlp
        self.gate_up = _WIDTH**-0.5 * randn(generator, len(experts), 2 * _INNER, _WIDTH)
        self.down = _INNER**-0.5 * randn(generator, len(experts), _WIDTH, _INNER)
        self.experts: Any = nn.ModuleList(
            _Counted(
                probe_copy(
                    expert,
                    modules={
                        mlp.gate: ProbeLinear(gate_up[:_INNER]),
                        mlp.up: ProbeLinear(gate_up[_INNER:]),
                        mlp.down: ProbeLinear(down),
                    },
                )
            )
            for expert, gate_up, down in zip(experts, self.gate_up, self.down, strict=True)
        )

    def reference(self, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts."""
        activation = self.mlp.activation
        return moe_experts_ref(hidden, weights, ids, self.gate_up, self.down, activation=activation)

    def are_all_called(self, call: Callable[..., Any], *args: Any) -> bool:
        """Return whether call(*args) calls every expert."""
        for expert in self.experts:
            expert.num_calls = 0
        call(*args)
        return all(expert.num_calls for expert in self.experts)


def _given_spec(module: Any, spec: ExpertListSpec) -> ExpertListSpec | None:
    """Return the spec if the method `moe` is the weighted sum of the chosen experts and no more."""
    generator = new_generator()
    small = _Small(module.experts, spec.mlp, generator)
    clone: Any = probe_copy(module, modules={"experts": small.experts})
    num_experts = len(module.experts)
    hidden = randn(generator, _ROWS, _WIDTH)
    ids = uniform(generator, _ROWS, num_experts).topk(min(2, num_experts), dim=1).indices
    weights = uniform(generator, *ids.shape)
    if not is_close(clone.moe(hidden, ids, weights), small.reference(hidden, weights, ids)):
        return None
    calls_all = small.are_all_called(clone.moe, hidden[:1], ids[:1], weights[:1])
    return replace(spec, calls_all=calls_all)


def _routed_spec(module: Any, spec: ExpertListSpec) -> ExpertListSpec | ExpertListRefusal | None:
    """Return the spec with the routing of the block's forward, or None if it is another."""
    top_k = getattr(module, "top_k", None)
    if type(top_k) is not int or not takes_one_tensor(original_class(type(module))):
        return None
    for routing, parts in _routings(module, spec.others):
        generator = new_generator()
        small = _Small(module.experts, spec.mlp, generator)
        clone = probe_copy(module, modules={"experts": small.experts, **parts})
        hidden = randn(generator, 2, _ROWS // 2, _WIDTH)
        result = call_forward(clone, hidden.clone())
        y, found_logits = result if isinstance(result, tuple) else (result, None)
        for normalizes in (False, True):
            tried = replace(routing, normalizes=normalizes, returns_logits=found_logits is not None)
            wanted, logits = routed_output(clone, tried, top_k, hidden, small.reference)
            if is_close(y, wanted) and (found_logits is None or is_close(found_logits, logits)):
                calls_all = small.are_all_called(call_forward, clone, hidden[:1, :1])
                found = replace(spec, routing=tried, calls_all=calls_all)
                return _without_noise(clone, hidden, y) or found
    return None


def _routings(
    module: Any, names: tuple[str, ...]
) -> Iterator[tuple[SoftmaxRouting, dict[str, nn.Module]]]:
    """Yield the routings that the children of a block allow, with small children that are known."""
    num_experts, generator = len(module.experts), new_generator()
    for name in names:
        child = module._modules[name]
        inner = [n for n, layer in child.named_children() if is_linear(layer)]
        layer = child if is_linear(child) else getattr(child, inner[0]) if len(inner) == 1 else None
        if layer is None or linear_sizes(layer)[1] != num_experts:
            continue
        router: nn.Module = ProbeLinear(randn(generator, num_experts, _WIDTH))
        if layer is not child:
            router = probe_copy(child, modules={inner[0]: router})
        routing = SoftmaxRouting(name, takes_rows=layer is child)
        rest = [other for other in names if other != name]
        if not rest:
            yield routing, {name: router}
        elif len(rest) == 1:
            yield replace(routing, shared=rest[0]), {name: router, rest[0]: Halved()}
        elif len(rest) == 2:
            for shared, gate in (rest, rest[::-1]):
                layer = module._modules[gate]
                if is_linear(layer) and linear_sizes(layer)[1] == 1:
                    known = ProbeLinear(randn(generator, 1, _WIDTH))
                    parts = {name: router, shared: Halved(), gate: known}
                    yield replace(routing, shared=shared, shared_gate=gate), parts


def _without_noise(clone: nn.Module, hidden: Tensor, y: Tensor) -> ExpertListRefusal | None:
    """Return a refusal if a block computes something else in training."""
    clone.training = True
    result = call_forward(clone, hidden.clone())
    if torch.equal(result[0] if isinstance(result, tuple) else result, y):
        return None
    return ExpertListRefusal(
        "experts in a list whose block draws noise in training, which no kernel does (set the "
        "jitter noise to 0 in the configuration)" + _ALONE,
        is_known_form=True,
    )


def routed_output(
    module: Any, routing: SoftmaxRouting, top_k: int, hidden: Tensor, compute: Any
) -> tuple[Tensor, Tensor]:
    """Return the output of a block, shaped as hidden, and the router's logits.

    Args:
        module: The block, whose children are called.
        routing: How it routes.
        top_k: Experts a token.
        hidden: (..., H).
        compute: (hidden (T, H), weights (T, K), ids (T, K)) -> (T, H), the experts.
    """
    rows = hidden.view(-1, hidden.shape[-1])
    logits = getattr(module, routing.router)(rows if routing.takes_rows else hidden)
    weights, ids = torch.softmax(logits, dim=1, dtype=torch.float32).topk(top_k, dim=-1)
    if routing.normalizes:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    y = compute(rows, weights.to(rows.dtype), ids)
    if routing.shared:
        shared = getattr(module, routing.shared)(rows if routing.takes_rows else hidden)
        if routing.shared_gate:
            shared = torch.sigmoid(getattr(module, routing.shared_gate)(rows)) * shared
        y = y + shared.view(y.shape)
    return y.view(hidden.shape), logits
