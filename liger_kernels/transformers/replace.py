"""Replacements: a subclass for each recognised class, and swapping an instance's class for it.

A patched class adds one forward (or one gate) to the class it stands for and keeps its name, so
isinstance, state_dict, print, deepcopy and save_pretrained see no difference. Its forward reads the
instance's own parameters and calls its own children as modules: nothing is copied, hooks, adapters
and quantised layers keep working. Patched classes are cached and remade by name when unpickled.

A forward gives way to the one it replaces when the call is not the plain one: extra arguments,
tensor subclasses (a sharded DTensor), dtypes other than fp32, bf16 and fp16, meta tensors.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.ops import geglu, layer_norm, rms_norm, rope, swiglu
from liger_kernels.transformers.recognise import (
    ACTIVATIONS,
    BASE_ATTRIBUTE,
    ExpertsSpec,
    LayerNormSpec,
    MlpSpec,
    NormSpec,
    RopeSpec,
    Spec,
    original_class,
    rope_functions,
    rope_inputs,
    rope_parameters,
    run_experts,
    split_gate,
)

_PLAIN_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _is_plain(*tensors: Any) -> bool:
    """Return whether the ops serve these tensors; None counts as served."""
    return all(
        x is None or (type(x) in _PLAIN_TYPES and x.dtype in _DTYPES and not x.is_meta)
        for x in tensors
    )


# Counting calls ---------------------------------------------------------------------------------


class Tally:
    """The modules that called an op, by id, while a tally runs."""

    def __init__(self) -> None:
        self.called: set[int] = set()
        # The attention whose forward runs: its rotary function does not know whose it is.
        self.attention: nn.Module | None = None
        # torch.compile traced a patched forward: what it holds runs without Python and is not seen.
        self.is_compiled = False


_TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def tally_calls(modules: Iterable[nn.Module]) -> Iterator[Tally]:
    """Note which patched modules call their op. Compiled code notes nothing."""
    tally = Tally()

    def enter(module: nn.Module, args: Any) -> None:
        tally.attention = module

    hooks = [
        module.register_forward_pre_hook(enter)
        for module in modules
        if isinstance(getattr(type(module), _SPEC_ATTRIBUTE, None), RopeSpec)
    ]
    token = _TALLY.set(tally)
    try:
        yield tally
    finally:
        _TALLY.reset(token)
        for hook in hooks:
            hook.remove()


def _note(module: nn.Module | None = None) -> None:
    if torch.compiler.is_compiling():
        _note_compiled()
        return
    tally = _TALLY.get()
    if tally is not None:
        tally.called.add(id(module or tally.attention))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_compiled() -> None:
    """Run once, in Python, where torch.compile traces."""
    tally = _TALLY.get()
    if tally is not None:
        tally.is_compiled = True


# Norms, MLPs, experts ---------------------------------------------------------------------------


def _rms_norm_forward(base: Any, spec: NormSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight if spec.has_weight else None
        if len(args) != 1 or kwargs or not _is_plain(args[0], weight):
            return base.forward(self, *args, **kwargs)
        _note(self)
        eps = getattr(self, spec.eps_attr)
        return rms_norm(args[0], weight, eps, offset=spec.offset, cast=spec.cast)

    return forward


def _layer_norm_forward(base: Any, spec: LayerNormSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight if spec.has_weight else None
        bias = self.bias if spec.has_bias else None
        if len(args) != 1 or kwargs or not _is_plain(args[0], weight, bias):
            return base.forward(self, *args, **kwargs)
        _note(self)
        return layer_norm(args[0], weight, bias, getattr(self, spec.eps_attr))

    return forward


def _glu(module: nn.Module, activation: str, gate: Tensor, up: Tensor) -> Tensor:
    if not _is_plain(gate, up) or gate.shape != up.shape:
        return ACTIVATIONS[activation](gate) * up
    _note(module)
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


def _mlp_forward(base: Any, spec: MlpSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return base.forward(self, *args, **kwargs)
        (x,) = args
        gate = getattr(self, spec.gate)(x)
        if spec.layout == "separate":
            # After the gate, as the class does it: adapters with dropout draw in this order.
            up = getattr(self, spec.up)(x)
        else:
            gate, up = split_gate(gate, spec.layout)
        return getattr(self, spec.down)(_glu(self, spec.activation, gate, up))

    return forward


def _sorted_experts_forward(base: Any, spec: ExpertsSpec) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not _is_plain(args[0], self.gate_up_proj, self.down_proj):
            return base.forward(self, *args, **kwargs)

        (x,) = args
        num_experts, width, _ = self.gate_up_proj.shape
        h = torch.bmm(x.view(num_experts, -1, width), self.gate_up_proj)
        h = _glu(self, spec.activation, *split_gate(h, spec.layout))
        return torch.bmm(h, self.down_proj).view(-1, width)

    return forward


def _experts_namespace(base: Any, spec: ExpertsSpec) -> dict[str, Any]:
    def _apply_gate(self: Any, gate_up_out: Tensor) -> Tensor:
        return _glu(self, spec.activation, *split_gate(gate_up_out, spec.layout))

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The eager loop computes the gate in line; the grouped and batched ones call _apply_gate.
        is_eager = getattr(self.config, "_experts_implementation", None) in (None, "eager")
        if is_eager and len(args) == 3 and not kwargs and _is_plain(args[0]):
            return run_experts(self, *args, self._apply_gate)
        return base.forward(self, *args, **kwargs)

    gate = {"_apply_gate": functools.wraps(base._apply_gate)(_apply_gate)}
    return {**gate, "forward": forward} if spec.has_plain_loop else gate


# RoPE -------------------------------------------------------------------------------------------


@functools.cache
def _rotary(original: Callable[..., Any], spec: RopeSpec) -> Callable[..., Any]:
    """Return a function of original's signature that rotates through the op."""
    names, num_inputs = rope_parameters(original), rope_inputs(original)
    is_complex = spec.angles in ("complex", "complex_shared")
    num_required = num_inputs + (1 if is_complex else 2)
    called = original.forward if isinstance(original, nn.Module) else original

    @functools.wraps(called)
    def rotate(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        required = [given.pop(name, None) for name in names[:num_required]]
        inputs, angles = required[:num_inputs], required[num_inputs:]
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
        _note()
        if not spec.keeps_dtype:
            inputs = [_widen(x, angles[0]) for x in inputs]
        q, k = (*inputs, None)[:2]
        turned = rope(q, k, *angles, style=spec.style, rotary_dim=width, unsqueeze_dim=axis)
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
    if not all(type(x) is Tensor for x in (*inputs, *angles)) or not _is_plain(*inputs):
        return False
    rank = inputs[0].dim()
    axis = axis - rank if axis >= 0 else axis
    if rank not in (3, 4) or axis not in (-3, -2):
        return False
    num_tokens = inputs[0].shape[-5 - axis]
    batch = inputs[0].shape[0] if rank == 4 else 1
    leads = ((num_tokens,), (1, num_tokens), (batch, num_tokens))
    return bool(angles) and all(
        x.is_complex() == is_complex
        and not x.requires_grad
        and x.shape == angles[0].shape
        and x.shape[:-1] in leads
        for x in angles
    )


def _widen(x: Tensor, cos: Tensor) -> Tensor:
    """Return x in the dtype of x * cos; under autocast in its own, which attention takes anyway."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.promote_types(x.dtype, cos.dtype))


def _rebuild(
    function: types.FunctionType,
    replacements: Mapping[str, Callable[..., Any]],
    known: dict[types.FunctionType, types.FunctionType],
) -> types.FunctionType:
    """Copy a function, and those its decorators hide, so that global names find the replacements.

    A forward reaches its rotary function as a global of its module. Changing that global would
    change every model of the family, so the copy gets globals of its own.
    """
    if function in known:
        return known[function]
    names = set(function.__code__.co_names) & set(replacements)
    cells, is_changed = [], bool(names)
    for cell in function.__closure__ or ():
        # An empty cell belongs to a function that is still being defined.
        try:
            content = cell.cell_contents
        except ValueError:
            content = None
        if isinstance(content, types.FunctionType):
            rebuilt = _rebuild(content, replacements, known)
            if rebuilt is not content:
                cell, is_changed = types.CellType(rebuilt), True
        cells.append(cell)
    if not is_changed:
        known[function] = function
        return function
    namespace = function.__globals__
    if names:
        items = tuple((name, replacements[name]) for name in sorted(names))
        namespace = _overlay(namespace["__name__"], items)
    copy = types.FunctionType(
        function.__code__,
        namespace,
        function.__name__,
        function.__defaults__,
        tuple(cells) if cells else None,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    wrapped = function.__dict__.get("__wrapped__")
    if isinstance(wrapped, types.FunctionType):
        copy.__dict__["__wrapped__"] = _rebuild(wrapped, replacements, known)
    else:
        # update_wrapper points it at the function that is replaced.
        del copy.__dict__["__wrapped__"]
    known[function] = copy
    return copy


@functools.cache
def _overlay(name: str, items: tuple[tuple[str, Callable[..., Any]], ...]) -> dict[str, Any]:
    """Return the globals of module `name` with some names replaced, as they are at this moment.

    They belong to a module that can be imported, because torch.compile looks guards of globals up
    through sys.modules. A later change of the original module's globals is not seen here.
    """
    index = sum(key.startswith(f"{__name__}.{name}.") for key in sys.modules)
    overlay = types.ModuleType(f"{__name__}.{name}.{index}")
    # The package stays the original's: imports inside its functions are relative to that.
    own = {"__name__": overlay.__name__, "__spec__": None, "__loader__": None}
    vars(overlay).update({**vars(sys.modules[name]), **dict(items), **own})
    sys.modules[overlay.__name__] = overlay
    return vars(overlay)


def _attention_forward(base: Any, spec: RopeSpec) -> Callable[..., Any]:
    functions = rope_functions(base)
    specs = (spec, *spec.others)
    replacements = {each.function: _rotary(functions[each.function], each) for each in specs}
    return _rebuild(base.forward, replacements, {})


# Classes ----------------------------------------------------------------------------------------

_SPEC_ATTRIBUTE = "_patch_spec"


@functools.cache
def patched_class(base: Any, spec: Spec) -> type[nn.Module]:
    """Return the subclass of `base` that computes what `spec` says through an op."""
    if isinstance(spec, NormSpec):
        namespace = {"forward": _rms_norm_forward(base, spec)}
    elif isinstance(spec, LayerNormSpec):
        namespace = {"forward": _layer_norm_forward(base, spec)}
    elif isinstance(spec, MlpSpec):
        namespace = {"forward": _mlp_forward(base, spec)}
    elif isinstance(spec, ExpertsSpec) and spec.is_sorted:
        namespace = {"forward": _sorted_experts_forward(base, spec)}
    elif isinstance(spec, ExpertsSpec):
        namespace = _experts_namespace(base, spec)
    else:
        assert isinstance(spec, RopeSpec), "heads belong to lazy_logits.py"
        namespace = {"forward": _attention_forward(base, spec)}
    return type(
        base.__name__,
        (base,),
        {
            **namespace,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            BASE_ATTRIBUTE: base,
            _SPEC_ATTRIBUTE: spec,
        },
    )


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    # pickle finds a class by its name, which is that of the class it stands for.
    return make_patched, (self._patch_base, self._patch_spec), self.__getstate__()


def make_patched(base: Any, spec: Spec) -> nn.Module:
    """Return an empty patched instance; pickle and deepcopy fill it."""
    cls: Any = patched_class(base, spec)
    return cls.__new__(cls)


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
