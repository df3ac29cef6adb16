"""RMS and layer norms of remote code, whatever they call their weight, bias and eps."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.recognise import (
    LayerNormSpec,
    NormSpec,
    Refusal,
    recognise_norm,
)

WEIGHTS = ("weight", "g", "gamma", "scale", "alpha", "w")
EPSILONS = ("eps", "epsilon", "variance_epsilon", "norm_eps", "e", "")


class AnyRMSNorm(nn.Module):
    def __init__(self, weight, eps, offset, cast):
        super().__init__()
        self.names, self.offset, self.cast = SimpleNamespace(weight=weight, eps=eps), offset, cast
        setattr(self, weight, nn.Parameter(0.3 * torch.randn(12) + 1 - offset))
        if eps:
            setattr(self, eps, 1e-5)

    def forward(self, x):
        weight, wide = getattr(self, self.names.weight), x.float()
        eps = getattr(self, self.names.eps) if self.names.eps else 1e-5
        x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if self.cast == "before_weight":
            return (weight + self.offset if self.offset else weight) * x_hat.to(x.dtype)
        return ((weight.float() + self.offset) * x_hat).to(x.dtype)


class AnyLayerNorm(nn.Module):
    def __init__(self, weight, bias, is_bias_first):
        super().__init__()
        self.names, self.eps = SimpleNamespace(weight=weight, bias=bias), 1e-5
        for name in (bias, weight) if is_bias_first else (weight, bias):
            setattr(self, name, nn.Parameter(torch.randn(12)))

    def forward(self, x):
        weight, bias = (getattr(self, name) for name in (self.names.weight, self.names.bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)


def _check(norm):
    """Check a patched norm against itself: output and gradients, and that an op ran."""
    torch.manual_seed(0)
    stock, model = copy.deepcopy(norm), nn.Module()
    model.norm, model.config = norm, SimpleNamespace(model_type="remote")
    record = apply_liger_kernel(model, "all")
    x = torch.randn(5, 12)
    found = []
    for module in (model.norm, stock):
        leaf = x.clone().requires_grad_()
        with record.count_calls():
            y = module(leaf)
        if module is not stock:
            assert not record.unused
        grads = torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])
        found.append([y, *grads])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("weight", "eps"), [*itertools.product(WEIGHTS, EPSILONS)])
def test_case_216_an_rms_norm_of_any_names(weight, eps):
    for offset, cast in ((0.0, "before_weight"), (0.0, "after_weight"), (1.0, "after_weight")):
        norm = AnyRMSNorm(weight, eps, offset, cast)
        found = recognise_norm(norm)
        assert isinstance(found, NormSpec), found
        assert (found.weight_attr, found.eps_attr) == (weight, eps)
        assert (found.offset, found.cast) == (offset, cast)
        _check(norm)


@pytest.mark.parametrize(
    ("weight", "bias"), [("weight", "bias"), ("gamma", "beta"), ("g", "b"), ("bias", "weight")]
)
@pytest.mark.parametrize("is_bias_first", [True, False])
def test_case_216_a_layer_norm_of_any_names(weight, bias, is_bias_first):
    norm = AnyLayerNorm(weight, bias, is_bias_first)
    found = recognise_norm(norm)
    assert isinstance(found, LayerNormSpec), found
    assert (found.weight_attr, found.bias_attr) == (weight, bias)
    _check(norm)


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5) * self.g


class ClampedRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma, self.eps = nn.Parameter(torch.ones(12)), 1e-5

    def forward(self, x):
        return x / (x.norm(dim=-1, keepdim=True) * 12**-0.5).clamp(min=self.eps) * self.gamma


class ManyNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(12)) for _ in range(3))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.a * self.b * self.c


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (ScaleNorm, "g (1,)"),
        (ClampedRMSNorm, "gamma (12,)"),
        (ManyNorm, "a (12,), b (12,), c (12,)"),
    ],
)
def test_case_216_a_norm_that_is_not_served_names_its_parameters(make, parts):
    found = recognise_norm(make())
    assert isinstance(found, Refusal)
    assert f"norm of another form with {parts}" in found.reason


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(12))

    def forward(self, x):
        return x * self.gamma


def test_case_216_what_is_no_norm_is_none():
    assert recognise_norm(LayerScale()) is None
    assert recognise_norm(nn.PReLU(12)) is None
