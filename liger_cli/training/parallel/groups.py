"""Which modules of a model are gathered and resharded together.

Every layer is a group, so is the embedding. The rest is the root's group: norm and head, which stay
gathered from forward to backward, since the fused loss reads the head after the head's own forward.
A matrix that two groups would share, as of a tied embedding and head, moves both to the root.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from liger_kernels.transformers.wrappers import inner_model

__all__ = ["groups_of", "has_separate_experts"]


def groups_of(model: Any) -> list[nn.Module]:
    """Return the modules that are groups of their own, in the order of the forward.

    What they leave is the group of the model itself.

    Args:
        model: A transformers model, or a PEFT wrapper of one; it may be on the meta device.
    """
    inner = inner_model(model)
    embedding = inner.get_input_embeddings()
    found = [*([] if embedding is None else [embedding]), *_layers(inner)]
    return _without_shared(model, found)


def has_separate_experts(model: Any) -> bool:
    """Return whether a layer has a list of experts, some of which a batch may not call."""
    return any(
        isinstance(module, nn.ModuleList)
        and len(module) > 1
        and name.rpartition(".")[2] == "experts"
        for layer in _layers(inner_model(model))
        for name, module in layer.named_modules()
    )


def _layers(model: Any) -> list[nn.Module]:
    """Return the layers that transformers never splits over devices; else those of module lists."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    listed = [layer for layer in _listed(model) if next(layer.parameters(), None) is not None]
    named = [layer for layer in listed if type(layer).__name__ in names]
    return named or listed


def _listed(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _listed(child)]


def _without_shared(model: nn.Module, groups: list[nn.Module]) -> list[nn.Module]:
    """Return the groups none of whose parameters another group, or the rest, has as well."""
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    kept = []
    for group in groups:
        inside = Counter(
            id(parameter)
            for module in group.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        )
        if inside and all(owners[key] == count for key, count in inside.items()):
            kept.append(group)
    return kept
