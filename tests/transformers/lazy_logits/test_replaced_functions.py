"""A tool in the place of a torch function is called once on deferred logits, as on real ones."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor

from liger_kernels.transformers import apply_liger_kernel
from liger_kernels.transformers.lazy_logits.head import num_fused

_IDS = torch.arange(32).view(2, 16) % 7 + 1


def _lambda(original, calls):
    return lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs) * 1.5


def _wrapping(original, calls):
    return functools.wraps(original)(_lambda(original, calls))


class _Object:
    def __init__(self, original, calls):
        self.call = _lambda(original, calls)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


_USES = {
    "F.cross_entropy": (F, lambda z: F.cross_entropy(z.view(-1, z.shape[-1]), _IDS.view(-1))),
    "F.log_softmax": (F, lambda z: F.log_softmax(z, -1).square().mean()),
    "F.kl_div": (F, lambda z: F.kl_div(z, torch.full_like(z, 0.5))),
    "torch.tanh": (torch, lambda z: torch.tanh(z).square().mean()),
    "torch.flatten": (torch, lambda z: torch.flatten(z, 0, 1).square().mean()),
    "torch.logsumexp": (torch, lambda z: torch.logsumexp(z, -1).mean()),
    "Tensor.float": (Tensor, lambda z: z.float().square().mean()),
    "Tensor.half": (Tensor, lambda z: z.half().float().square().mean()),
    "Tensor.to": (Tensor, lambda z: z.to(torch.float64).square().mean()),
    "Tensor.view": (Tensor, lambda z: z.view(-1, z.shape[-1]).square().mean()),
    "Tensor.square": (Tensor, lambda z: z.square().mean()),
    "Tensor.norm": (Tensor, lambda z: z.norm()),
}


# An object in a class is no method.
_CASES = [(name, _lambda) for name in _USES]
_CASES += [(name, _wrapping) for name in _USES]
_CASES += [(name, _Object) for name in _USES if not name.startswith("Tensor")]


@pytest.mark.parametrize(("name", "make"), _CASES)
def test_a_replaced_function_is_applied_once(name, make, monkeypatch):
    owner, use = _USES[name]
    results = []
    for is_patched in (False, True):
        model, calls = zoo.build("llama").train(), []
        model.loss_function = lambda *, logits, **rest: use(logits)
        if is_patched:
            apply_liger_kernel(model, "fused_linear_cross_entropy")
        with monkeypatch.context() as patch:
            attribute = name.partition(".")[2]
            patch.setattr(owner, attribute, make(getattr(owner, attribute), calls))
            loss = model(input_ids=_IDS, labels=_IDS).loss
            loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad, torch.tensor(len(calls))))
    assert results[0][2] > 0
    for stock, patched in zip(*results, strict=True):
        torch.testing.assert_close(patched, stock, rtol=1e-4, atol=1e-5)


def test_a_replaced_cross_entropy_still_runs_fused(monkeypatch):
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: original(*args, **kwargs) * 2)
    model = zoo.build("llama").train()
    apply_liger_kernel(model, "fused_linear_cross_entropy")
    model(input_ids=_IDS, labels=_IDS)
    assert num_fused(model.lm_head) == 1
