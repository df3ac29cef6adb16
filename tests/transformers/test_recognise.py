"""What modules compute, and the look-alikes that must be left alone."""

from __future__ import annotations

import random
import types

import accelerate
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from liger_kernels.transformers.families import FAMILIES
from liger_kernels.transformers.recognise import (
    ExpertsSpec,
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
    """Nemotron-H: a norm of x alone until a gate is given."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


class RoundedScaleNorm(nn.Module):
    """DeepSeek-V4: the scale itself is rounded before the product."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale.to(x.dtype)


class FixedEpsNorm(Norm):
    """Has an eps attribute and does not read it."""

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        )


class ShiftedLayerNorm(nn.LayerNorm):
    """Nemotron: weight + 1."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class OddNorm(Norm):
    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


MID = NormSpec(0.0, "mid", True, "eps")
NORMS = {
    "mid": (Norm, MID),
    "end": (NormEnd, NormSpec(0.0, "end", True, "eps")),
    "torch-layer-norm": (lambda: nn.LayerNorm(12), LayerNormSpec(True, True, "eps")),
    "no-bias": (lambda: nn.LayerNorm(12, bias=False), LayerNormSpec(True, False, "eps")),
    "no-weight": (
        lambda: nn.LayerNorm(12, elementwise_affine=False),
        LayerNormSpec(False, False, "eps"),
    ),
    "two-dimensional": (lambda: nn.LayerNorm((3, 4)), "no kernel"),
    "gated": (GatedNorm, "more than one input"),
    "rounded-scale": (RoundedScaleNorm, "no kernel reproduces"),
    "fixed-eps": (FixedEpsNorm, "no kernel"),
    "shifted-layer-norm": (lambda: ShiftedLayerNorm(12), "no kernel"),
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
    "relu2": (lambda: Mlp(lambda x: F.relu(x).square()), "activation relu2 has no kernel"),
    "quick-gelu": (
        lambda: Mlp(lambda x: x * torch.sigmoid(1.702 * x)),
        "activation quick_gelu has no kernel",
    ),
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
    "dropout": (DropoutMlp, "dropout"),
    "clamped": (ClampedMlp, "clamps"),
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
    return modeling_llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim)[0]


def apply_rotary_backwards(q, k, cos, sin, unsqueeze_dim=1):
    """nanochat: the other sign."""
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)


def apply_rotary_with_sections(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


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
    "backwards": (apply_rotary_backwards, None),
    "last": (apply_rotary_last, None),
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
    namespace["apply_rotary"] = apply_rotary_backwards
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
    assert recognise_experts(experts) == Refusal("activation tanh has no kernel", True)
    experts.act_fn = nn.Softsign()
    assert "gate of their own" in recognise_experts(experts).reason


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
    assert recognise_experts(experts) == Refusal("activation tanh has no kernel", True)
    experts.act_fn = nn.Softsign()
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
