"""Layers for Hugging Face's `kernels` package, whose kernelize() binds their forward to a model's.

transformers marks norms and rotary functions of many families by one name each ("RMSNorm"), though
they differ in the names of their attributes, in where they round and in how they rotate. So a
forward here finds the form of its host by running the host's class, as patching does, and runs the
host's own code where no op computes that form. The rules for a layer are those of `kernels`: no
constructor, no members but two flags, and a forward with the arguments of the one it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from liger_kernels.ops import gated_rms_norm, rms_norm
from liger_kernels.transformers.recognise import (
    GatedNormSpec,
    NormSpec,
    recognise_norm,
    recognise_rotary,
)
from liger_kernels.transformers.recognise.probe import probe_copy
from liger_kernels.transformers.replacements.attention import rotary_by_op
from liger_kernels.transformers.replacements.calls import is_plain

__all__ = ["LAYERS", "RMSNorm", "RMSNormGated", "RotaryPosEmb"]

# The form of each class, or of each rotary function, once it has run.
_NORMS: dict[tuple[type, tuple[str, ...]], Any] = {}
_ROTARIES: dict[type, Callable[..., Any]] = {}


def _norm_of(host: Any) -> tuple[Any, Tensor | None, Any]:
    """Return the form, the weight and the eps that a norm has at this call."""
    key = type(host), tuple(name for name, value in host._parameters.items() if value is not None)
    if key not in _NORMS:
        _NORMS[key] = recognise_norm(host)
    spec = _NORMS[key]
    if not isinstance(spec, NormSpec | GatedNormSpec):
        return None, None, None
    weight = getattr(host, spec.weight_attr) if spec.has_weight else None
    return spec, weight, getattr(host, spec.eps_attr) if spec.eps is None else spec.eps


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, for hosts of one input, whatever their offset and rounding."""

    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the norm of the module that this is bound to."""
        spec, weight, eps = _norm_of(self)
        is_served = (
            isinstance(spec, NormSpec) and not spec.is_l2 and is_plain(hidden_states, weight)
        )
        if not is_served or (
            spec.needs_one_dtype and weight is not None and weight.dtype != hidden_states.dtype
        ):
            return type(self).forward(self, hidden_states)
        return rms_norm(hidden_states, weight, eps, offset=spec.offset, cast=spec.cast)


class RMSNormGated(nn.Module):
    """RMSNorm with a gate, for hosts of two inputs."""

    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """Compute the gated norm of the module that this is bound to."""
        spec, weight, eps = _norm_of(self)
        is_served = isinstance(spec, GatedNormSpec) and is_plain(hidden_states, gate, weight)
        if not is_served or gate is None or weight is None or gate.shape != hidden_states.shape:
            stock: Any = type(self).forward
            return stock(self, hidden_states, gate)
        return gated_rms_norm(
            hidden_states,
            gate,
            weight,
            eps,
            gate_first=spec.gate_first,
            activation=spec.activation,
            cast=spec.cast,
            num_groups=spec.num_groups,
        )


class RotaryPosEmb(nn.Module):
    """Rotation of q and k, by halves or in pairs as the host's function has it."""

    can_torch_compile = False
    has_backward = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k as the function that this is bound to."""
        if type(self) not in _ROTARIES:
            # The function as a module of its class, without what is bound to this one.
            stock = probe_copy(self)
            spec = recognise_rotary("rotary_pos_emb", stock)
            _ROTARIES[type(self)] = stock if spec is None else rotary_by_op(stock, spec)
        turned: tuple[Tensor, Tensor] = _ROTARIES[type(self)](q, k, cos, sin, unsqueeze_dim)
        return turned


# The layer for each name that transformers registers.
LAYERS: dict[str, type[nn.Module]] = {
    "RMSNorm": RMSNorm,
    "RMSNormGated": RMSNormGated,
    "RMSNormZeroCentered": RMSNorm,
    "rotary_pos_emb": RotaryPosEmb,
}
