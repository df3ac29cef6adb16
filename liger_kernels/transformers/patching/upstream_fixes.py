"""Repairs of stock models that cannot run as the installed transformers ships them.

Each repair looks for the defect itself, not for a version or a model type, so it ends with the
defect. It swaps a class on one instance; the class's other instances stay as they were.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from torch import nn
from transformers.utils import ModelOutput

from liger_kernels.transformers.recognise import reachable_functions


def repair_model(model: nn.Module) -> str | None:
    """Make a model able to run where its own classes contradict each other.

    transformers 5.24 has one such model, llama4 with images: its forward reads image_outputs off
    the output of its language model, whose class has no such field, and every call raises.

    Returns:
        What was wrong and was done, in a sentence; None if nothing had to be.
    """
    inner = model._modules.get("language_model")
    cls: Any = type(inner)
    if inner is None or hasattr(cls, _BASE):
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
# The attribute of a repaired class that holds the class it stands for.
_BASE = "_repair_base"


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


@functools.cache
def _with_field(base: Any) -> Any:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        # Asked for a tuple, it has no fields at all, and none is read.
        if isinstance(output, ModelOutput):
            output.image_outputs = None
        return output

    # The names of the class it stands for, by which transformers looks classes up.
    return type(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            _BASE: base,
        },
    )


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    # pickle finds a class by its name, which is that of the class it stands for.
    return make_repaired, (self._repair_base,), self.__getstate__()


def make_repaired(base: Any) -> Any:
    """Return an empty repaired instance; pickle and deepcopy fill it."""
    cls = _with_field(base)
    return cls.__new__(cls)
