"""Attention that needs a mask: flex attention, sdpa, and the formula for what sdpa cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

__all__ = ["ScoreOptions", "flex_attention", "masked_attention"]

# Without being compiled it makes all scores.
_compiled_flex: Any = torch.compile(flex.flex_attention)


@dataclass(frozen=True)
class ScoreOptions:
    """Options of the scores and of their softmax.

    Attributes:
        scale: Of the scores; 1 / sqrt(D) by default.
        softcap: Scores become softcap * tanh(scores / softcap).
        sinks: (H,) logits of a token that is no token: it takes probability and gives nothing.
        bias: Added to scores, broadcast to (B, H, T, T).
        dropout: Of the probabilities.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, options: ScoreOptions
) -> Tensor:
    """Compute attention within the blocks of a mask.

    Args:
        query: (B, H, T, D).
        key: (B, H_kv, T, D).
        value: (B, H_kv, T, D_v).
        mask: A BlockMask.
        options: Without bias and dropout.

    Returns:
        (B, T, H, D_v).
    """
    softcap = options.softcap or 0.0

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):
        # The kernel shares keys among 2, 4, 8, ... heads.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    call = flex.flex_attention if torch.compiler.is_compiling() else _compiled_flex
    out, aux = call(
        query,
        key,
        value,
        score_mod=cap if softcap else None,
        block_mask=mask,
        scale=options.scale,
        enable_gqa=key.shape[1] != query.shape[1],
        return_aux=flex.AuxRequest(lse=True),
    )
    if options.sinks is not None:
        # softmax with one more score in its sum: in float32, as the sum itself.
        kept = torch.sigmoid(aux.lse.float() - options.sinks.float().view(1, -1, 1))
        out = (out * kept.unsqueeze(-1)).to(query.dtype)
    return out.transpose(1, 2)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: ScoreOptions
) -> Tensor:
    """Compute attention with a mask, all scores at once.

    Args:
        query: (B, H, T, D).
        key: (B, H_kv, T_k, D).
        value: (B, H_kv, T_k, D_v).
        mask: (B, 1, T, T_k) bool, True where a token is seen; None is causal.

    Returns:
        (B, T, H, D_v).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    scores = torch.matmul(query * scale, key.transpose(2, 3)).float()
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.bias is not None:
        scores = scores + options.bias.float()
    if mask is None:
        shape = scores.shape[-2:]
        seen = torch.ones(shape, dtype=torch.bool, device=scores.device)
        mask = seen.tril(shape[1] - shape[0])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    shares = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    shares = F.dropout(shares, options.dropout, training=options.dropout > 0)
    return torch.matmul(shares, value).transpose(1, 2)
