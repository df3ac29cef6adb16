"""Norms are recognised by the numbers they compute, and look-alikes are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from norm_modules import (
    MID,
    FixedLayerNorm,
    GatedEndNorm,
    GatedLastNorm,
    GatedNorm,
    IdleBufferNorm,
    L2Norm,
    Norm,
    NormEnd,
    ShiftedLayerNorm,
    T5Norm,
)
from torch import nn

from liger_kernels.transformers.recognise import (
    GatedNormSpec,
    LayerNormSpec,
    NormSpec,
    Refusal,
    recognise_norm,
)


class GatedNarrowNorm(GatedNorm):
    """Multiplies with the gate in x's dtype."""

    def forward(self, x, gate):
        return super().forward(x * F.silu(gate))


class GatedTanhNorm(Norm):
    def forward(self, x, gate):
        return super().forward(x) * torch.tanh(gate)


class TwoInputNorm(Norm):
    def forward(self, q, k):
        return super().forward(q), super().forward(k)


class BufferNorm(IdleBufferNorm):
    """The same with a buffer of ones that forward reads: loading may change it."""

    def forward(self, x):
        return super().forward(x) * self.weight


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).to(x.dtype)


class StoredNorm(nn.Module):
    """Phi4 audio: means and scales of the training data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))
        self.register_buffer("scale", torch.ones(12))

    def forward(self, x):
        return (x - self.mean) * self.scale


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """SAM: over dimension 1 of an image."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RoundedScaleNorm(nn.Module):
    """DeepSeek-V4: the scale itself is rounded before the product."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale.to(x.dtype)


class FixedEpsNorm(Norm):
    """Has an eps attribute and reads another number."""

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(
            x.dtype
        )


class OddEpsNorm(Norm):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 3e-6))


class OddNorm(Norm):
    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


GATED = GatedNormSpec(True, "silu", "before_weight", 1, True, ("x", "gate"), "eps")


NORMS = {
    "mid": (Norm, MID),
    "end": (NormEnd, NormSpec(0.0, "after_weight", True, "eps")),
    "torch-layer-norm": (lambda: nn.LayerNorm(12), LayerNormSpec(True, True, "eps")),
    "no-bias": (lambda: nn.LayerNorm(12, bias=False), LayerNormSpec(True, False, "eps")),
    "no-weight": (
        lambda: nn.LayerNorm(12, elementwise_affine=False),
        LayerNormSpec(False, False, "eps"),
    ),
    "two-dimensional": (lambda: nn.LayerNorm((3, 4)), "no kernel"),
    "t5": (T5Norm, replace(MID, needs_one_dtype=True)),
    "gated": (GatedNorm, GATED),
    "gated-groups": (lambda: GatedNorm(4), replace(GATED, num_groups=3)),
    "gated-last": (GatedLastNorm, replace(GATED, gate_first=False)),
    "gated-end": (
        GatedEndNorm,
        GatedNormSpec(False, "sigmoid", "after_weight", 1, True, ("hidden", "z"), "eps"),
    ),
    "gated-narrow": (GatedNarrowNorm, "rounds at another point"),
    "gated-tanh": (GatedTanhNorm, "norm of 2 inputs (x, gate) of another form"),
    "two-inputs": (TwoInputNorm, "norm of 2 inputs (q, k) of another form"),
    "l2": (L2Norm, NormSpec(0.0, "after_weight", False, "eps", is_l2=True)),
    "idle-buffer": (IdleBufferNorm, NormSpec(0.0, "before_weight", False, "eps")),
    "buffer": (BufferNorm, "no kernel"),
    "scale": (ScaleNorm, "gives the scale of a norm"),
    "stored": (StoredNorm, "stored numbers"),
    "rounded-scale": (RoundedScaleNorm, "rounds its scale before the product"),
    "fixed-eps": (FixedEpsNorm, NormSpec(0.0, "before_weight", True, "", 1e-5)),
    "odd-eps": (OddEpsNorm, "no kernel"),
    "dtype-eps": (lambda: nn.RMSNorm(12), "eps is its dtype's"),
    "fixed-layer-norm": (FixedLayerNorm, LayerNormSpec(False, False, "", 1e-5)),
    "shifted-layer-norm": (
        lambda: ShiftedLayerNorm(12),
        LayerNormSpec(True, True, "eps", offset=1.0),
    ),
    "channels-first": (lambda: ChannelsFirstLayerNorm(12), "channels that are not the last"),
    "mean-of-absolutes": (OddNorm, "no kernel"),
    "batch-norm": (lambda: nn.BatchNorm1d(12), None),
    "group-norm": (lambda: nn.GroupNorm(2, 12), None),
    "linear": (lambda: nn.Linear(12, 12), None),
    "dropout": (lambda: nn.Dropout(0.05), None),
}


@pytest.mark.parametrize("case", NORMS)
def test_norm(case):
    build, wanted = NORMS[case]
    torch.manual_seed(0)
    found = recognise_norm(build())
    if isinstance(wanted, str):
        assert isinstance(found, Refusal)
        assert wanted in found.reason
    else:
        assert found == wanted


def test_norm_eps_is_of_any_size():
    for eps in (1e-12, 1e-8, 1e-5, 1e-2):
        assert recognise_norm(Norm(eps=eps)) == MID
