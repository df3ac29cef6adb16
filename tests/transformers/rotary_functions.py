"""Rotary functions of unusual forms."""

from __future__ import annotations

import torch
from transformers.models.llama import modeling_llama


def apply_rotary_backwards(q, k, cos, sin, unsqueeze_dim=1):
    """nanochat: the other sign."""
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim=unsqueeze_dim)


def apply_rotary_last(x, cos, sin):
    """deepseek_v4: the last numbers of a head; a whole head looks like the usual form."""
    width = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rest, first, second = x[..., :-width], x[..., -width::2], x[..., -width + 1 :: 2]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((rest, turned), -1)


def apply_rotary_single(x, cos, sin, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=unsqueeze_dim)[0]


def apply_rotary_of_two(x, cos, sin, num_parts=2):
    """gemma4's vision: each part of a head by its own angles, in a comprehension."""
    parts = zip(*(t.chunk(num_parts, -1) for t in (x, cos, sin)), strict=True)
    return torch.cat([apply_rotary_single(*part, unsqueeze_dim=2) for part in parts], -1)


def apply_rotary_sin_first(x, sin, cos):
    """GPT-J: one number a pair, the sines first."""
    cos, sin = (t[:, :, None].repeat_interleave(2, -1) for t in (cos, sin))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin
