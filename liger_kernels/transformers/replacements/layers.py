"""Layers that normalise a residual sum: sum and norm become one op, fused_add_rms_norm.

Such a layer is found by its source, and its forward is that source with the op in the places of a
sum and the norm after it (residual_source.py). The op runs a norm that is patched itself, with that
norm's own weight and options; a call that it does not serve runs as the two stock statements.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.ops import fused_add_rms_norm, rms_norm
from liger_kernels.transformers.recognise import (
    NormSpec,
    Refusal,
    original_class,
)
from liger_kernels.transformers.replacements.attention import rebuild
from liger_kernels.transformers.replacements.calls import is_bare, is_plain, note
from liger_kernels.transformers.replacements.recompute import remember
from liger_kernels.transformers.replacements.replace import norm_inputs
from liger_kernels.transformers.replacements.rewrite import fuse, read_form
from liger_kernels.transformers.replacements.subclasses import (
    SPEC_ATTRIBUTE,
    is_as_patched,
    stand_in,
)


@dataclass(frozen=True)
class AddNormSpec:
    """A layer with residual sums that one of its RMS norms follows."""

    # The attributes that hold these norms, in the order of the source.
    norms: tuple[str, ...]


# Recognition ------------------------------------------------------------------------------------


def find_layers(
    model: nn.Module, norms: Collection[nn.Module]
) -> Iterator[tuple[str, nn.Module, AddNormSpec | Refusal]]:
    """Yield the layers that normalise a residual sum, and one of each class that does not.

    Args:
        model: Any module.
        norms: Its RMS norms.
    """
    told = set()
    for name, module in model.named_modules():
        layer = _recognise_layer(module, norms)
        cls = original_class(type(module))
        if layer is None or isinstance(layer, Refusal) and cls in told:
            continue
        told.add(cls)
        yield name, module, layer


def _recognise_layer(
    module: nn.Module, norms: Collection[nn.Module]
) -> AddNormSpec | Refusal | None:
    own = [name for name, child in module.named_children() if _is_norm(child, norms)]
    if not own:
        return None
    form = read_form(original_class(type(module)).forward)
    after_sums = tuple(name for name in form.after_sums if name in own)
    if after_sums:
        return AddNormSpec(after_sums)
    # A stack of layers adds positions to its input and normalises its output.
    is_stack = any(isinstance(child, nn.ModuleList) for child in module.children())
    if form.has_residual and form.called & set(own) and not is_stack:
        return Refusal("no RMS norm follows a residual sum of this layer: nothing to fuse")
    return None


def _is_norm(child: nn.Module, norms: Collection[nn.Module]) -> bool:
    """Return whether a child is one of the norms, maybe inside a wrapper of PEFT's."""
    owners = [module in norms for module in child.modules() if module._parameters]
    return child in norms or bool(owners) and all(owners)


def layer_problem(
    layer: nn.Module, spec: AddNormSpec, ops_of: Mapping[nn.Module, str]
) -> str | None:
    """Return why the op would never run in a layer.

    Args:
        layer: The layer.
        spec: What was found in it.
        ops_of: The modules that will be patched otherwise, and the ops they will run.
    """
    if layer in ops_of:
        return f"it runs {ops_of[layer]}, and a module runs one op: nothing to do"
    norms = {name: layer.get_submodule(name) for name in spec.norms}
    if any(norm in ops_of and is_bare(norm) for norm in norms.values()):
        return None
    name, norm = next(iter(norms.items()))
    if norm in ops_of:
        return f"a hook or another forward is set on {name}, which the op would not call: remove it"
    return f"its {name} is not patched: see there"


# The patched layer ------------------------------------------------------------------------------


def _add_and_norm(layer: nn.Module, x: Any, residual: Any, norm: Any) -> tuple[Any, Any]:
    """Return (norm(x + residual), x + residual), by the op where it serves the call."""
    spec = getattr(type(norm), SPEC_ATTRIBUTE, None)
    found = _inputs(x, residual, norm, spec) if isinstance(spec, NormSpec) else None
    if found is None:
        total = x + residual
        return norm(total), total
    note(norm)
    note(layer)
    weight, eps = found
    assert isinstance(spec, NormSpec)
    options: Any = {"eps": eps, "offset": spec.offset, "cast": spec.cast}
    y, total = fused_add_rms_norm(x, residual, weight, **options)
    if norm._saves_memory and y.requires_grad:
        # The op keeps the sum, and its output is the norm's of that to the bit.
        kept = None if weight is None else weight.detach()
        remember(y, functools.partial(rms_norm, total.detach(), kept, **options))
    return y, total


def _inputs(x: Any, residual: Any, norm: Any, spec: NormSpec) -> tuple[Tensor | None, float] | None:
    """Return the norm's weight and eps, or None where the op does not serve the call."""
    if not is_plain(residual) or residual is None or spec.is_l2 or not is_bare(norm):
        return None
    found = norm_inputs(norm, spec, x)
    if found is None or x.shape != residual.shape or x.device != residual.device:
        return None
    dtype = torch.promote_types(x.dtype, residual.dtype)
    weight, _ = found
    if spec.needs_one_dtype and weight is not None and weight.dtype != dtype:
        return None
    return found


def patched_layer(base: Any, spec: AddNormSpec) -> type[nn.Module]:
    """Return the subclass of `base` that normalises residual sums through the op."""
    # A tool may give a class another forward between one call and the next.
    return _patched_layer(base, base.forward, spec)


@functools.cache
def _patched_layer(base: Any, stock: Callable[..., Any], spec: AddNormSpec) -> type[nn.Module]:
    function = inspect.unwrap(stock)
    fused = fuse(function, spec.norms, _add_and_norm)
    fusing = rebuild(_inner_forward(base), {}, {function: fused})

    @functools.wraps(fusing)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = fusing if is_as_patched(self) else base.forward
        return run(self, *args, **kwargs)

    return stand_in(base, spec, {"forward": forward}, make_layer)


def _inner_forward(base: Any) -> Any:
    """Return base's forward beneath what its ancestor puts around the forward of each subclass.

    In transformers 5.24 that is gradient checkpointing, and it will be put around ours too.
    """
    forward = base.forward
    while _holds_itself(forward):
        forward = forward.__wrapped__
    return forward


def _holds_itself(function: types.FunctionType) -> bool:
    """Return whether a wrapper refers to itself, to tell whether it is the outermost one."""
    for cell in function.__closure__ or ():
        try:
            if cell.cell_contents is function:
                return True
        except ValueError:
            # An empty cell belongs to a function that is still being defined.
            continue
    return False


def make_layer(base: Any, spec: AddNormSpec) -> nn.Module:
    """Return an empty patched layer; pickle and deepcopy fill it."""
    cls: Any = patched_layer(base, spec)
    return cls.__new__(cls)
