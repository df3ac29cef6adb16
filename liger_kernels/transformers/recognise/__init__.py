"""Recognise the form of a module by running it on small numbers: norm, gated MLP, experts, RoPE,
LoRA.

A probe never touches the module itself. It runs the class's forward on a probe copy that shares the
module's attributes and holds small random weights on the CPU, so it costs the same for a tiny model
and for a 70B one, and works on meta tensors and on quantised or LoRA-wrapped linear layers. Random
numbers come from local generators, and the global one is put back in case a forward draws from it.

Every recogniser returns a spec (the module computes what an op computes), a Refusal (it looks like
a candidate but must be left alone, in words a user can act on), or None (it is something else).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_kernels.transformers.recognise.adapters import (
    computes_dora,
    input_readers,
    is_lora_linear,
    lora_group,
    recognise_lora,
)
from liger_kernels.transformers.recognise.expert_lists import (
    recognise_expert_list,
    routed_output,
)
from liger_kernels.transformers.recognise.experts import (
    experts_options,
    recognise_experts,
    recognise_moe_block,
    split_gate,
)
from liger_kernels.transformers.recognise.mlps import recognise_mlp
from liger_kernels.transformers.recognise.norms import recognise_norm
from liger_kernels.transformers.recognise.probe import (
    BASE_ATTRIBUTE,
    is_linear,
    linear_sizes,
    original_class,
)
from liger_kernels.transformers.recognise.ropes import (
    global_names,
    is_sin_first,
    reachable_functions,
    recognise_rope,
    recognise_rotary,
    rope_functions,
    rope_inputs,
    rope_parameters,
    splits_halves,
)
from liger_kernels.transformers.recognise.specs import (
    ACTIVATIONS,
    GLU_OPS,
    NO_KERNEL,
    BlockRefusal,
    ExpertListRefusal,
    ExpertListSpec,
    ExpertsSpec,
    GatedNormSpec,
    HeadSpec,
    LayerNormSpec,
    Layout,
    LoraRefusal,
    LoraSpec,
    Mismatch,
    MlpSpec,
    MoeBlockSpec,
    NormSpec,
    Refusal,
    RopeSpec,
    SoftmaxRouting,
    Spec,
    unserved,
)

__all__ = [
    "ACTIVATIONS",
    "BASE_ATTRIBUTE",
    "GLU_OPS",
    "NO_KERNEL",
    "BlockRefusal",
    "ExpertListRefusal",
    "ExpertListSpec",
    "ExpertsSpec",
    "GatedNormSpec",
    "HeadSpec",
    "LayerNormSpec",
    "Layout",
    "LoraRefusal",
    "LoraSpec",
    "Mismatch",
    "MlpSpec",
    "MoeBlockSpec",
    "NormSpec",
    "Recogniser",
    "Refusal",
    "RopeSpec",
    "SoftmaxRouting",
    "Spec",
    "computes_dora",
    "experts_options",
    "global_names",
    "input_readers",
    "is_linear",
    "is_lora_linear",
    "is_sin_first",
    "lora_group",
    "original_class",
    "reachable_functions",
    "recognise_expert_list",
    "recognise_experts",
    "recognise_lora",
    "recognise_mlp",
    "recognise_moe_block",
    "recognise_norm",
    "recognise_rope",
    "recognise_rotary",
    "rope_functions",
    "rope_inputs",
    "rope_parameters",
    "routed_output",
    "split_gate",
    "unserved",
]


class Recogniser:
    """Recognises modules of one model; equal modules are probed once.

    Lives as long as one plan: its keys name objects by id, which only holds while the model does.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._known: dict[Any, Any] = {}
        # The modeling files whose tables no op reads: an attention does not show its tables.
        rotaries = () if model is None else model.modules()
        self._split = {original_class(type(m)).__module__ for m in rotaries if splits_halves(m)}

    def recognise(self, module: nn.Module) -> Spec | Refusal | None:
        """Return the form of a module, why it is left alone, or None if it is nothing known."""
        if isinstance(module, torch.jit.ScriptModule):
            return None
        lora = recognise_lora(module)
        if lora is not None:
            return lora
        key = _fingerprint(module)
        if key not in self._known:
            self._known[key] = (
                recognise_norm(module)
                or recognise_experts(module)
                or recognise_moe_block(module)
                or recognise_expert_list(module)
                or recognise_mlp(module)
                or self._rope(module)
            )
        return self._known[key]

    def readers(self, owner: nn.Module) -> tuple[str, ...]:
        """Return input_readers of a module; like ones are asked once."""
        key = ("readers", _fingerprint(owner))
        if key not in self._known:
            self._known[key] = input_readers(owner)
        return self._known[key]

    def _rope(self, module: nn.Module) -> RopeSpec | Refusal | None:
        # Decided by the class alone, while two attentions seldom have the same attributes.
        cls = original_class(type(module))
        if cls not in self._known:
            found = recognise_rope(module)
            if isinstance(found, RopeSpec) and cls.__module__ in self._split:
                found = unserved("rotary tables with other angles in their second half")
            self._known[cls] = found
        return self._known[cls]


# Attributes of a module that its forward does not read.
_BOOKKEEPING = {*vars(nn.Module()), "forward", "layer_idx", "_old_forward", "_hf_hook"}


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return a key of everything a forward may depend on except the values of weights."""
    children = tuple(
        (name, *linear_sizes(child))
        if is_linear(child)
        else (name, type(child), _attributes(child), *map(id, child.children()))
        for name, child in module.named_children()
    )
    shapes = tuple(
        (k, None if p is None else tuple(p.shape)) for k, p in module._parameters.items()
    )
    return (original_class(type(module)), _attributes(module), shapes, children)


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
        for name, value in vars(module).items()
        if name not in _BOOKKEEPING
    )
