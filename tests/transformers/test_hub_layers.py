"""The layers for Hugging Face's `kernels`: their rules, and models that they are bound to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama import modeling_llama

from liger_kernels.transformers import hub_layers
from liger_kernels.transformers.hub_layers import LAYERS, RMSNorm, RMSNormGated, RotaryPosEmb
from liger_kernels.transformers.replacements import attention


@pytest.mark.parametrize("layer", sorted(set(LAYERS.values()), key=lambda cls: cls.__name__))
def test_layers_keep_the_rules_of_kernels(layer):
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)}
    stock = {name for name, _ in inspect.getmembers(nn.Module)}
    assert members - stock == {"can_torch_compile", "has_backward"}


def bind(model: nn.Module) -> int:
    """Give each norm the forward of our layer, as kernelize does; return how many there are."""
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = MethodType(RMSNorm.forward, norm)
    return len(norms)


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    loss = model(**zoo.text_inputs()).loss
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)]


# They differ in offset, in rounding, in the name of eps and in width.
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_norms_train_as_stock_ones(family, dtype, monkeypatch):
    model = zoo.build(family).to(dtype).train()
    stock = loss_and_gradients(model)
    calls = []
    op = hub_layers.rms_norm
    monkeypatch.setattr(hub_layers, "rms_norm", lambda *a, **k: calls.append(1) or op(*a, **k))
    num_norms = bind(model)
    ours = loss_and_gradients(model)
    assert len(calls) == num_norms >= 5
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    for got, wanted in zip(ours, stock, strict=True):
        torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)


def test_a_gated_norm_is_that_of_its_host(monkeypatch):
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    norm = modeling.Qwen3NextRMSNormGated(16, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x, gate = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    wanted = norm(x, gate)
    norm.forward = MethodType(RMSNormGated.forward, norm)
    calls = []
    op = hub_layers.gated_rms_norm
    monkeypatch.setattr(
        hub_layers, "gated_rms_norm", lambda *a, **k: calls.append(1) or op(*a, **k)
    )
    got = norm(x, gate)
    assert len(calls) == 1
    torch.testing.assert_close(got, wanted)
    leaves = (x, gate, norm.weight)
    dy = torch.randn(3, 16)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(wanted, leaves, dy)
    )


def as_module(function: Callable[..., Any]) -> nn.Module:
    """Return a function as a module, as `kernels` makes one of a function that it marks."""

    class Func(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    Func.forward.__signature__ = inspect.Signature([own, *parameters])
    return Func()


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
# By halves; numbers side by side.
@pytest.mark.parametrize("modeling", [modeling_llama, modeling_glm4])
def test_a_rotation_is_that_of_its_host(modeling, unsqueeze_dim, monkeypatch):
    function = modeling.apply_rotary_pos_emb
    host = as_module(function)
    host.forward = MethodType(RotaryPosEmb.forward, host)
    shapes = ((2, 4, 6, 8), (2, 2, 6, 8)) if unsqueeze_dim == 1 else ((2, 6, 4, 8), (2, 6, 2, 8))
    q, k = (torch.randn(shape, requires_grad=True) for shape in shapes)
    angles = torch.randn(2, 6, 4).repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    calls = []
    op = attention.rope
    monkeypatch.setattr(attention, "rope", lambda *a, **k: calls.append(1) or op(*a, **k))
    sides = []
    for rotate in (host, function):
        turned = rotate(q, k, *tables, unsqueeze_dim=unsqueeze_dim)
        dy = [torch.ones_like(x) * torch.arange(8.0) for x in turned]
        sides.append((*turned, *torch.autograd.grad(turned, (q, k), dy)))
    torch.testing.assert_close(*sides)
    assert len(calls) == 1


def test_a_host_of_another_form_runs_its_own_code():
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, hidden_states: Tensor) -> Tensor:
            return torch.sin(hidden_states) * self.weight

    norm, x = OddRMSNorm(), torch.randn(2, 8)
    wanted = norm(x)
    norm.forward = MethodType(RMSNorm.forward, norm)
    assert torch.equal(norm(x), wanted)

    def shifted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return q + 1, k + 1

    host = as_module(shifted)
    host.forward = MethodType(RotaryPosEmb.forward, host)
    q = torch.randn(1, 2, 3, 8)
    angles = torch.randn(1, 3, 8)
    assert torch.equal(host(q, q, angles.cos(), angles.sin())[0], q + 1)
