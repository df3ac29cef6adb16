"""Standing in for a class: a subclass that passes for it, and putting it in an instance's place."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import nn

from liger_kernels.transformers.recognise import BASE_ATTRIBUTE, original_class

SPEC_ATTRIBUTE = "_patch_spec"
# Of a patched class: the forward of its base that it replaces, and the attributes that one reads.
_STOCK, _READS = "_patch_stock", "_patch_reads"
# Of a patched module: what it held in these attributes.
_HELD = "_patch_held"
_PLAIN_TYPES = (bool, int, float, str, tuple)


def stand_in(
    base: Any,
    spec: Any,
    namespace: dict[str, Any],
    remake: Callable[..., nn.Module],
    *options: Any,
    reads: frozenset[str] = frozenset(),
) -> type[nn.Module]:
    """Return a subclass of `base` that passes for it.

    Args:
        base: The class.
        spec: What its instances compute.
        namespace: What the subclass has of its own.
        remake: remake(base, spec, *options) returns an empty instance, which pickle and deepcopy
            fill: they find a class by its name, which is that of base.
        options: See remake.
        reads: The attributes of an instance that must stay what they were for the subclass to do
            what its base does; see is_as_patched.
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
            _STOCK: base.forward,
            _READS: reads,
            _HELD: (),
        },
    )


def is_patched(module: nn.Module) -> bool:
    """Return whether a module's class was swapped."""
    return original_class(type(module)) is not type(module)


class _Held(NamedTuple):
    """A value that a module held in an attribute when it was patched."""

    name: str
    value: Any
    # Of a child: what that held in its own.
    settings: tuple[_Held, ...]


def is_as_patched(module: Any) -> bool:
    """Return whether a module still is what its patched class was chosen for.

    It is not once it was restored (a wrapper may have kept the forward), once its stock class was
    given another forward, or once an activation or a setting was replaced: then the forward of its
    stock class has to run.
    """
    cls: Any = type(module)
    base = getattr(cls, BASE_ATTRIBUTE, None)
    if base is None or base.forward is not cls._patch_stock:
        return False
    return _holds(module, module._patch_held)


def _holds(owner: Any, entries: tuple[_Held, ...]) -> bool:
    for name, value, settings in entries:
        now = getattr(owner, name, None)
        # Numbers and text are other objects once they were pickled.
        if now is not value and not (type(value) in _PLAIN_TYPES and now == value):
            return False
        if settings and not _holds(now, settings):
            return False
    return True


def _held_by(owner: nn.Module, names: Collection[str]) -> tuple[_Held, ...]:
    """Return what a module holds in some attributes, which are no parameters or buffers."""
    found = []
    for name in sorted(names):
        if name in owner._modules:
            child: Any = owner._modules[name]
            settings = () if child is None else _held_by(child, vars(child).keys() - _BOOKKEEPING)
            found.append(_Held(name, child, settings))
        elif name in vars(owner):
            found.append(_Held(name, vars(owner)[name], ()))
    return tuple(found)


# What every module carries, and what others write on it.
_BOOKKEEPING = {*vars(nn.Module()), "forward", "_old_forward", "_hf_hook"}


def swap(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give module another class, also beneath a forward that accelerate's hooks hold.

    A module has its patched class for as long as it holds a forward of that class: wherever the
    swap is interrupted, the way back sees from the class what there is to do.
    """
    old = type(module).forward
    vars(module).pop(_HELD, None)
    if not is_patched(module):
        held = _held_by(module, getattr(cls, _READS, ()))
        if held:
            vars(module)[_HELD] = held
        module.__class__ = cls
    for slot in ("forward", "_old_forward"):
        bound = vars(module).get(slot)
        if _is_own(bound, module, old):
            vars(module)[slot] = types.MethodType(cls.forward, module)
    module.__class__ = cls


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
