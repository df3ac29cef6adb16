"""Fixes of stock models that cannot run as the installed transformers ships them.

Each fix looks for the defect itself, not for a version or a model type, so it ends with the
defect. It swaps a class on one instance; the class's other instances stay as they were.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from torch import nn
from transformers.utils import ModelOutput

from liger_kernels.transformers.recognise import reachable_functions
from liger_kernels.transformers.replacements.subclasses import is_made_by, subclass_in_place


def repair_model(model: nn.Module) -> str | None:
    """Make a model able to run where its own classes contradict each other.

    transformers 5.24 has one such model, llama4 with images: its forward reads image_outputs off
    the output of its language model, whose class has no such field, and every call raises.

    Returns:
        The defect and the fix, in a sentence; None if there was none.
    """
    inner = model._modules.get("language_model")
    cls: Any = type(inner)
    if inner is None or is_made_by(_with_field, cls):
        return None
    if _FIELD not in _names(model) or not _lacks_field(inner):
        return None
    inner.__class__ = _with_field(cls)
    return (
        f"{type(model).__name__} of transformers {transformers.__version__} cannot run: it reads "
        f"{_FIELD} off the output of its {cls.__name__}, which has none. The class of that "
        f"one module was swapped for one whose output carries {_FIELD}=None"
    )


_FIELD = "image_outputs"


def _names(module: nn.Module) -> set[str]:
    """Return the globals and attributes that a module's forward names."""
    functions = reachable_functions(type(module).forward)
    return {name for function in functions for name in function.__code__.co_names}


def _lacks_field(module: nn.Module) -> bool:
    """Return whether the outputs that a module's forward makes have no image_outputs."""
    made = [
        value
        for function in reachable_functions(type(module).forward)
        for name in function.__code__.co_names
        if isinstance(value := function.__globals__.get(name), type)
        and issubclass(value, ModelOutput)
    ]
    return bool(made) and not any(hasattr(output, _FIELD) for output in made)


def _with_field(base: Any) -> Any:
    """Return the subclass of `base` whose output carries the field."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        # Asked for a tuple, it has no fields at all, and none is read.
        if isinstance(output, ModelOutput):
            output.image_outputs = None
        return output

    return subclass_in_place(
        _with_field, base, members=lambda: {"forward": forward}, is_undone=False
    )
