"""Norms of many forms, and modules that look like norms and are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from liger_kernels.transformers.recognise import (
    NormSpec,
)


class Norm(nn.Module):
    """LlamaRMSNorm, to be changed by subclasses."""

    def __init__(self, width: int = 12, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class NormEnd(Norm):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


class GatedNorm(Norm):
    """Mamba 2: gated first, in groups; a norm of x alone until a gate is given."""

    def __init__(self, group_size=12):
        super().__init__()
        self.group_size = group_size

    def forward(self, x, gate=None):
        wide = x.float() if gate is None else x.float() * F.silu(gate.float())
        wide = wide.view(*x.shape[:-1], -1, self.group_size)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.view(x.shape).to(x.dtype)


class GatedLastNorm(Norm):
    """Qwen3-Next."""

    def forward(self, x, gate):
        return (super().forward(x) * F.silu(gate.float())).to(x.dtype)


class GatedEndNorm(Norm):
    """Kimi Linear: another activation, and one rounding."""

    def forward(self, hidden, z=None):
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide * torch.sigmoid(z.float())).to(hidden.dtype)


class L2Norm(nn.Module):
    """nGPT: the sum of squares, not their mean."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + self.eps)).type_as(x)


class IdleBufferNorm(nn.Module):
    """FalconMamba: a buffer that forward does not read."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6
        self.register_buffer("weight", torch.ones(12))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class FixedLayerNorm(nn.Module):
    """OLMo: no weights, eps in the code."""

    def __init__(self):
        super().__init__()
        self.normalized_shape = (12,)

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, None, None, eps=1e-5).to(x.dtype)


class ShiftedLayerNorm(nn.LayerNorm):
    """Nemotron: weight + 1."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


MID = NormSpec(0.0, "before_weight", True, "eps")


class T5Norm(Norm):
    """Kosmos-2.5: x_hat is rounded to the weight's dtype, and only if that is a half one."""

    def forward(self, x):
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        is_half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight * (x.to(self.weight.dtype) if is_half else x)
