"""The model inside of what wraps it, and the arguments that its forward takes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["forward_parameters", "forward_takes", "inner_model", "output_head"]


def inner_model(model: nn.Module) -> Any:
    """Return the transformers model inside the wrappers of PEFT, torch.compile and DDP."""
    inner: Any = model
    while True:
        if hasattr(type(inner), "get_base_model"):
            inner = inner.get_base_model()
        elif "_orig_mod" in inner._modules:
            inner = inner._modules["_orig_mod"]
        elif "module" in inner._modules and not hasattr(inner, "get_output_embeddings"):
            inner = inner._modules["module"]
        else:
            return inner


def output_head(model: Any) -> nn.Module | None:
    """Return the language-model head of a transformers model; None if it has none."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = None if find is None else find()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the parameters of a model's forward by name, whatever wraps the model.

    A wrapper's own forward takes `*args, **kwargs` and hides them.
    """
    return dict(inspect.signature(inner_model(model).forward).parameters)


def forward_takes(model: nn.Module, name: str) -> bool | None:
    """Return whether a model's forward names an argument; None where its signature cannot say.

    A forward of nothing but `*args` and `**kwargs` passes its arguments on to a function that is
    not known here.
    """
    parameters = forward_parameters(model)
    if name in parameters:
        return True
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    hides = bool(parameters) and all(one.kind in rest for one in parameters.values())
    return None if hides else False
