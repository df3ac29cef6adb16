"""Experts are recognised by the numbers they compute; what holds for every kind of module."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.recognise import (
    ExpertsSpec,
    MoeBlockSpec,
    Recogniser,
    Refusal,
    recognise_experts,
    recognise_moe_block,
    unserved,
)


@pytest.mark.skipif(not zoo.IS_V5, reason="version 4 has one MLP an expert")
def test_experts_layouts():
    experts = zoo.build("mixtral").model.layers[0].mlp.experts
    found = recognise_experts(experts)
    assert found.layout == "gate_first"
    assert found.activation == "silu"
    assert not found.is_transposed
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


class SortedBlock(nn.Module):
    """Routes as Llama4 does, with the experts, router and shared expert of its block."""

    def __init__(self, block, experts=None):
        super().__init__()
        self.hidden_dim, self.top_k = block.hidden_dim, block.top_k
        self.router, self.shared_expert = block.router, block.shared_expert
        self.experts = block.experts if experts is None else experts

    def forward(self, x):
        x = x.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)
        y = self.experts((x * scores.t()[..., None]).flatten(0, 1))
        return self.shared_expert(x) + y.view(scores.shape[1], *x.shape).sum(0), logits


class TwiceSharedBlock(SortedBlock):
    """Adds the shared expert twice."""

    def forward(self, x):
        y, logits = super().forward(x)
        return y + self.shared_expert(x.reshape(-1, self.hidden_dim)), logits


def test_blocks_of_sorted_experts():
    block = zoo.build("llama4_text").model.layers[1].feed_forward
    experts = block.experts
    assert recognise_moe_block(block) == MoeBlockSpec("gate_first", "silu")
    for order in ("gate_first", "interleaved"):
        found = recognise_moe_block(SortedBlock(block, SortedExperts(order)))
        assert found == MoeBlockSpec(order, "silu")
    # Alone they are not the op's: what comes in is sorted already.
    assert "block of another form" in recognise_experts(experts).reason
    assert recognise_moe_block(TwiceSharedBlock(block)) is None
    for act_fn, name in ((nn.Tanh(), "tanh"), (nn.Softsign(), "Softsign")):
        experts.act_fn = act_fn
        assert recognise_experts(experts) == unserved(f"activation {name}", is_known_form=True)
        assert recognise_moe_block(block).reason == recognise_experts(experts).reason
    experts._modules.pop("act_fn")
    experts.act_fn = torch.sin
    for unknown in (experts, ScaledExperts(), FixedWidthExperts()):
        assert "own forward" in recognise_experts(unknown).reason
        assert recognise_moe_block(SortedBlock(block, unknown)) is None


@pytest.mark.skipif(not zoo.IS_V5, reason="version 4 has one MLP an expert")
def test_clamped_experts_with_biases():
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=12, num_local_experts=3, num_hidden_layers=1
    )
    experts = GptOssExperts(config)
    assert recognise_experts(experts) == ExpertsSpec(
        "interleaved", "gpt_oss", True, True, "alpha", "limit"
    )
    experts.limit = 3.0
    assert recognise_experts(experts).limit_attr == "limit"
    doubled = type("Doubled", (GptOssExperts,), {"_apply_gate": lambda s, x: 2 * x[..., ::2]})
    assert "gate of their own" in recognise_experts(doubled(config)).reason


@pytest.mark.skipif(not zoo.IS_V5, reason="version 4 has one MLP an expert")
def test_experts_whose_loop_or_implementation_is_another():
    experts = zoo.build("mixtral").model.layers[0].mlp.experts
    experts.config = copy.copy(experts.config)
    experts.config._experts_implementation = "sonicmoe"
    found = recognise_experts(experts)
    assert found.is_known_form
    assert "'sonicmoe' was chosen" in found.reason
    experts.config._experts_implementation = "eager"
    cls = type(experts)

    def loop(self, hidden, ids, weights):
        return 2 * cls.forward.__wrapped__(self, hidden, ids, weights)

    def forward(self, *args):
        return loop(self, *args)

    forward.__wrapped__ = loop
    experts.__class__ = type("Doubled", (cls,), {"forward": forward})
    assert "loop computes something else" in recognise_experts(experts).reason


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
