"""Attention whose rotary function is the op: the same forward, with that one name changed."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liger_kernels.ops import rope
from liger_kernels.transformers.recognise import (
    RopeSpec,
    global_names,
    is_sin_first,
    reachable_functions,
    rope_functions,
    rope_inputs,
    rope_parameters,
)
from liger_kernels.transformers.replacements.adapters import sharing
from liger_kernels.transformers.replacements.calls import is_plain, record_call
from liger_kernels.transformers.replacements.recompute import recomputing
from liger_kernels.transformers.replacements.subclasses import is_as_patched


@functools.cache
def rotary_by_op(original: Callable[..., Any], spec: RopeSpec) -> Callable[..., Any]:
    """Return a function of original's signature that rotates through the op."""
    names, num_inputs = rope_parameters(original), rope_inputs(original)
    is_complex = spec.angles in ("complex", "complex_shared")
    num_required = num_inputs + (1 if is_complex else 2)
    sin_first = is_sin_first(original)
    called = original.forward if isinstance(original, nn.Module) else original

    @functools.wraps(called)
    def rotate(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        required = [given.pop(name, None) for name in names[:num_required]]
        inputs, angles = required[:num_inputs], required[num_inputs:]
        if sin_first:
            angles.reverse()
        axis = given.pop("unsqueeze_dim", spec.unsqueeze_dim)
        if spec.angles == "sections":
            angles = _merge_sections(angles, given.pop("mrope_section", None))
        elif spec.angles == "complex_shared":
            angles = [table.squeeze(1) for table in angles if isinstance(table, Tensor)]
        is_extra = any(value is not None for value in given.values())
        if is_extra or not _can_rotate(inputs, angles, axis, is_complex=is_complex):
            return original(*args, **kwargs)
        if is_complex:
            angles = [angles[0].real, angles[0].imag]
        elif spec.angles == "repeated":
            angles = [table[..., ::2] for table in angles]
        width = angles[0].shape[-1] * (1 if spec.angles in ("twice", "sections") else 2)
        if width % 2 or width > inputs[0].shape[-1]:
            return original(*args, **kwargs)
        record_call()
        if not spec.keeps_dtype:
            inputs = [_widen(x, angles[0]) for x in inputs]
        if spec.is_backward:
            angles = [angles[0], -angles[1]]
        at = inputs[0].shape[-1] - width if spec.is_last else 0
        q, k = (*[x[..., at:] for x in inputs], None)[:2]
        turned: tuple[Any, ...]
        turned = rope(q, k, *angles, style=spec.style, rotary_dim=width, unsqueeze_dim=axis)
        if at:
            turned = tuple(
                torch.cat((x[..., :at], y), dim=-1)
                for x, y in zip(inputs, turned, strict=False)
                if y is not None
            )
        return turned[0] if spec.is_single else turned

    return rotate


def _merge_sections(tables: list[Any], sections: Any) -> list[Tensor]:
    """Return (B, T, D) of tables (3, B, T, D), each kind of positions in its section of D."""
    if sections is None or not all(isinstance(table, Tensor) for table in tables):
        return []
    sizes = [*sections, *sections]
    return [
        torch.cat([part[i % 3] for i, part in enumerate(table.split(sizes, dim=-1))], dim=-1)
        for table in tables
    ]


def _can_rotate(
    inputs: list[Any], angles: list[Any], axis: Any, *, is_complex: bool = False
) -> bool:
    """Return whether the op takes these shapes: heads at `axis`, an angle for every token."""
    for x in (*inputs, *angles):
        if type(x) is not Tensor:
            return False
    if not is_plain(*inputs):
        return False
    rank = inputs[0].dim()
    axis = axis - rank if axis >= 0 else axis
    if rank not in (3, 4) or axis not in (-3, -2):
        return False
    num_tokens = inputs[0].shape[-5 - axis]
    batch = inputs[0].shape[0] if rank == 4 else 1
    leads = ((num_tokens,), (1, num_tokens), (batch, num_tokens))
    # Not bool(angles): dynamo of torch 2.11 does not trace that.
    for x in angles:
        is_constant = x.is_complex() == is_complex and not x.requires_grad
        if not is_constant or x.shape != angles[0].shape or x.shape[:-1] not in leads:
            return False
    return len(angles) > 0


def _widen(x: Tensor, cos: Tensor) -> Tensor:
    """Return x in the dtype of x * cos; under autocast in its own, which attention takes anyway."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.promote_types(x.dtype, cos.dtype))


def rebuild(
    function: types.FunctionType,
    replacements: Mapping[str, Callable[..., Any]],
    known: dict[types.FunctionType, types.FunctionType],
) -> types.FunctionType:
    """Copy a function, and those its decorators hide, so that global names find the replacements.

    A forward reaches its rotary function as a global of its module. Changing that global would
    change every model of the family, so the copy gets other globals.
    """
    if function in known:
        return known[function]
    own = types.CellType()
    cells = [
        _rebuilt_cell(cell, function, own, replacements, known)
        for cell in function.__closure__ or ()
    ]
    names = global_names(function.__code__) & set(replacements)
    is_same = all(
        new is own or new is old for new, old in zip(cells, function.__closure__ or (), strict=True)
    )
    if is_same and not names:
        known[function] = function
        return function
    namespace = function.__globals__
    if names:
        namespace = _overlay(namespace, {name: replacements[name] for name in names})
    copy = types.FunctionType(
        function.__code__,
        namespace,
        function.__name__,
        function.__defaults__,
        tuple(cells) if cells else None,
    )
    own.cell_contents = copy
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    wrapped = function.__dict__.get("__wrapped__")
    if isinstance(wrapped, types.FunctionType):
        copy.__dict__["__wrapped__"] = rebuild(wrapped, replacements, known)
    else:
        # update_wrapper points it at the function that is replaced.
        del copy.__dict__["__wrapped__"]
    known[function] = copy
    return copy


def _rebuilt_cell(
    cell: types.CellType,
    function: types.FunctionType,
    own: types.CellType,
    replacements: Mapping[str, Callable[..., Any]],
    known: dict[types.FunctionType, types.FunctionType],
) -> types.CellType:
    """Return the cell of a copied function: `own` for the function itself, else rebuilt or same."""
    # An empty cell belongs to a function that is still being defined.
    try:
        content = cell.cell_contents
    except ValueError:
        return cell
    if content is function:
        # It asks whether it is the outermost of its kind; the copy has to ask for itself.
        return own
    if not isinstance(content, types.FunctionType):
        return cell
    rebuilt = rebuild(content, replacements, known)
    return cell if rebuilt is content else types.CellType(rebuilt)


def _overlay(
    namespace: dict[str, Any], replacements: Mapping[str, Callable[..., Any]]
) -> dict[str, Any]:
    """Return the globals of a module with some names replaced, as they are at this moment.

    They belong to a module that can be imported, because torch.compile looks guards of globals up
    through sys.modules. A later change of the original module's globals is not seen here.
    """
    name = namespace["__name__"]
    index = sum(key.startswith(f"{__name__}.{name}.") for key in sys.modules)
    overlay = types.ModuleType(f"{__name__}.{name}.{index}")
    # The package stays the original's: imports inside its functions are relative to that.
    own = {"__name__": overlay.__name__, "__spec__": None, "__loader__": None}
    vars(overlay).update({**namespace, **replacements, **own})
    sys.modules[overlay.__name__] = overlay
    return vars(overlay)


def attention_forward(base: Any, spec: RopeSpec) -> Callable[..., Any]:
    """Return the forward of an attention class that rotates through the op."""
    functions = rope_functions(base)
    specs = (spec, *spec.others)
    read = globals_read(base, spec)
    replacements = {
        each.inside or each.function: _replacement(functions[each.inside or each.function], each)
        for each in specs
    }
    rotating: Any = rebuild(base.forward, replacements, {})

    # dynamo would guard every one of them; so it asks once a trace.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def are_unchanged() -> bool:
        return all(namespace.get(name) is value for namespace, name, value in read)

    @functools.wraps(rotating)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_as_patched(self) or not are_unchanged():
            return base.forward(self, *args, **kwargs)
        self._adopt_adapters()
        # The projections read a norm's output.
        with recomputing(*args, *kwargs.values()), sharing(self):
            return rotating(self, *args, **kwargs)

    return forward


def globals_read(base: Any, spec: RopeSpec) -> tuple[_Global, ...]:
    """Return the globals that the forward of an attention class and its rotary functions read.

    The forward that replaces it has them as they are now: a tool may replace one later.
    """
    specs = (spec, *spec.others)
    rotary = {each.function for each in specs} | {each.inside for each in specs}
    functions = rope_functions(base)
    found: dict[tuple[int, str], _Global] = {}
    for function in (base.forward, *(functions.get(each.inside) for each in specs)):
        for part in reachable_functions(function):
            names = global_names(part.__code__) & part.__globals__.keys()
            # What surrounds the code that rotates keeps its own globals.
            for name in sorted(names) if names & rotary else ():
                namespace = part.__globals__
                found[id(namespace), name] = _Global(namespace, name, namespace[name])
    return tuple(found.values())


class _Global(NamedTuple):
    namespace: dict[str, Any]
    name: str
    value: Any


@functools.cache
def _replacement(function: Any, spec: RopeSpec) -> Callable[..., Any]:
    """Return the replacement of a function that rotates, or that calls one that does."""
    if not spec.inside:
        return rotary_by_op(function, spec)
    rotary = rotary_by_op(function.__globals__[spec.function], replace(spec, inside=""))
    return rebuild(function, {spec.function: rotary}, {})
