"""Forwards of LoRA layers, one by one, and of those that read one input together.

A layer is asked at every call what it is: one active adapter that is neither merged nor disabled,
on a frozen layer, without hooks inside. Else the class's own forward runs, which is peft's.

q, k and v of attention get the same tensor one after another. While the attention's forward runs,
the first of them computes all, in one autograd function, and the others find their result by the
identity of the tensor (LoraSpec.group names them).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liger_kernels.ops.adapted_linear import (
    NUM_TENSORS,
    AdaptedLinear,
    has_own_format,
    is_packed,
)
from liger_kernels.ops.lora_linear import lora_linears
from liger_kernels.transformers.recognise import LoraSpec, computes_dora, original_class
from liger_kernels.transformers.replacements.calls import (
    is_bare,
    is_plain,
    record_call,
    runs_stock_linear,
)
from liger_kernels.transformers.replacements.recompute import is_checkpointed
from liger_kernels.transformers.replacements.subclasses import SPEC_ATTRIBUTE, is_as_patched

__all__ = ["LoraCall", "adapter_problem", "is_lora_patched", "lora_call", "lora_forward", "sharing"]

_DISABLED = "its adapters are disabled: peft's own code runs, the base layer alone"
_HOOKED = "a layer inside it has hooks or another forward set on it: peft's own code runs"
_MERGED = "its adapters are merged into the weight, which runs alone: unmerge_adapter() to train"


class LoraCall(NamedTuple):
    """How a layer computes one call.

    Attributes:
        layer: What it computes.
        dtype: Of the products.
        out_dtype: Of the result.
    """

    layer: AdaptedLinear
    dtype: torch.dtype
    out_dtype: torch.dtype


def is_lora_patched(module: Any) -> bool:
    """Return whether a module is a LoRA layer whose class was swapped for one that runs the op."""
    return isinstance(getattr(type(module), SPEC_ATTRIBUTE, None), LoraSpec)


def adapter_problem(module: nn.Module) -> str | None:
    """Return why the op cannot compute what a LoRA layer does as it is now, or None if it can."""
    found = _read(module)
    return found if isinstance(found, str) else None


def _read(module: Any) -> AdaptedLinear | str:
    """Return a LoRA layer's weights and settings, or why it is none that the op computes."""
    if module._disable_adapters:
        return _DISABLED
    if module.merged_adapters:
        return _MERGED
    parts = module._modules
    layers = parts["lora_A"]._modules
    names = [name for name in module.active_adapters if name in layers]
    if len(names) != 1:
        return f"{len(names) or 'no'} active adapters: one alone is fused; set_adapter() chooses it"
    (name,) = names
    base, a, b = parts["base_layer"], layers[name], parts["lora_B"]._modules[name]
    dropout, magnitude = _dropout(parts["lora_dropout"]._modules[name]), _magnitude(module, name)
    for problem in (magnitude, dropout, _part_problem(base, a, b)):
        if isinstance(problem, str):
            return problem
    layer = AdaptedLinear(base.weight, base.bias, a.weight, b.weight, magnitude)
    # DoRA asks the layer whether it trains, and its dropout only then.
    drops = magnitude is None or module.training
    return layer._replace(
        scale=float(module.scaling[name]), dropout=float(dropout) if drops else 0.0
    )


def _magnitude(module: Any, name: str) -> Tensor | str | None:
    """Return the magnitudes of a DoRA adapter, None of plain LoRA, or why it is another variant."""
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is None and not getattr(module, "use_dora", {}).get(name):
        return None
    holder = module._modules["lora_magnitude_vector"]._modules.get(name)
    if not _is_dora(original_class(type(module)), type(variant), type(holder)):
        kind = type(variant).__name__.removesuffix("LinearVariant")
        return f"{kind} adapter, whose formula is another: peft's own code runs"
    magnitude: Tensor = holder.weight
    return magnitude if is_bare(holder) else _HOOKED


# Of classes of a layer, of its variant and of what holds its magnitudes. torch.compile reads the
# answers of the calls before, and traces no probe.
_IS_DORA: dict[tuple[Any, Any, Any], bool] = {}


def _is_dora(*classes: Any) -> bool:
    if classes not in _IS_DORA and not torch.compiler.is_compiling():
        _IS_DORA[classes] = computes_dora(*classes)
    return _IS_DORA.get(classes, False)


def _dropout(module: Any) -> float | str:
    """Return the probability that a dropout module drops with now, or why it is not torch's."""
    if type(module) is nn.Identity and is_bare(module):
        return 0.0
    if type(module) is not nn.Dropout or module.inplace or not is_bare(module):
        return "the dropout before its adapter has hooks or is of another class"
    return module.p if module.training else 0.0


def _part_problem(base: Any, a: Any, b: Any) -> str | None:
    """Return why a layer's parts are not a frozen linear layer and two plain matrices, or None."""
    if not all(is_bare(part) for part in (base, a, b)):
        return _HOOKED
    if not _is_linear(a) or not _is_linear(b):
        return "the matrices of its adapter are no plain linear layers"
    if a.bias is not None or b.bias is not None:
        return "its adapter has a bias (lora_bias): peft's own code runs"
    if not _is_linear(base) and not _is_packed_linear(base):
        return f"its base layer is a {type(base).__name__}: peft's own code runs"
    if base.weight.requires_grad:
        return "its base layer is trained too: freeze it to have the adapter fused"
    return None


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and runs_stock_linear(layer)


def _is_packed_linear(layer: Any) -> bool:
    """Return whether a layer has a weight in 4 bits that frozen_weight unpacks."""
    if has_own_format(layer.weight):
        return True
    cls = getattr(getattr(sys.modules.get("bitsandbytes"), "nn", None), "Linear4bit", None)
    if cls is None or type(layer) is not cls or not is_packed(layer.weight):
        return False
    # On some CPUs its forward packs the weight once more, for its own product in evaluation.
    return not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def lora_call(module: Any, x: Any) -> LoraCall | None:
    """Return how a LoRA layer, or a frozen linear layer beside one, computes x by the op.

    None: its class's own forward must run.
    """
    if not is_plain(x):
        return None
    if is_lora_patched(module):
        layer, base = _read(module), module._modules["base_layer"]
        casts = getattr(module, "cast_input_dtype_enabled", True)
    elif _is_linear(module) and is_bare(module) and not module.weight.requires_grad:
        layer, base, casts = AdaptedLinear(module.weight, module.bias), module, True
    else:
        return None
    if isinstance(layer, str) or not _fits(layer, x):
        return None
    dtypes = _dtypes(layer, base, x)
    if dtypes is None:
        return None
    if layer.dropout:
        # What peft casts its input to before it.
        is_cast = casts and not (is_packed(layer.weight) and _has_autocast(x))
        layer = layer._replace(dropout_dtype=layer.a.dtype if is_cast else x.dtype)
    if layer.a is not None and not casts and not _has_autocast(x) and layer.a.dtype != x.dtype:
        # An error of peft's.
        return None
    return LoraCall(layer, *dtypes)


def _fits(layer: AdaptedLinear, x: Tensor) -> bool:
    """Return whether the tensors of a layer are plain ones on the device of x."""
    tensors = [t for t in layer[1:NUM_TENSORS] if t is not None]
    if not is_packed(layer.weight):
        tensors.append(layer.weight)
    return is_plain(*tensors) and all(t.device == x.device for t in (*tensors, layer.weight))


def _has_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _dtypes(layer: AdaptedLinear, base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the dtypes of the products and of the result, as the layer's own code has them."""
    cast = torch.get_autocast_dtype(x.device.type) if _has_autocast(x) else None
    if not is_packed(layer.weight):
        if cast is not None:
            return cast, cast
        return None if layer.weight.dtype != x.dtype else (x.dtype, x.dtype)
    if not getattr(base, "compute_type_is_set", True):
        # As its forward does, which runs no more.
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype = base.compute_dtype or x.dtype
    is_known = x.dtype in (dtype, torch.float32) and cast in (None, dtype)
    return (dtype, x.dtype) if is_known else None


# Groups -----------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    """A result that a layer will be asked for."""

    x: Tensor
    version: int
    has_grad: bool
    y: Tensor


class _Scope:
    """A forward that runs, and the results of layers that it has not called yet."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.ready: dict[str, _Ready] = {}


_SCOPE: ContextVar[_Scope | None] = ContextVar("scope", default=None)


@contextmanager
def sharing(owner: nn.Module) -> Iterator[None]:
    """Let LoRA layers of a module that read one input compute together while its forward runs."""
    if torch.compiler.is_compiling():
        # The compiler sees all layers at once and fuses what it likes.
        yield
        return
    scope = _Scope(owner)
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)
        # A traceback may hold the scope longer than its results are worth.
        scope.ready.clear()


def lora_forward(base: Any, spec: LoraSpec) -> Callable[..., Any]:
    """Return the forward of a LoRA class that runs the op."""

    @functools.wraps(base.forward)
    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not is_as_patched(self):
            return base.forward(self, x, *args, **kwargs)
        scope = None if torch.compiler.is_compiling() else _SCOPE.get()
        name = None if scope is None else _name_in(scope.owner, spec.group, self)
        if scope is not None and name is not None:
            ready = scope.ready.pop(name, None)
            if ready is not None and _is_for(ready, x):
                record_call(self)
                return ready.y
        call = lora_call(self, x)
        if call is None:
            return base.forward(self, x)
        record_call(self)
        calls: dict[str | None, LoraCall] = {name: call}
        if scope is not None and name is not None:
            calls |= _calls_after(scope.owner, spec.group, name, x, call)
        ys = lora_linears(
            x,
            [one.layer for one in calls.values()],
            call.dtype,
            is_checkpointed=is_checkpointed(),
        )
        y, *others = (y.to(call.out_dtype) for y in ys)
        if scope is not None:
            for other, value in zip([*calls][1:], others, strict=True):
                scope.ready[str(other)] = _Ready(x, x._version, torch.is_grad_enabled(), value)
        return y

    return forward


def _name_in(owner: nn.Module, group: tuple[str, ...], module: nn.Module) -> str | None:
    """Return the name in a group that a module has; None of one that is in no group here."""
    return next((name for name in group if owner._modules.get(name) is module), None)


def _calls_after(
    owner: nn.Module, group: tuple[str, ...], name: str, x: Tensor, call: LoraCall
) -> dict[str | None, LoraCall]:
    """Return how the layers that are called after one with the same x compute it, by name."""
    found: dict[str | None, LoraCall] = {}
    for other in group[group.index(name) + 1 :]:
        module = owner._modules.get(other)
        if not is_lora_patched(module) or not is_as_patched(module):
            continue
        one = lora_call(module, x)
        if one is not None and one[1:] == call[1:]:
            found[other] = one
    return found


def _is_for(ready: _Ready, x: Any) -> bool:
    """Return whether a result is the one of this call: the very tensor, unchanged."""
    is_same = ready.x is x and ready.version == x._version
    return is_same and ready.has_grad == torch.is_grad_enabled()
