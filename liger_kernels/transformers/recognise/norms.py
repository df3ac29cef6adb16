"""Norms: root mean square, layer and gated ones, with their eps, offset and rounding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_kernels.ops.gated_rms_norm import ACTIVATIONS as GATE_ACTIVATIONS
from liger_kernels.ops.gated_rms_norm import gated_rms_norm_ref
from liger_kernels.ops.rms_norm import rms_norm_ref
from liger_kernels.transformers.recognise.probe import (
    call_forward,
    forward_inputs,
    is_close,
    new_generator,
    original_class,
    probe_copy,
    quiet,
    randn,
    uniform,
)
from liger_kernels.transformers.recognise.specs import (
    Cast,
    GatedNormSpec,
    LayerNormSpec,
    NormSpec,
    Refusal,
    unserved,
)

Found = NormSpec | LayerNormSpec | GatedNormSpec | Refusal | None
# (x, weight, eps, cast) -> the output of a form.
_Form = Callable[[Tensor, Tensor | None, float, Cast], Tensor]

_ODD_ROUNDING = unserved("norm that rounds at another point")
_ROWS = 16
# What classes write in their forward when no attribute holds eps.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)


def recognise_norm(module: nn.Module) -> Found:
    """Return the form of a norm module, or why it has none that a kernel computes."""
    cls = original_class(type(module))
    is_named_norm = "Norm" in cls.__name__ and not module._modules
    if cls.__module__.startswith("torch.") and cls not in (nn.LayerNorm, nn.RMSNorm):
        return None
    if not _names_of(module) and not is_named_norm:
        return None
    inputs = forward_inputs(cls) or ()
    found: Found = None
    if _has_known_shape(module):
        with quiet():
            if len(inputs) == 1:
                found = _tried(_plain, module) or _tried(_describe, module)
            elif len(inputs) == 2:
                found = _tried(functools.partial(_gated, inputs), module, has_gate=True)
    if found is None and is_named_norm:
        more = f" of {len(inputs)} inputs ({', '.join(inputs)})" if len(inputs) > 1 else ""
        return unserved(f"norm{more} of another form{_odd_parts(module)}")
    return found if is_named_norm or not isinstance(found, Refusal) else None


def _odd_parts(module: nn.Module) -> str:
    """Return the parameters of a norm that have other names or shapes than usual, in words."""
    odd = [
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in module._parameters.items()
        if parameter is not None and (name not in _USUAL or parameter.dim() != 1)
    ]
    return f" with {', '.join(odd)}" if odd else ""


def _tried(recognise: Callable[[_Probe], Found], module: nn.Module, **options: bool) -> Found:
    """Return the form that is recognised with the parameters as weight and bias, in each order."""
    for weight, bias in _roles_of(module):
        try:
            found = recognise(_Probe(module, weight, bias, **options))
        except Exception:
            # Whatever the class does with the probe, it is not the formula.
            continue
        if found is not None:
            return found
    return None


# Where a class keeps the product and the sum; those of other names are tried as both.
_USUAL = ("weight", "bias")


def _names_of(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a module has."""
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _roles_of(module: nn.Module) -> list[tuple[str | None, str | None]]:
    """Return which parameters may be weight and bias, the likeliest first."""
    names: list[str | None] = [*_names_of(module)]
    if len(names) == 2:
        first, second = names
        is_odd = names == ["bias", "weight"]
        orders: list[tuple[str | None, str | None]] = [(first, second), (second, first)]
        return orders[::-1] if is_odd else orders
    if names == ["bias"]:
        return [(None, "bias")]
    return [(names[0] if names else None, None)]


def _has_known_shape(module: nn.Module) -> bool:
    """Return whether a module holds nothing but a norm over the last dimension may."""
    parameters = module._parameters
    is_flat = all(p is None or p.dim() == 1 for p in parameters.values())
    shape = getattr(module, "normalized_shape", (2,))
    return is_flat and not module._modules and len(_names_of(module)) <= 2 and len(shape) == 1


class _Probe:
    """A norm module with random weights, called on a few rows."""

    def __init__(
        self, module: nn.Module, weight: str | None, bias: str | None, *, has_gate: bool = False
    ) -> None:
        self.module = module
        self.names = weight, bias
        generator = new_generator()
        given = None if weight is None else module._parameters[weight]
        # torch's norms insist on their width; others without a weight take any.
        buffers = [b.shape for b in module._buffers.values() if b is not None and b.dim() == 1]
        shape: Any = getattr(module, "normalized_shape", (*buffers, (16,))[0])
        self.width: int = (shape if given is None else given.shape)[0]
        self.weight = None if given is None else uniform(generator, self.width)
        self.bias = None if bias is None else randn(generator, self.width)
        # A buffer is no part of any form, so that its numbers must not matter.
        self.buffers = {
            name: randn(generator, *buffer.shape)
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        self.x = randn(generator, _ROWS, self.width)
        self.gate = 2 * randn(generator, _ROWS, self.width) if has_gate else None

    def __call__(
        self,
        x: Tensor,
        dtype: torch.dtype = torch.float32,
        attributes: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the output for x, with weights in a dtype; the gate has x's."""
        tensors = dict(zip(self.names, (self.weight, self.bias), strict=True))
        parameters = {k: v.to(dtype) for k, v in tensors.items() if k is not None and v is not None}
        # A setting that its configuration holds may change there, which nobody would see.
        hidden = {"config": None} if "config" in vars(self.module) else {}
        attributes = {**hidden, **(attributes or {})}
        clone = probe_copy(self.module, parameters, attributes=attributes, buffers=self.buffers)
        return call_forward(clone, x, *(() if self.gate is None else (self.gate.to(x.dtype),)))

    def epsilons(self) -> Iterator[tuple[str, float]]:
        """Yield what may be eps: (attribute, its value), then ("", number).

        An attribute is a small positive number; the usual names come first.
        """
        values = {k: v for k, v in vars(self.module).items() if isinstance(v, float)}
        for name in sorted(values, key=lambda name: "eps" not in name):
            if 0 < values[name] < 0.1:
                yield name, values[name]
        for number in _EPSILONS:
            yield "", number

    def matches(self, form: _Form, attribute: str, eps: float) -> bool:
        """Return whether the module computes a form, with that eps and no other."""

        def agrees(x: Tensor, eps: float, attributes: Mapping[str, Any] | None = None) -> bool:
            y = self(x, attributes=attributes)
            return is_close(y, form(x, self.weight, eps, "after_weight"))

        # Inputs this small let eps decide, and another eps in the attribute proves that it is the
        # one read.
        small, moved = eps**0.5 * self.x, 0.37
        return (
            agrees(self.x, eps)
            and agrees(small, eps)
            and (not attribute or agrees(small, moved, {attribute: moved}))
        )

    def rounding(self, form: _Form, eps: float) -> tuple[Cast, bool] | None:
        """Return where a norm rounds, and whether only if x and weight have the same dtype.

        Its bits in bf16 show it, and its dtype with an fp32 weight.
        """
        narrow = (3 * self.x).bfloat16()
        for cast in get_args(Cast):
            agrees = []
            for dtype in (torch.bfloat16, torch.float32):
                weight = None if self.weight is None else self.weight.to(dtype)
                agrees.append(_is_same(self(narrow, dtype), form(narrow, weight, eps, cast)))
            # T5's rounds x / rms to the dtype that the weight has.
            if all(agrees) or (agrees[0] and cast == "before_weight"):
                return cast, not agrees[1]
        return None


def _is_same(y: Tensor, wanted: Tensor) -> bool:
    # x * rsqrt(v) and x / sqrt(v) differ in the last bit of fp32, which seldom flips one in bf16;
    # another place of rounding flips every fifth.
    return y.dtype == wanted.dtype and (y != wanted).float().mean().item() < 0.02


# One input --------------------------------------------------------------------------------------


def _plain(probe: _Probe) -> NormSpec | LayerNormSpec | Refusal | None:
    if probe.width < 2:
        return None
    has_weight, has_bias = probe.weight is not None, probe.bias is not None
    weight_attr, bias_attr = (
        name or usual for name, usual in zip(probe.names, _USUAL, strict=True)
    )
    for name, eps in probe.epsilons():
        number = None if name else eps
        for offset in (0.0, 1.0) if has_weight else (0.0,):
            if probe.matches(_layer_norm_form(probe, offset), name, eps):
                layer = LayerNormSpec(has_weight, has_bias, name, number, offset)
                layer = replace(layer, weight_attr=weight_attr, bias_attr=bias_attr)
                return _layer_norm(probe, layer)
            if not has_bias and probe.matches(_rms_norm_form(offset), name, eps):
                norm = NormSpec(
                    offset, "after_weight", has_weight, name, number, weight_attr=weight_attr
                )
                return _rms_norm(probe, norm, eps)
        if not (has_weight or has_bias) and probe.matches(_l2_norm, name, eps):
            spec = NormSpec(0.0, "after_weight", False, name, number, is_l2=True)
            return spec if probe.rounding(_l2_norm, eps) else _ODD_ROUNDING
    return None


def _layer_norm_form(probe: _Probe, offset: float) -> _Form:
    def form(x: Tensor, weight: Tensor | None, eps: float, cast: Cast) -> Tensor:
        weight = None if weight is None else weight + offset
        return F.layer_norm(x, (probe.width,), weight, probe.bias, eps)

    return form


def _rms_norm_form(offset: float) -> _Form:
    def form(x: Tensor, weight: Tensor | None, eps: float, cast: Cast) -> Tensor:
        return rms_norm_ref(x, weight, eps, offset=offset, cast=cast)

    return form


def _l2_norm(x: Tensor, weight: Tensor | None, eps: float, cast: Cast) -> Tensor:
    """Return x over the root of the sum of its squares, rounded once."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


def _layer_norm(probe: _Probe, spec: LayerNormSpec) -> LayerNormSpec | Refusal:
    y = probe(probe.x.bfloat16(), torch.bfloat16)
    if y.dtype != torch.bfloat16 or not is_close(y, probe(probe.x), 3e-2):
        return unserved("layer norm that rounds at another point")
    return spec


def _rms_norm(probe: _Probe, spec: NormSpec, eps: float) -> NormSpec | Refusal:
    rounding = probe.rounding(_rms_norm_form(spec.offset), eps)
    if rounding is not None:
        return replace(spec, cast=rounding[0], needs_one_dtype=rounding[1])
    narrow = probe.x.bfloat16()
    scale = torch.rsqrt(narrow.float().pow(2).mean(-1, keepdim=True) + eps).bfloat16()
    if probe.weight is None and _is_same(probe(narrow), narrow * scale):
        return unserved("norm that rounds its scale before the product")
    return _ODD_ROUNDING


def _describe(probe: _Probe) -> Refusal | None:
    """Return why a look-alike of one input is left alone; None if that is not known."""
    x, width = probe.x, probe.width
    if width < 2:
        return None
    try:
        y = probe(x)
    except Exception:
        y = None
    if isinstance(y, Tensor) and y.shape == (_ROWS, 1):
        return unserved("gives the scale of a norm, not its product with x")
    if isinstance(y, Tensor) and is_close(probe(2 * x) - y, y - probe(0 * x), 1e-4):
        return Refusal("shifts and scales by stored numbers, not by those of x: nothing to fuse")
    form = _rms_norm_form(0.0)
    eps = torch.finfo(x.dtype).eps
    if isinstance(y, Tensor) and probe.matches(form, "", eps):
        return unserved("norm whose eps is its dtype's")
    image = x.t().reshape(1, width, 4, 4)
    for _, eps in probe.epsilons() if y is None else ():
        form = _layer_norm_form(probe, 0.0)
        wanted = form(x, probe.weight, eps, "after_weight").t().reshape(image.shape)
        if is_close(probe(image), wanted):
            return unserved("layer norm over channels that are not the last dimension")
    return None


# x and a gate -----------------------------------------------------------------------------------


def _gated(inputs: tuple[str, ...], probe: _Probe) -> GatedNormSpec | Refusal | None:
    if probe.width < 2 or probe.bias is not None:
        return None
    options = itertools.product((False, True), GATE_ACTIVATIONS, _group_counts(probe))
    specs = [
        GatedNormSpec(
            gate_first,
            activation,
            "after_weight",
            num_groups,
            has_weight=probe.weight is not None,
            inputs=(inputs[0], inputs[1]),
            eps_attr="",
            weight_attr=probe.names[0] or "weight",
        )
        for gate_first, activation, num_groups in options
    ]
    for name, eps in probe.epsilons():
        for spec in specs:
            form = _gated_form(probe, spec)
            if not probe.matches(form, name, eps):
                continue
            rounding = probe.rounding(form, eps)
            if rounding is None or rounding[1]:
                return _ODD_ROUNDING
            return replace(spec, cast=rounding[0], eps_attr=name, eps=None if name else eps)
    return None


def _gated_form(probe: _Probe, spec: GatedNormSpec) -> _Form:
    def form(x: Tensor, weight: Tensor | None, eps: float, cast: Cast) -> Tensor:
        assert probe.gate is not None
        y: Tensor = gated_rms_norm_ref(
            x,
            probe.gate.to(x.dtype),
            weight,
            eps,
            gate_first=spec.gate_first,
            activation=spec.activation,
            cast=cast,
            num_groups=spec.num_groups,
        )
        return y

    return form


def _group_counts(probe: _Probe) -> list[int]:
    """Return how many groups there may be: an attribute is their number or the width of one."""
    counts = {1}
    for value in vars(probe.module).values():
        if isinstance(value, int) and value > 1 and probe.width % value == 0:
            counts |= {value, probe.width // value}
    return sorted(counts)
