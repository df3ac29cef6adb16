"""A patched module computes with what it holds at the call: changes after the patch are seen."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import zoo
from checks import assert_same, run
from torch import nn

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.recognise import recognise_mlp, recognise_norm
from liger_kernels.transformers.recognise.specs import Refusal


def _layer(model):
    return model.model.layers[0]


def _set(path, value):
    """Return a change: set the attribute at a path to value(), the same in both models."""

    def change(model):
        owner, _, name = path.rpartition(".")
        torch.manual_seed(5)
        setattr(model.get_submodule(owner), name, value())

    return change


def _register(model):
    _layer(model).mlp._modules["act_fn"] = nn.Tanh()


def _lora(path):
    """Return a change: a linear layer becomes one of rank 2 more."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.a = nn.Linear(base.in_features, 2, bias=False)
            self.b = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    def change(model):
        owner, _, name = path.rpartition(".")
        torch.manual_seed(5)
        parent = model.get_submodule(owner)
        setattr(parent, name, Lora(getattr(parent, name)))

    return change


def _config(**values):
    def change(model):
        for name, value in values.items():
            setattr(model.config, name, value)

    return change


def _linear(*sizes, bias=True):
    return lambda: nn.Linear(*sizes, bias=bias)


def _weights(*shape):
    return lambda: nn.Parameter(torch.rand(shape) + 0.5)


_MLP, _NORM = "model.layers.0.mlp", "model.layers.1.input_layernorm"
# (family, change, whether an op still runs in the module that was changed; None: not asked)
CHANGES = {
    "activation": ("llama", _set(f"{_MLP}.act_fn", nn.PReLU)),
    "activation-of-experts": ("mixtral", _set(f"{_MLP}.experts.act_fn", nn.PReLU)),
    "activation-of-fused-gate": ("phi3", _set(f"{_MLP}.activation_fn", nn.PReLU)),
    "activation-geglu": ("gemma2", _set(f"{_MLP}.act_fn", nn.GELU)),
    "activation-llama4": (
        "llama4_text",
        _set("model.layers.0.feed_forward.activation_fn", nn.PReLU),
    ),
    "activation-llama4-experts": (
        "llama4_text",
        _set("model.layers.1.feed_forward.experts.act_fn", nn.PReLU),
    ),
    "activation-in-modules": ("llama", _register),
    "activation-as-function": ("qwen2", _set(f"{_MLP}.act_fn", lambda: nn.Identity())),
    "gate": ("llama", _set(f"{_MLP}.gate_proj", _linear(32, 48))),
    "gate-lora": ("llama", _lora(f"{_MLP}.gate_proj")),
    "down-lora": ("qwen3", _lora(f"{_MLP}.down_proj")),
    "fused-gate": ("phi3", _set(f"{_MLP}.gate_up_proj", _linear(32, 96))),
    "up-sequential": (
        "llama",
        _set(f"{_MLP}.up_proj", lambda: nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 48))),
    ),
    "expert-weights": ("mixtral", _set(f"{_MLP}.experts.down_proj", _weights(4, 32, 48))),
    "norm-weight": ("llama", _set(f"{_NORM}.weight", _weights(32))),
    "norm-weight-scalar": ("llama", _set(f"{_NORM}.weight", _weights(1))),
    "norm-weight-2-D": ("gemma2", _set(f"{_NORM}.weight", _weights(1, 32))),
    "final-norm-eps": ("llama", _set("model.norm.variance_epsilon", lambda: 0.3)),
    "eps-as-tensor": ("llama", _set("model.norm.variance_epsilon", lambda: torch.tensor(0.3))),
    "eps-gemma": ("gemma2", _set(f"{_NORM}.eps", lambda: 0.3)),
    "eps-olmo": (
        "olmo2",
        _set("model.layers.0.post_attention_layernorm.variance_epsilon", lambda: 0.3),
    ),
    "norm-removed": ("llama", _set("model.layers.0.post_attention_layernorm", nn.Identity)),
    "norm-replaced": (
        "llama",
        _set("model.layers.0.post_attention_layernorm", lambda: nn.LayerNorm(32)),
    ),
    "mlp-replaced": ("llama", _set(_MLP, _linear(32, 32))),
    "config-activation": ("llama", _config(hidden_act="relu", rms_norm_eps=0.3)),
    "config-softcap": ("gemma2", _config(final_logit_softcapping=1.0)),
    "config-no-softcap": ("gemma2", _config(final_logit_softcapping=None)),
    "config-scaling": ("granite", _config(logits_scaling=2.0)),
    "config-attention": ("llama", _config(_attn_implementation="eager")),
    "scaling": ("llama", _set("model.layers.0.self_attn.scaling", lambda: 0.9)),
    "head": ("llama", _set("lm_head", _linear(32, 128, bias=False))),
    "head-bias": ("llama", _set("lm_head", _linear(32, 128))),
    "head-lora": ("llama", _lora("lm_head")),
}


# Case 202: what stock would do with the same change; another error is none of ours.
@pytest.mark.parametrize("name", CHANGES)
def test_case_202_a_change_after_the_patch_is_seen(name):
    family, change = CHANGES[name]
    if not zoo.IS_V5 and "expert" in name:
        pytest.skip("version 4 has one MLP an expert")
    inputs = zoo.text_inputs()
    stock, ours = zoo.build(family).train(), zoo.build(family).train()
    before = run(stock, inputs)
    apply_liger_kernel(ours, "all")
    assert_same(run(ours, inputs), before)
    change(stock)
    change(ours)
    after = run(stock, inputs)
    assert_same(run(ours, inputs), after)
    # The change shows, but for settings that are only read when a model is built.
    if name not in ("config-activation", "config-attention"):
        assert after.loss != before.loss
    assert_same(run(ours.eval(), inputs), run(stock.eval(), inputs))


def test_case_202_a_setting_of_an_activation():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
            self.down_proj, self.act = nn.Linear(12, 8), nn.GELU()

        def forward(self, x):
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

    ours = _holder(Mlp)
    stock = copy.deepcopy(ours)
    _patch(ours)
    for model in (ours, stock):
        model.part.act.approximate = "tanh"
    x = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.part(x), stock.part(x))


def _holder(make):
    torch.manual_seed(0)
    model = nn.Module()
    model.part, model.config = make(), SimpleNamespace(model_type="remote")
    return model


def _patch(model):
    record = apply_liger_kernel(model, "all")
    assert [patch.name for patch in record.patches] == ["part"]
    return record


class FunctionMlp(nn.Module):
    """Remote code: the activation is a function, no module."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes) for sizes in ((8, 12), (12, 8), (8, 12)))
        self.act = F.silu

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class FlagNorm(nn.Module):
    """Remote code: a flag and a method decide what is added to the weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.epsilon, self.adds_one = nn.Parameter(torch.rand(8)), 1e-5, False

    def scale(self):
        return 1 + self.weight if self.adds_one else self.weight

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.scale() * (wide * scale).to(x.dtype)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(FunctionMlp, "act", torch.tanh), (FlagNorm, "adds_one", True), (FlagNorm, "epsilon", 0.5)],
)
@pytest.mark.parametrize("copies", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_case_202_attributes_of_remote_code(make, name, value, copies):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    ours = _holder(make)
    stock = copy.deepcopy(ours)
    record = _patch(ours)
    if copies is None:
        with record.count_calls():
            ours.part(x)
        assert not record.unused
    else:
        ours = copies(ours)
    for model in (ours, stock):
        setattr(model.part, name, value)
    torch.testing.assert_close(ours.part(x), stock.part(x))


def test_case_202_a_copy_still_runs_the_op():
    record = _patch(_holder(FlagNorm))
    for copies in (copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))):
        twin = copies(record)
        with twin.count_calls():
            twin.model.part(torch.randn(4, 8))
        assert not twin.unused


class ConfigNorm(FlagNorm):
    """Remote code: eps is read off the configuration, which may change, in every call."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(norm_eps=1e-6)

    def forward(self, x):
        eps = self.config.norm_eps
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class ConfigMlp(FunctionMlp):
    """Remote code: the activation is named by the configuration, in every call."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_act="silu")

    def forward(self, x):
        return self.w2(getattr(F, self.config.hidden_act)(self.w1(x)) * self.w3(x))


def test_case_202_modules_that_ask_their_configuration_are_left_alone():
    for recognise, make in ((recognise_norm, ConfigNorm), (recognise_mlp, ConfigMlp)):
        assert isinstance(recognise(make()), Refusal)
