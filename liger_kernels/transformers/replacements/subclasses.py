"""Subclasses that pass for their base, and swapping the class of one instance for one of them."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import nn

from liger_kernels.transformers.recognise import BASE_ATTRIBUTE, original_class

SPEC_ATTRIBUTE = "_patch_spec"
# Of a subclass: the function that made it, the forward of its base that it replaces, and the
# attributes that this one reads.
_MAKER, _STOCK, _READS = "_subclass_maker", "_patch_stock", "_patch_reads"
# Of a patched module: the values of these attributes when it was patched.
_HELD = "_patch_held"
_PLAIN_TYPES = (bool, int, float, str, tuple)
# Every subclass that was made, by maker, base, options and the code it was made from. The code is
# kept beside it, since the key names it by id.
_SUBCLASSES: dict[tuple[Any, ...], tuple[tuple[Any, ...], type[nn.Module]]] = {}


def subclass_in_place(
    make: Callable[..., type[nn.Module]],
    base: Any,
    *options: Any,
    members: Callable[[], dict[str, Any]],
    code: tuple[Any, ...] = (),
    is_undone: bool = True,
) -> type[nn.Module]:
    """Return the subclass of `base` that passes for it: same name, module and docstring.

    It is made once; pickle and deepcopy find it by calling make(base, *options), as its name is
    that of `base`.

    Args:
        make: The function of a module that calls this one, such as patched_class.
        base: The class.
        options: The other arguments of make, hashable.
        members: Returns the attributes that the subclass adds.
        code: The functions that the members were made from: another subclass is made where a tool
            has replaced one since.
        is_undone: Whether restoring a module gives it `base` back. False for a subclass that its
            instance keeps: original_class then returns it and not `base`.
    """
    key = (make, base, options, tuple(map(id, code)))
    if key not in _SUBCLASSES:
        cls = type(base.__name__, (base,), _members(make, base, options, members(), is_undone))
        _SUBCLASSES.setdefault(key, (code, cls))
    return _SUBCLASSES[key][1]


def _members(
    make: Callable[..., Any],
    base: Any,
    options: tuple[Any, ...],
    members: dict[str, Any],
    is_undone: bool,
) -> dict[str, Any]:
    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:
        return _new_instance, (make, base, *options), self.__getstate__()

    return {
        **members,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        _MAKER: make,
        **({BASE_ATTRIBUTE: base} if is_undone else {}),
    }


def _new_instance(make: Callable[..., Any], base: Any, *options: Any) -> nn.Module:
    """Return an empty instance of a subclass; pickle and deepcopy fill it."""
    cls: Any = make(base, *options)
    return cls.__new__(cls)


def is_made_by(make: Callable[..., Any], cls: type) -> bool:
    """Return whether a class is a subclass that make returned, or has one among its bases."""
    return any(vars(each).get(_MAKER) is make for each in cls.__mro__)


def patch_members(base: Any, spec: Any, reads: frozenset[str]) -> dict[str, Any]:
    """Return the attributes by which is_as_patched compares a module with its state at patching.

    Args:
        base: The class it replaces.
        spec: The form that its instances have.
        reads: The attributes of an instance that must keep their values for the patched class to
            compute the same as `base`.
    """
    return {SPEC_ATTRIBUTE: spec, _STOCK: base.forward, _READS: reads, _HELD: ()}


def is_patched(module: nn.Module) -> bool:
    """Return whether a module's class was swapped."""
    return original_class(type(module)) is not type(module)


class _Held(NamedTuple):
    """A value that a module held in an attribute when it was patched."""

    name: str
    value: Any
    # Of a child module: the values of its attributes, its children among them.
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
    held = module._patch_held
    return True if len(held) == 0 else _holds(module, held)


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
    """Return the values of some attributes of a module, which are no parameters or buffers."""
    found = []
    for name in sorted(names):
        if name in owner._modules:
            child: Any = owner._modules[name]
            inside = set() if child is None else {*vars(child), *child._modules} - _BOOKKEEPING
            settings = _held_by(child, inside) if inside else ()
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
