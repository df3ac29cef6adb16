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

from liger_kernels.ops.adapted_linear import NUM_TENSORS, AdaptedLinear
from liger_kernels.ops.lora_linear import lora_linears
from liger_kernels.ops.packed_weight import has_own_format, is_packed
from liger_kernels.transformers.recognise import LoraSpec, computes_dora, original_class
from liger_kernels.transformers.replacements.calls import (
    have_plain_types,
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
    name = module._active_adapter
    if type(name) is list and len(name) == 1:
        (name,) = name
    if type(name) is not str or name not in layers:
        names = [name for name in module.active_adapters if name in layers]
        if len(names) != 1:
            count = len(names) or "no"
            return f"{count} active adapters: one alone is fused; set_adapter() chooses it"
        (name,) = names
    base, a, b = parts["base_layer"], layers[name], parts["lora_B"]._modules[name]
    dropout = parts["lora_dropout"]._modules[name]
    is_variant = name in getattr(module, "lora_variant", ()) or module.use_dora.get(name)
    magnitude = _magnitude(module, name) if is_variant else None
    if isinstance(magnitude, str):
        return magnitude
    if not is_bare(base, a, b, dropout):
        return _HOOKED
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.inplace):
        return "the dropout before its adapter is of another class, or in-place"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or not runs_stock_linear(a):
        return "the matrices of its adapter are no plain linear layers"
    if type(base) is not nn.Linear and not _is_packed_linear(base):
        return f"its base layer is a {type(base).__name__}: peft's own code runs"
    weight, bias, a, a_bias, b, b_bias = _tensors(base, a, b)
    if a_bias is not None or b_bias is not None:
        return "its adapter has a bias (lora_bias): peft's own code runs"
    if weight.requires_grad:
        return "its base layer is trained too: freeze it to have the adapter fused"
    # DoRA asks the layer whether it trains, and its dropout only then.
    drops = dropout.training and (magnitude is None or module.training)
    drop = float(dropout.p) if drops and type(dropout) is nn.Dropout else 0.0
    return AdaptedLinear(weight, bias, a, b, magnitude, float(module.scaling[name]), drop)


def _tensors(*layers: Any) -> list[Any]:
    """Return the weight and bias of each layer, without what an attribute of a module costs."""
    found: list[Any] = []
    for layer in layers:
        held = layer._parameters
        if "weight" in held and "bias" in held:
            found += held["weight"], held["bias"]
        else:
            found += layer.weight, layer.bias
    return found


def _magnitude(module: Any, name: str) -> Tensor | str:
    """Return the magnitudes of a variant that is DoRA, or why it is another."""
    variant = getattr(module, "lora_variant", {}).get(name)
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
    """Return how a LoRA layer, or a frozen linear layer beside one, computes a plain x by the op.

    None: its class's own forward must run.
    """
    if isinstance(getattr(type(module), SPEC_ATTRIBUTE, None), LoraSpec):
        layer, base = _read(module), module._modules["base_layer"]
        casts = getattr(module, "cast_input_dtype_enabled", True)
    elif _is_linear(module) and is_bare(module) and not module.weight.requires_grad:
        layer, base, casts = AdaptedLinear(module.weight, module.bias), module, True
    else:
        return None
    if isinstance(layer, str):
        return None
    # Every other class of a base layer that is read has a weight in few bits.
    packed = type(base) is not nn.Linear
    if layer.weight.device != x.device:
        return None
    if not have_plain_types(layer[1 if packed else 0 : NUM_TENSORS], x.device):
        return None
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if packed:
        dtypes = _packed_dtypes(base, x, cast)
    else:
        dtype = x.dtype if cast is None else cast
        # Without autocast a linear layer takes no other dtype than its weight's.
        dtypes = (dtype, dtype) if cast or layer.weight.dtype == dtype else None
    if dtypes is None:
        return None
    if layer.dropout:
        # What peft casts its input to before it.
        is_cast = casts and not (packed and cast is not None)
        layer = layer._replace(dropout_dtype=layer.a.dtype if is_cast else x.dtype)
    if layer.a is not None and not casts and cast is None and layer.a.dtype != x.dtype:
        # An error of peft's.
        return None
    return LoraCall(layer, *dtypes)


def _packed_dtypes(
    base: Any, x: Tensor, cast: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the dtypes of the products and of the result of a layer with a weight in few bits.

    cast is autocast's dtype, None without autocast.
    """
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
        call = lora_call(self, x) if is_plain(x) else None
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
        if call.out_dtype != call.dtype:
            ys = tuple([y.to(call.out_dtype) for y in ys])
        y, *others = ys
        if scope is not None:
            for other, value in zip([*calls][1:], others, strict=True):
                scope.ready[str(other)] = _Ready(x, x._version, torch.is_grad_enabled(), value)
        return y

    return forward


def _name_in(owner: nn.Module, group: tuple[str, ...], module: nn.Module) -> str | None:
    """Return the name in a group that a module has; None of one that is in no group here."""
    for name in group:
        if owner._modules.get(name) is module:
            return name
    return None


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
