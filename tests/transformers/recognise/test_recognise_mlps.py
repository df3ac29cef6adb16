"""Gated MLPs are recognised by the numbers they compute, and look-alikes are refused."""

from __future__ import annotations

import accelerate
import pytest
import torch
import torch.nn.functional as F
import zoo
from norm_modules import MID, Norm
from torch import nn

from liger_kernels.transformers.recognise import (
    MlpSpec,
    Refusal,
    recognise_mlp,
    recognise_norm,
)


class Mlp(nn.Module):
    def __init__(self, act=F.silu, width=8, inner=12, bias=False):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class DropoutMlp(Mlp):
    """SeedOss: dropout that only training shows."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class ClampedMlp(Mlp):
    """Clamped far out, where ordinary activations never come."""

    def forward(self, x):
        return self.down(self.act(self.gate(x).clamp(max=40.0)) * self.up(x))


class LimitedMlp(Mlp):
    """DeepSeek-V4: clamped where ordinary activations come."""

    def forward(self, x):
        gate, up = self.gate(x).clamp(max=2.0), self.up(x).clamp(-2.0, 2.0)
        return self.down(self.act(gate) * up)


class ShiftedMlp(LimitedMlp):
    """gpt-oss and MiniMax."""

    def forward(self, x):
        gate, up = self.gate(x).clamp(max=2.0), self.up(x).clamp(-2.0, 2.0)
        return self.down(gate * torch.sigmoid(1.702 * gate) * (up + 1))


class FusedMLP(nn.Module):
    def __init__(self, order="gate_first", inner=12):
        super().__init__()
        self.both = nn.Linear(8, 2 * inner, bias=False)
        self.down = nn.Linear(inner, 8, bias=False)
        self.order, self.inner = order, inner

    def forward(self, x):
        h = self.both(x)
        if self.order == "interleaved":
            gate, up = h[..., ::2], h[..., 1::2]
        else:
            # By a stored size, not by chunk: the probe must keep the inner width.
            gate, up = h.split(self.inner, dim=-1)
            if self.order == "up_first":
                gate, up = up, gate
        return self.down(F.silu(gate) * up)


class PlainMLP(nn.Module):
    def __init__(self, width=8, inner=12):
        super().__init__()
        self.first, self.act = nn.Linear(width, inner), nn.GELU()
        self.second = nn.Linear(inner, width)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


class OtherPlainMLP(PlainMLP):
    def __init__(self):
        super().__init__()
        self.act = nn.Mish()


class DropoutPlainMLP(PlainMLP):
    """GPT-BigCode: a dropout inside, which training turns on."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(super().forward(x))


class NormedMlp(Mlp):
    """BitNet: a norm before the last layer."""

    def __init__(self):
        super().__init__()
        self.sub_norm = nn.LayerNorm(12)

    def forward(self, x):
        return self.down(self.sub_norm(self.act(self.gate(x)) * self.up(x)))


class ScaledMlp(Mlp):
    def forward(self, x):
        return 0.5 * super().forward(x)


def _separate(activation: str) -> MlpSpec:
    return MlpSpec("separate", "gate", "up", "down", activation)


MLPS = {
    "silu": (Mlp, _separate("silu")),
    "biased": (lambda: Mlp(bias=True), _separate("silu")),
    "square": (lambda: Mlp(width=8, inner=8), _separate("silu")),
    "gelu": (lambda: Mlp(F.gelu), _separate("gelu")),
    "gelu-tanh": (lambda: Mlp(nn.GELU("tanh")), _separate("gelu_tanh")),
    "relu2": (lambda: Mlp(lambda x: F.relu(x).square()), "activation relu2: no kernel"),
    "quick-gelu": (
        lambda: Mlp(lambda x: x * torch.sigmoid(1.702 * x)),
        "activation quick_gelu: no kernel",
    ),
    "linear": (lambda: Mlp(lambda x: x), "activation linear: no kernel"),
    "other-activation": (lambda: Mlp(nn.Mish()), "activation Mish: no kernel"),
    "clipped": (lambda: Mlp(nn.Hardtanh()), "activation Hardtanh: no kernel"),
    "unknown-activation": (lambda: Mlp(torch.sin), None),
    "gate-first": (FusedMLP, MlpSpec("gate_first", "both", "both", "down", "silu")),
    "up-first": (
        lambda: FusedMLP("up_first"),
        MlpSpec("up_first", "both", "both", "down", "silu"),
    ),
    "interleaved": (
        lambda: FusedMLP("interleaved"),
        MlpSpec("interleaved", "both", "both", "down", "silu"),
    ),
    "plain": (PlainMLP, "plain MLP (no gate): nothing to fuse"),
    "plain-square": (lambda: PlainMLP(8, 8), "plain MLP (no gate): nothing to fuse"),
    "plain-dropout": (DropoutPlainMLP, "plain MLP (no gate): nothing to fuse"),
    "plain-other": (OtherPlainMLP, "plain MLP (no gate): nothing to fuse"),
    "dropout": (DropoutMlp, "dropout"),
    "clamped": (ClampedMlp, "clamps its inputs"),
    "limited": (LimitedMlp, "clamps its inputs"),
    "shifted": (ShiftedMlp, "up + 1"),
    "normed": (NormedMlp, None),
    "scaled": (ScaledMlp, "no kernel"),
    "attention-like": (lambda: nn.MultiheadAttention(8, 2), None),
}


@pytest.mark.parametrize("case", MLPS)
def test_mlp(case):
    build, wanted = MLPS[case]
    module = build().train()
    # Small initial weights make gelu and its tanh form look the same; the probe has its own.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1e-3)
    found = recognise_mlp(module)
    if isinstance(wanted, str):
        assert isinstance(found, Refusal)
        assert wanted in found.reason
    elif wanted is None:
        assert found is None or isinstance(found, Refusal)
    else:
        assert found == wanted
    assert module.training


def test_mlp_on_meta_and_with_adapters():
    with torch.device("meta"):
        assert recognise_mlp(Mlp(width=4096, inner=512)) == _separate("silu")
    # How transformers 4 builds a model before it loads weights.
    with accelerate.init_empty_weights(include_buffers=True):
        assert recognise_mlp(Mlp()) == _separate("silu")
        assert recognise_norm(Norm()) == MID
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"])
    wrapped = peft.get_peft_model(model, config)
    mlp = wrapped.base_model.model.model.layers[0].mlp
    assert recognise_mlp(mlp) == MlpSpec("separate", "gate_proj", "up_proj", "down_proj", "silu")
