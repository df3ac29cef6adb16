"""Experts are recognised by the numbers they compute; what holds for every kind of module."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from liger_kernels.transformers.patching.families import FAMILIES
from liger_kernels.transformers.recognise import (
    ExpertsSpec,
    Recogniser,
    Refusal,
    recognise_experts,
    unserved,
)


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
