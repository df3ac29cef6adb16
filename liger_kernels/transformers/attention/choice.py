"""Which backend computes the attention of a layer, and why a faster one does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from liger_kernels.transformers.attention import kernel
from liger_kernels.transformers.wrappers import forward_parameters, inner_model

__all__ = [
    "Backend",
    "Choice",
    "LayerChoice",
    "LayerForm",
    "choose_backend",
    "layer_forms",
    "layer_type_of",
    "model_problem",
    "plan_layers",
]

Backend = Literal["varlen", "flex", "mask"]

# Smaller ones flex attention refuses; larger ones need more shared memory than a H200 has.
_FLEX_HEAD_SIZES = (16, 256)
_HALVES = (torch.bfloat16, torch.float16)
# Layers whose mask is known from the documents and a window alone.
_PLAIN_LAYERS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class LayerForm:
    """The properties of a layer that decide its backend.

    Attributes:
        layer_type: As transformers names it: full_attention, sliding_attention, ...
        head_size: The larger of those of queries and values.
        dtype: That attention is computed in: under autocast, autocast's.
        dropout: Probability, 0 in evaluation.
        is_capped: Whether scores are capped by tanh.
        has_sinks: Whether heads have a learned sink.
        has_bias: Whether a bias is added to scores.
        has_own_mask: Whether the mask is more than documents and a window.
    """

    layer_type: str
    head_size: int
    dtype: torch.dtype
    device: torch.device
    dropout: float = 0.0
    is_capped: bool = False
    has_sinks: bool = False
    has_bias: bool = False
    has_own_mask: bool = False


@dataclass(frozen=True)
class Choice:
    """A backend, and why a faster one cannot serve; no reason where there is none faster."""

    backend: Backend
    reason: str | None = None


@dataclass(frozen=True)
class LayerChoice:
    """The backend of all layers of one type.

    Attributes:
        num_layers: So many there are.
        reason: Why a faster backend was not taken, if there is one.
    """

    layer_type: str
    num_layers: int
    backend: Backend
    reason: str | None


def choose_backend(form: LayerForm) -> Choice:
    """Return the fastest backend that can compute a layer."""
    reason = _varlen_problem(form)
    if reason is None:
        return Choice("varlen")
    more = _flex_problem(form)
    if more is None:
        return Choice("flex", f"varlen: {reason}")
    return Choice("mask", f"varlen: {reason}" if more == reason else f"varlen: {reason}; {more}")


def _varlen_problem(form: LayerForm) -> str | None:
    if (problem := kernel.device_problem(form.device)) is not None:
        return problem
    if form.dtype not in _HALVES:
        return f"it computes in bfloat16 or float16, and this is {_name(form.dtype)}"
    if form.layer_type not in _PLAIN_LAYERS or form.has_own_mask:
        return "the layer has a mask that is more than documents and a window"
    if form.is_capped:
        return "it does not cap scores"
    if form.has_sinks:
        return "it has no attention sinks"
    if form.has_bias:
        return "it adds no bias to scores"
    if form.dropout:
        return f"it has no dropout, and attention_dropout is {form.dropout}"
    return kernel.head_problem(form.device, form.head_size)


def _flex_problem(form: LayerForm) -> str | None:
    """Return why flex attention is not taken; what holds for varlen too in the same words."""
    if (problem := kernel.device_problem(form.device)) is not None:
        return problem
    if form.dtype not in _HALVES:
        return f"it computes in bfloat16 or float16, and this is {_name(form.dtype)}"
    if form.dropout:
        return f"it has no dropout, and attention_dropout is {form.dropout}"
    if form.has_bias:
        return "flex: it is given no bias"
    low, high = _FLEX_HEAD_SIZES
    if not low <= form.head_size <= high:
        return f"flex: it takes heads of {low} to {high}, and these have {form.head_size}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layer_type_of(module: Any, window: int | None) -> str:
    """Return the type of an attention layer: its own, that of the configuration, or by window."""
    own = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    if isinstance(own, str):
        return own
    types = getattr(module.config, "layer_types", None)
    if types:
        # Read here alone: a compiled layer is compiled again for each number that was read.
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index < len(types):
            return str(types[index])
    return "sliding_attention" if window else "full_attention"


def model_problem(model: Any) -> str | None:
    """Return why no layer of a model can be given the lengths of documents, or None."""
    inner = inner_model(model)
    if not getattr(inner, "_supports_attention_backend", False):
        return "its attention is not one that transformers lets choose"
    if not getattr(inner, "_supports_flash_attn", False):
        return "its layers need the mask that the model makes"
    kinds = {parameter.kind for parameter in forward_parameters(model).values()}
    if next((p for p in kinds if p is p.VAR_KEYWORD), None) is None:
        return "its forward does not pass lengths on to its layers"
    return None


def layer_forms(model: Any, device: torch.device, dtype: torch.dtype) -> Mapping[LayerForm, int]:
    """Return the forms of a model's layers from its configuration, and how many layers each has.

    Args:
        model: It may be on the meta device.
        device: That it will run on.
        dtype: That attention will be computed in.
    """
    config = inner_model(model).config.get_text_config()
    has_sinks = any(name.endswith(".sinks") for name, _ in inner_model(model).named_parameters())
    return Counter(
        LayerForm(
            layer_type,
            _head_size(config),
            dtype,
            device,
            dropout=float(getattr(config, "attention_dropout", 0.0) or 0.0),
            is_capped=bool(getattr(config, "attn_logit_softcapping", None)),
            has_sinks=has_sinks,
        )
        for layer_type in _layer_types(config)
    )


def plan_layers(model: Any, device: torch.device, dtype: torch.dtype) -> tuple[LayerChoice, ...]:
    """Return the backend of each type of layer in training, with the arguments of layer_forms."""
    return tuple(
        LayerChoice(form.layer_type, count, choice.backend, choice.reason)
        for form, count in layer_forms(model, device, dtype).items()
        for choice in [choose_backend(form)]
    )


def _layer_types(config: Any) -> Iterable[str]:
    types = getattr(config, "layer_types", None)
    if types:
        return [str(name) for name in types]
    one = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return [one] * int(config.num_hidden_layers)


def _head_size(config: Any) -> int:
    """Return the larger size of the heads of queries and values."""
    parts = [getattr(config, name, 0) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(parts):
        return max(sum(parts), getattr(config, "v_head_dim", 0))
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)
