"""Blocks with a list of experts: moe_experts on their weights, which lie together in memory.

The weights of all gates and ups are moved into one storage, and those of all downs into another,
one expert after another. Each stays the parameter of its layer, with a gradient, a name and a state
of the optimizer as before; together they are the 3-D weights that the op takes, without a copy.
Where they lie is seen from their addresses at every call: after anything that gave a layer other
memory, the forward of the class runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.ops.host_copy import copy_to_host
from liger_kernels.transformers.recognise import ExpertListSpec, routed_output
from liger_kernels.transformers.replacements.calls import (
    is_bare,
    is_plain,
    runs_stock_linear,
)
from liger_kernels.transformers.replacements.experts import (
    autocast_dtype,
    is_id,
    is_served,
    run_experts,
)
from liger_kernels.transformers.replacements.joined_weights import (
    join,
    joined_view,
    lay_together,
    lie_together,
)
from liger_kernels.transformers.replacements.subclasses import is_as_patched

# Of a block: that its weights had no data when they were to be moved.
_IS_ON_META = "_experts_on_meta"
# (hidden (T, H), weights (T, K), ids (T, K)) -> (T, H)
_Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


def expert_list_members(base: Any, spec: ExpertListSpec) -> dict[str, Any]:
    """Return the members of a subclass of a block: a forward, or a `moe`, that calls the op."""
    name = "moe" if spec.routing is None else "forward"
    stock, stock_expert = getattr(base, name), spec.expert.forward

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_stock = getattr(base, name) is stock and spec.expert.forward is stock_expert
        if is_stock and not kwargs and _are_plain(spec, args) and is_as_patched(self):
            compute = _experts_of(self, spec, args[0])
            if compute is not None:
                return _routed(self, spec, compute, *args)
        return getattr(base, name)(self, *args, **kwargs)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        groups = _weights_of(self, spec)
        are_together = all(each[0].is_meta or lie_together(each) for each in groups)
        result = base._apply(self, *args, **kwargs)
        if are_together:
            lay_experts_together(self, spec)
        return result

    def train(self: Any, mode: bool = True) -> Any:
        # Loaders that assign weights to a model on meta call this, or eval(), when they are done.
        result = base.train(self, mode)
        if vars(self).pop(_IS_ON_META, False):
            lay_experts_together(self, spec)
        return result

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        base.__setstate__(self, state)
        lay_experts_together(self, spec)

    # A tracer would look at the address of each weight.
    own = torch.compiler.disable(functools.wraps(stock)(run))
    members = {"_apply": _apply, "train": train, "__setstate__": __setstate__}
    return {name: own, **members}


def lay_experts_together(module: Any, spec: ExpertListSpec) -> None:
    """Move the weights of a block's experts together; those that cannot be stay where they are.

    Those on meta are waited for, until the block is put in a mode (train, eval) with weights. Later
    nothing moves by itself: FSDP2 gives layers memory for a while that is not theirs.
    """
    groups = _weights_of(module, spec)
    if any(weight.is_meta for group in groups for weight in group):
        vars(module)[_IS_ON_META] = True
        return
    for group in groups:
        lay_together(group)


def _are_plain(spec: ExpertListSpec, args: tuple[Any, ...]) -> bool:
    """Return whether a call has the inputs that the stock code was probed with."""
    if len(args) != (3 if spec.routing is None else 1) or not is_plain(args[0]):
        return False
    if spec.routing is not None:
        return args[0].dim() == 3
    hidden, ids, weights = args
    return hidden.dim() == 2 and is_id(ids) and is_plain(weights) and weights.shape == ids.shape


def _routed(module: Any, spec: ExpertListSpec, compute: _Compute, *args: Tensor) -> Any:
    """Compute the result of the forward of a block, or of its method `moe`."""
    if spec.routing is None:
        hidden, ids, weights = args
        return compute(hidden, weights, ids)
    y, logits = routed_output(module, spec.routing, module.top_k, args[0], compute)
    return (y, logits) if spec.routing.returns_logits else y


def _experts_of(module: Any, spec: ExpertListSpec, hidden: Tensor) -> _Compute | None:
    """Return the function that computes a block's experts by the op, or None where it must not."""
    groups = _weights_of(module, spec)
    if not groups or not _are_stock(module.experts, spec):
        return None
    views = list(map(joined_view, groups))
    if views[0] is None or views[1] is None:
        return None
    rows, num_experts = hidden.reshape(-1, hidden.shape[-1]), len(module.experts)
    gate_up = views[0].view(num_experts, -1, views[0].shape[2])
    if not is_served(rows, rows, gate_up, views[1], None, None):
        return None

    def compute(hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        num_rows = None
        if torch.is_grad_enabled() and not spec.calls_all:
            is_called = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
            num_rows = copy_to_host(is_called.index_fill_(0, ids.flatten().long(), 1))
        dtype = autocast_dtype(hidden) or hidden.dtype
        gates_and_ups, downs = (join(group, num_rows).to(dtype) for group in groups)
        rows = (hidden.to(dtype), weights, ids)
        shared = (gates_and_ups.view(gate_up.shape), downs)
        y = run_experts(module, rows, shared, {"activation": spec.mlp.activation})
        return y.to(hidden.dtype)

    return compute


def _are_stock(experts: Any, spec: ExpertListSpec) -> bool:
    """Return whether calling experts is calling their class's forward and its linear layers."""
    mlp = spec.mlp
    if not runs_stock_linear(experts[0]._modules[mlp.gate]):
        return False
    # A loop over dictionaries: it runs in every call, for some 500 modules.
    for expert in experts:
        children = expert._modules
        if not is_bare(expert, *filter(None, children.values())):
            return False
        for name in (mlp.gate, mlp.up, mlp.down):
            if children[name]._parameters["bias"] is not None:
                return False
    return True


def _weights_of(module: Any, spec: ExpertListSpec) -> list[list[nn.Parameter]]:
    """Return the weights of gate and up of each expert in turn, and those of each down.

    [] once the experts are no longer a list of MLPs of plain linear layers.
    """
    mlp, experts = spec.mlp, module._modules["experts"]._modules.values()
    groups = [
        [expert._modules.get(name) for expert in experts for name in names]
        for names in ((mlp.gate, mlp.up), (mlp.down,))
    ]
    if any(type(layer) is not nn.Linear for group in groups for layer in group):
        return []
    # Tools that compute a weight take the parameter away.
    weights = [[layer._parameters.get("weight") for layer in group] for group in groups]
    return weights if experts and all(map(_are_there, weights)) else []


def _are_there(weights: list[Any]) -> bool:
    return all(weight is not None for weight in weights)
