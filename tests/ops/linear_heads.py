"""Heads and labels for the fused loss, its gradients and the true ones."""

from __future__ import annotations

import pytest
import torch

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import (
    backend,
)
from liger_kernels.ops.fused_linear_cross_entropy import (
    fused_linear_cross_entropy_ref,
)

HALF_DTYPES = (torch.float16, torch.bfloat16)


FP32 = FLOOR[torch.float32]


not_interpreted = pytest.mark.skipif(
    backend.INTERPRETED, reason="the interpreter copies what kernels are given"
)


plain_torch = pytest.mark.skipif(backend.INTERPRETED, reason="slow in the interpreter")


def make(*shape: int, seed: int, spread: float = 1.0, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    return x.to(device=device, dtype=dtype).requires_grad_()


def head(tokens: int, width: int, vocab: int, *, dtype=torch.float32, device="cpu"):
    """hidden, weight and bias, all leaves that require grad, with logits of about one unit."""
    return [
        make(tokens, width, seed=1, dtype=dtype, device=device),
        make(vocab, width, seed=2, spread=width**-0.5, dtype=dtype, device=device),
        make(vocab, seed=3, dtype=dtype, device=device),
    ]


def labels(*shape: int, vocab: int, seed: int = 4, device="cpu", ignored: int = 0):
    target = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
    target.view(-1)[:ignored] = -100
    return target.to(device)


def run(function, tensors, target, dy=None, dtype=None, **options):
    """The loss and the gradients of hidden, weight and bias; fresh leaves keep the flags."""
    hidden, weight, bias = (
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for t in tensors
    )
    loss = function(hidden, weight, target, bias=bias, **options)
    if loss.requires_grad:
        loss.backward(None if dy is None else dy.to(loss.dtype))
    return [loss.detach(), *(None if t is None else t.grad for t in (hidden, weight, bias))]


def truth(tensors, target, dy=None, **options):
    if "class_weight" in options:
        options["class_weight"] = options["class_weight"].double()
    return run(fused_linear_cross_entropy_ref, tensors, target, dy, torch.float64, **options)


def assert_close(ours, wanted, limit: float) -> None:
    for value, true in zip(ours, wanted, strict=True):
        assert (value is None) == (true is None)
        if value is not None:
            assert error(value, true) < limit
