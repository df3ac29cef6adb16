"""Forwards of norms: RMS norms, layer norms and gated RMS norms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_kernels.ops import gated_rms_norm, layer_norm, rms_norm
from liger_kernels.transformers.recognise import GatedNormSpec, LayerNormSpec, NormSpec
from liger_kernels.transformers.replacements.calls import is_plain, record_call
from liger_kernels.transformers.replacements.recompute import run_recomputable
from liger_kernels.transformers.replacements.subclasses import is_as_patched

AnyNorm = NormSpec | LayerNormSpec | GatedNormSpec


def rms_norm_forward(base: Any, spec: NormSpec) -> Callable[..., Any]:
    """Return the forward of an RMS norm class that calls rms_norm."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = _inputs_of(self, spec, args[0]) if len(args) == 1 and not kwargs else None
        if found is None:
            return base.forward(self, *args, **kwargs)
        (x,), (weight, eps) = args, found
        if spec.needs_one_dtype and weight is not None and weight.dtype != x.dtype:
            return base.forward(self, x)
        record_call(self)
        if spec.is_l2:
            return _l2_norm(x, eps)
        op = functools.partial(rms_norm, eps=eps, offset=spec.offset, cast=spec.cast)
        return run_recomputable(self, op, x, weight)

    return forward


def _l2_norm(x: Tensor, eps: float) -> Tensor:
    # The root of a sum is that of a mean times the root of the width.
    width = x.shape[-1]
    weight = torch.full((width,), width**-0.5, dtype=torch.float32, device=x.device)
    return rms_norm(x, weight, eps / width, cast="after_weight")


def layer_norm_forward(base: Any, spec: LayerNormSpec) -> Callable[..., Any]:
    """Return the forward of a layer norm class that calls layer_norm."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = _inputs_of(self, spec, args[0]) if len(args) == 1 and not kwargs else None
        bias = _parameter(self, spec.bias_attr, spec.has_bias)
        if found is None or not is_plain(bias) or not _fits(bias, spec.has_bias, args[0]):
            return base.forward(self, *args, **kwargs)
        (x,), (weight, eps) = args, found
        if spec.offset:
            # Nemotron casts otherwise under autocast.
            if torch.is_autocast_enabled(x.device.type):
                return base.forward(self, x)
            weight = None if weight is None else weight + spec.offset
        record_call(self)
        op = functools.partial(layer_norm, eps=eps)
        return run_recomputable(self, op, x, weight, bias)

    return forward


def gated_norm_forward(base: Any, spec: GatedNormSpec) -> Callable[..., Any]:
    """Return the forward of a gated norm class that calls gated_rms_norm."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = {**dict(zip(spec.inputs, args, strict=False)), **kwargs}
        x: Any = given.get(spec.inputs[0])
        gate = given.get(spec.inputs[1])
        is_extra = len(given) != 2 or len(args) + len(kwargs) != 2
        found = None if is_extra else _inputs_of(self, spec, x)
        if found is None or gate is None or not is_plain(gate) or gate.shape != x.shape:
            return base.forward(self, *args, **kwargs)
        weight, eps = found
        if weight is None:
            return base.forward(self, *args, **kwargs)
        record_call(self)
        return gated_rms_norm(
            x,
            gate,
            weight,
            eps,
            gate_first=spec.gate_first,
            activation=spec.activation,
            cast=spec.cast,
            num_groups=spec.num_groups,
        )

    return forward


def _inputs_of(module: Any, spec: AnyNorm, x: Any) -> tuple[Tensor | None, float] | None:
    """Return the weight and eps that a patched norm has at this call, or None to run its own code.

    Args:
        module: The norm.
        spec: The form that it had when it was patched.
        x: Its input, of any type.
    """
    if not is_as_patched(module):
        return None
    weight = _parameter(module, spec.weight_attr, spec.has_weight)
    eps = getattr(module, spec.eps_attr, None) if spec.eps is None else spec.eps
    if not is_plain(x, weight) or x is None or not isinstance(eps, (float, int)) or eps < 0:
        return None
    if not _fits(weight, spec.has_weight, x):
        return None
    return weight, eps


def _parameter(module: Any, name: str, is_wanted: bool) -> Any:
    """Return a norm's weight or bias; where it had none, one that was registered since."""
    # What wraps a module may keep the weight as a plain attribute; a buffer is no weight.
    return getattr(module, name, None) if is_wanted else module._parameters.get(name)


def _fits(parameter: Tensor | None, is_wanted: bool, x: Tensor) -> bool:
    """Return whether a norm still has a parameter, of x's width, or still has none."""
    if parameter is None or not is_wanted:
        return parameter is None and not is_wanted
    return parameter.dim() == 1 and x.dim() > 0 and parameter.shape[0] == x.shape[-1]
