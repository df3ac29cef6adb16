"""What modules compute, and the look-alikes that must be left alone."""

from __future__ import annotations

import random
import types
from dataclasses import replace

import accelerate
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.recognise import (
    ExpertsSpec,
    GatedNormSpec,
    LayerNormSpec,
    MlpSpec,
    NormSpec,
    Recogniser,
    Refusal,
    RopeSpec,
    recognise_experts,
    recognise_mlp,
    recognise_norm,
    recognise_rope,
    rope_functions,
    unserved,
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


class T5Norm(Norm):
    """Kosmos-2.5: x_hat is rounded to the weight's dtype, and only if that is a half one."""

    def forward(self, x):
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        is_half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight * (x.to(self.weight.dtype) if is_half else x)


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


class FixedLayerNorm(nn.Module):
    """OLMo: no weights, eps in the code."""

    def __init__(self):
        super().__init__()
        self.normalized_shape = (12,)

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, None, None, eps=1e-5).to(x.dtype)


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
    """Has an eps attribute and reads a number of its own."""

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(
            x.dtype
        )


class OddEpsNorm(Norm):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 3e-6))


class ShiftedLayerNorm(nn.LayerNorm):
    """Nemotron: weight + 1."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class OddNorm(Norm):
    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


MID = NormSpec(0.0, "before_weight", True, "eps")
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
    """GPT-BigCode: a dropout of its own, which training turns on."""

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


def vision_rope(q, k, cos, sin):
    """Qwen2-VL: (S, H, D), but also (B, S, H, D): broadcast from the right."""
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()

    def turn(x):
        wide = x.float()
        return (wide * cos + modeling_llama.rotate_half(wide) * sin).to(x.dtype)

    return turn(q), turn(k)


def apply_rotary_interleaved(q, k, cos, sin, unsqueeze_dim=1):
    """Cohere: neighbours, each angle twice in a row."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x):
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    return turn(q), turn(k)


def apply_rotary_single(x, cos, sin, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=unsqueeze_dim)[0]


def apply_rotary_backwards(q, k, cos, sin, unsqueeze_dim=1):
    """nanochat: the other sign."""
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim=unsqueeze_dim)


def apply_rotary_sin_first(x, sin, cos):
    """GPT-J: one number a pair, the sines first."""
    cos, sin = (t[:, :, None].repeat_interleave(2, -1) for t in (cos, sin))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def apply_rotary_of_two(x, cos, sin, num_parts=2):
    """gemma4's vision: each part of a head by its own angles, in a comprehension."""
    parts = zip(*(t.chunk(num_parts, -1) for t in (x, cos, sin)), strict=True)
    return torch.cat([apply_rotary_single(*part, unsqueeze_dim=2) for part in parts], -1)


def apply_rotary_of_four(x, cos, sin):
    """Twice the same, and once another."""
    return apply_rotary_of_two(apply_rotary_backwards(x, x, cos, sin)[0], cos, sin)


def apply_rotary_odd(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin


def apply_rotary_with_sections(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def _attention(function):
    class Attention(nn.Module):
        def forward(self, q, k, cos, sin):
            return apply_rotary(q, k, cos, sin)  # noqa: F821

    forward = types.FunctionType(Attention.forward.__code__, {"apply_rotary": function})
    Attention.forward = forward
    return Attention()


def apply_rotary_last(x, cos, sin):
    """deepseek_v4: the last numbers of a head; a whole head looks like the usual form."""
    width = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rest, first, second = x[..., :-width], x[..., -width::2], x[..., -width + 1 :: 2]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((rest, turned), -1)


ROPES = {
    "half": (modeling_llama.apply_rotary_pos_emb, ("half", "twice", 1, False, False)),
    "vision": (vision_rope, ("half", "twice", -2, False, True)),
    "repeated": (apply_rotary_interleaved, ("pairs", "repeated", 1, False, False)),
    "single": (apply_rotary_single, ("half", "twice", 1, True, False)),
    "backwards": (apply_rotary_backwards, ("half", "twice", 1, False, False, True)),
    "last": (apply_rotary_last, ("pairs", "once", 1, True, False, False, True)),
    "sin-first": (apply_rotary_sin_first, ("pairs", "once", -2, True, False)),
    "odd": (apply_rotary_odd, None),
    "odd-inside": (apply_rotary_of_four, None),
    "sections": (apply_rotary_with_sections, None),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope(case):
    function, wanted = ROPES[case]
    found = recognise_rope(_attention(function))
    if wanted is None:
        assert isinstance(found, Refusal)
    else:
        assert found == RopeSpec("apply_rotary", *wanted)


def test_rope_inside_a_function():
    found = recognise_rope(_attention(apply_rotary_of_two))
    wanted = RopeSpec("apply_rotary_single", "half", "twice", 1, True, False, inside="apply_rotary")
    assert found == wanted


class SectionedRotary(nn.Module):
    """HunYuan-VL: [c, c] is cut into sections of kinds of positions, across its middle or not."""

    def __init__(self, sections):
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(8))
        self.sections = sections

    def forward(self, x, positions):
        angles = positions.expand(len(self.sections), -1, -1)[..., None] * self.inv_freq
        angles = torch.cat((angles, angles), -1).split(
            self.sections * (16 // sum(self.sections)), -1
        )
        angles = torch.cat([part[i % len(self.sections)] for i, part in enumerate(angles)], -1)
        return angles.cos(), angles.sin()


class SectionedModel(nn.Module):
    def __init__(self, sections):
        super().__init__()
        self.attention = _attention(modeling_llama.apply_rotary_pos_emb)
        self.rotary = SectionedRotary(sections)


# The function is the usual one; the tables of some models are not.
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("sections", "is_served"),
    [([2, 3, 3], True), ([4, 4], True), ([4, 6, 6], False), ([8, 8], False), ([4] * 4, False)],
    ids=str,
)
def test_rope_tables_with_other_halves(sections, is_served, device):
    model = SectionedModel(sections).to(device)
    found = Recogniser(model).recognise(model.attention)
    assert isinstance(found, RopeSpec) == is_served
    assert is_served or "second half" in found.reason
    # The attention alone does not show it.
    assert isinstance(Recogniser().recognise(model.attention), RopeSpec)


def test_rope_of_two_functions():
    """DeepSeek-V3: the configuration says which of two is called."""

    class Attention(nn.Module):
        def forward(self, q, k, cos, sin, interleave):
            if interleave:
                return apply_rotary_interleave(q, k, cos, sin)  # noqa: F821
            return apply_rotary(q, k, cos, sin)  # noqa: F821

    def interleave(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        cos, sin = (t[..., :half].unsqueeze(unsqueeze_dim) for t in (cos, sin))

        def turn(x):
            a, b = x[..., ::2], x[..., 1::2]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        return turn(q), turn(k)

    namespace = {
        "apply_rotary": modeling_llama.apply_rotary_pos_emb,
        "apply_rotary_interleave": interleave,
    }
    Attention.forward = types.FunctionType(Attention.forward.__code__, namespace)
    found = recognise_rope(Attention())
    assert found.function == "apply_rotary"
    assert found.others == (
        RopeSpec("apply_rotary_interleave", "pairs_to_half", "twice", 1, False, False),
    )
    namespace["apply_rotary"] = apply_rotary_odd
    assert isinstance(recognise_rope(Attention()), Refusal)


def test_rope_of_attention_that_does_not_rotate():
    assert recognise_rope(nn.MultiheadAttention(8, 2)) is None
    assert set(rope_functions(modeling_gemma2.Gemma2Attention)) == {"apply_rotary_pos_emb"}


@pytest.mark.skipif(not zoo.IS_V5, reason="version 4 has one MLP an expert")
def test_experts_layouts():
    experts = zoo.build("mixtral").model.layers[0].mlp.experts
    found = recognise_experts(experts)
    assert found.layout == "gate_first"
    assert found.activation == "silu"
    assert found.has_plain_loop
    experts.act_fn = nn.Tanh()
    assert recognise_experts(experts) == unserved("activation tanh", is_known_form=True)
    experts.act_fn = nn.Softsign()
    assert recognise_experts(experts) == unserved("activation Softsign", is_known_form=True)
    experts._modules.pop("act_fn")
    experts.act_fn = torch.sin
    assert "gate of their own" in recognise_experts(experts).reason
    experts.act_fn = lambda x: F.silu(x.clamp(max=2.0))
    assert "clamps" in recognise_experts(experts).reason


class SortedExperts(nn.Module):
    """Llama4's: as many rows for every expert, one product for all."""

    def __init__(self, order="gate_first"):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 20))
        self.down_proj = nn.Parameter(torch.randn(3, 10, 8))
        self.order, self.act_fn = order, nn.SiLU()

    def forward(self, x):
        h = torch.bmm(x.view(self.gate_up_proj.shape[0], -1, x.shape[-1]), self.gate_up_proj)
        gate, up = (h[..., ::2], h[..., 1::2]) if self.order == "interleaved" else h.chunk(2, -1)
        return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, x.shape[-1])


class ScaledExperts(SortedExperts):
    def forward(self, x):
        return 2 * super().forward(x)


class FixedWidthExperts(SortedExperts):
    """Reads a size that the probe does not know of."""

    def forward(self, x):
        return super().forward(x.view(-1, 8))


def test_sorted_experts():
    experts = zoo.build("llama4_text").model.layers[1].feed_forward.experts
    assert recognise_experts(experts) == ExpertsSpec("gate_first", "silu", False, is_sorted=True)
    for order in ("gate_first", "interleaved"):
        found = recognise_experts(SortedExperts(order))
        assert found == ExpertsSpec(order, "silu", False, is_sorted=True)
    experts.act_fn = nn.Tanh()
    assert recognise_experts(experts) == unserved("activation tanh", is_known_form=True)
    experts.act_fn = nn.Softsign()
    assert recognise_experts(experts) == unserved("activation Softsign", is_known_form=True)
    experts._modules.pop("act_fn")
    experts.act_fn = torch.sin
    for unknown in (experts, ScaledExperts(), FixedWidthExperts()):
        assert "own forward" in recognise_experts(unknown).reason


@pytest.mark.parametrize("family", zoo.ALL)
def test_rows_say_what_is_recognised(family):
    row = FAMILIES[family]
    recogniser, seen = Recogniser(), set()
    for module in zoo.build(family).modules():
        name = type(module).__name__
        found = recogniser.recognise(module)
        if name in row.ops:
            assert not isinstance(row.check(name, found), Refusal)
            seen.add(name)
    # The others are of another transformers version.
    assert len(seen) >= 3


def test_probes_leave_no_trace():
    model = zoo.build("mixtral").train()
    states = [vars(module).copy() for module in model.modules()]
    torch.manual_seed(7)
    random.seed(7)
    before = torch.get_rng_state(), random.getstate()
    recogniser = Recogniser()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        found = [recogniser.recognise(module) for module in model.modules()]
    assert sum(value is not None for value in found) >= 9
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert all(module.training for module in model.modules())
    assert [vars(module) for module in model.modules()] == states
