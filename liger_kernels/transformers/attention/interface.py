"""`liger_varlen`: an attention of transformers, chosen by attn_implementation."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liger_kernels.transformers.attention.backends import (
    ScoreOptions,
    flex_attention,
    masked_attention,
)
from liger_kernels.transformers.attention.choice import (
    Choice,
    LayerChoice,
    LayerForm,
    choose_backend,
    layer_type_of,
)
from liger_kernels.transformers.attention.kernel import Lengths, varlen_attention
from liger_kernels.transformers.attention.masks import DeferredMask, defer_mask

__all__ = ["LIGER_VARLEN", "recorded_choices"]

# No "flash" in it: transformers branches on that.
LIGER_VARLEN = "liger_varlen"

_recorders: list[Counter[tuple[str, Choice]]] = []


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[LayerChoice]]:
    """Record which backend computes each layer; the list is filled at the end of the block."""
    counts: Counter[tuple[str, Choice]] = Counter()
    found: list[LayerChoice] = []
    _recorders.append(counts)
    try:
        yield found
    finally:
        _recorders.remove(counts)
        found += [
            LayerChoice(layer_type, count, choice.backend, choice.reason)
            for (layer_type, choice), count in counts.items()
        ]


def document_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute the attention of a layer, with the call of AttentionInterface.

    Args:
        module: The layer.
        query: (B, H, T, D).
        key: (B, H_kv, T_k, D).
        value: (B, H_kv, T_k, D_v).
        attention_mask: A DeferredMask, or a mask that the model made itself.
        options: Those of transformers, the lengths of documents among them.

    Returns:
        (B, T, H, D_v), and None in place of probabilities.

    Raises:
        ValueError: The lengths are not those of the batch.
    """
    lengths = Lengths.of(options)
    query, key, value = _in_autocast_dtype(query, key, value)
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_own = isinstance(attention_mask, DeferredMask) and not attention_mask.is_padded
    if lengths is None or not is_causal or not (is_own or attention_mask is None):
        return _with_mask(module, (query, key, value), attention_mask, None, options), None
    form = _form_of(module, query, value, attention_mask, options)
    choice = choose_backend(form)
    for counts in _recorders:
        counts[form.layer_type, choice] += 1
    if choice.backend == "varlen":
        return _varlen(query, key, value, lengths, options), None
    if attention_mask is None:
        raise ValueError(
            f"{type(module).__name__} is given no mask, and only varlen works without: "
            f"{choice.reason}"
        )
    if choice.backend == "flex":
        mask = attention_mask.make("flex_attention", lengths)
        return flex_attention(query, key, value, mask, _score_options(options)), None
    return _with_mask(module, (query, key, value), attention_mask, lengths, options), None


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as scaled_dot_product_attention does; the varlen kernel has no rule for autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)


def _form_of(
    module: Any, query: Tensor, value: Tensor, mask: DeferredMask | None, options: dict[str, Any]
) -> LayerForm:
    window = options.get("sliding_window")
    layer_type = layer_type_of(module, window)
    # A window that is in the mask alone cannot be known here.
    is_hidden = layer_type == "sliding_attention" and not window
    return LayerForm(
        layer_type,
        max(query.shape[-1], value.shape[-1]),
        query.dtype,
        query.device,
        dropout=options.get("dropout", 0.0),
        is_capped=options.get("softcap") is not None,
        has_sinks=options.get("s_aux") is not None,
        has_bias=options.get("position_bias") is not None,
        has_own_mask=is_hidden or (mask is not None and mask.is_custom),
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, options: dict[str, Any]
) -> Tensor:
    """Lay the rows of a batch end to end and call the kernel."""
    batch, _, num_tokens, _ = query.shape
    if key.shape[2] != num_tokens:
        raise ValueError(
            f"the lengths of documents are for training, without a cache: there are {num_tokens} "
            f"queries and {key.shape[2]} keys a row"
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale, window = options.get("scaling"), options.get("sliding_window")
    out = varlen_attention(q, k, v, lengths, scale=scale, window=window)
    return out.unflatten(0, (batch, num_tokens))


def _score_options(options: dict[str, Any]) -> ScoreOptions:
    return ScoreOptions(
        scale=options.get("scaling"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        bias=options.get("position_bias"),
        dropout=options.get("dropout", 0.0),
    )


def _with_mask(
    module: Any,
    tensors: tuple[Tensor, ...],
    mask: Any,
    lengths: Lengths | None,
    options: dict[str, Any],
) -> Tensor:
    """Compute attention with transformers' mask: by sdpa, or by the formula where sdpa cannot."""
    query, key, value = tensors
    if isinstance(mask, DeferredMask):
        mask = mask.make("sdpa", lengths)
    scores = _score_options(options)
    if scores.softcap is None and scores.sinks is None and scores.bias is None:
        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)
        return out
    return masked_attention(query, key, value, mask, scores)


AttentionInterface.register(LIGER_VARLEN, document_attention)
AttentionMaskInterface.register(LIGER_VARLEN, defer_mask)
