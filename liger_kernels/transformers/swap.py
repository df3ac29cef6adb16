"""Standing in for a class: a subclass that passes for it, and putting it in an instance's place."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from liger_kernels.transformers.recognise import BASE_ATTRIBUTE, original_class

SPEC_ATTRIBUTE = "_patch_spec"


def stand_in(
    base: Any,
    spec: Any,
    namespace: dict[str, Any],
    remake: Callable[..., nn.Module],
    *options: Any,
) -> type[nn.Module]:
    """Return a subclass of `base` that passes for it.

    Args:
        base: The class.
        spec: What its instances compute.
        namespace: What the subclass has of its own.
        remake: remake(base, spec, *options) returns an empty instance, which pickle and deepcopy
            fill: they find a class by its name, which is that of base.
        options: See remake.
    """

    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:
        return remake, (base, spec, *options), self.__getstate__()

    return type(
        base.__name__,
        (base,),
        {
            **namespace,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": __reduce_ex__,
            BASE_ATTRIBUTE: base,
            SPEC_ATTRIBUTE: spec,
        },
    )


def is_patched(module: nn.Module) -> bool:
    """Return whether a module's class was swapped."""
    return original_class(type(module)) is not type(module)


def swap(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give module another class, also beneath a forward that accelerate's hooks hold."""
    old = type(module).forward
    module.__class__ = cls
    for slot in ("forward", "_old_forward"):
        bound = vars(module).get(slot)
        if _is_own(bound, module, old):
            vars(module)[slot] = types.MethodType(cls.forward, module)


def can_swap(module: nn.Module) -> bool:
    """Return whether a swap would change what the module does when called."""
    held = [vars(module)[slot] for slot in ("forward", "_old_forward") if slot in vars(module)]
    return "forward" not in vars(module) or any(
        _is_own(bound, module, type(module).forward) for bound in held
    )


def _is_own(bound: Any, module: nn.Module, function: Callable[..., Any]) -> bool:
    return (
        isinstance(bound, types.MethodType)
        and bound.__self__ is module
        and bound.__func__ is function
    )
