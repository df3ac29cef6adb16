"""Arguments of a norm and the gradients of a call."""

from __future__ import annotations

import itertools

import torch

from liger_kernels.ops.registry import OPS

NORMS = ("rms_norm", "layer_norm")


def make(*shape: int, seed: int, dtype=torch.float32, device="cpu", shift: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + shift
    return x.to(device=device, dtype=dtype).requires_grad_()


def arguments(norm: str, *shape: int, device, dtype=torch.float32):
    """x and all parameters the norm can have, each a leaf that requires grad."""
    x = make(*shape, seed=1, dtype=dtype, device=device)
    weight = make(shape[-1], seed=2, dtype=dtype, device=device, shift=1.0)
    bias = make(shape[-1], seed=3, dtype=dtype, device=device)
    return [x, weight] if norm == "rms_norm" else [x, weight, bias]


def function_of(norm: str):
    return OPS[norm].function


def gradients(function, tensors, dy):
    """Gradients of function(*tensors) in direction dy, by fresh leaves that keep the flags."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    y = function(*leaves)
    y.backward(dy)
    return y.detach(), [leaf.grad for leaf in leaves]


def flags_of(num: int):
    return [flags for flags in itertools.product((True, False), repeat=num) if any(flags)]
