"""Memory of a GPU's attention, saved for backward and transient, without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["attention_on_gpu", "flex_on_gpu", "varlen_on_gpu"]

# The widest head that flash attention takes.
_MAX_FLASH_WIDTH = 256
_HALVES = (torch.bfloat16, torch.float16)


def attention_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Allocate as F.scaled_dot_product_attention does on a GPU, for tensors without data.

    Without a mask flash attention runs, which keeps no scores and shares keys among heads; with one
    the memory-efficient kernel, which does not share keys, but keeps no scores either. Where keys
    are shared and flash attention does not serve, torch's fallback makes all scores.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    is_flash = attn_mask is None and query.dtype in _HALVES and query.shape[-1] <= _MAX_FLASH_WIDTH
    if key.shape[1] != query.shape[1] and not is_flash:
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    return _Attention.apply(query, key, value, attn_mask)


def varlen_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, lengths: Any, scale: float, left: int
) -> Tensor:
    """Allocate as the varlen kernel does: (T, H, D) queries of all rows, keys shared."""
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out: Tensor = _Attention.apply(query, key, value, None)
    return out.squeeze(0).transpose(0, 1)


def flex_on_gpu(query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any) -> Tensor:
    """Allocate as flex attention does: no scores, keys shared, and a small mask of blocks."""
    out: Tensor = _Attention.apply(query, key, value, None)
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        # In the layout that the projection after it reads.
        out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        lse = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        # In fp32 while it is summed; and the gradients of shared keys a head.
        on_the_way = [torch.empty_like(query, dtype=torch.float32)]
        grads = [torch.empty_like(x) for x in (query, key, value)]
        if key.shape[1] != query.shape[1]:
            on_the_way += [x.new_empty((*query.shape[:2], *x.shape[2:])) for x in (key, value)]
        del on_the_way
        return (*grads, None)
