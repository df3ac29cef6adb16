"""The magnitude of DoRA: each output of an adapted linear layer times a trained factor.

    y = m * (x W' + s (x A') B') + bias,   m = magnitude / ||W + s B A||

The norm is of each row of the (N, K) matrix, and a constant of the graph, as peft has it: section
4.3 of the paper. It is computed in fp32 by chunks of rows, so that W + s B A is never whole.
With dropout D, peft drops the input of the whole product that m scales, and the base layer's own
output stays as it is: y = x W' + bias - D(x) W' + m * (D(x) W' + s (D(x) A') B').
Source: Liu et al., DoRA, https://arxiv.org/abs/2402.09353, eq. 5 and 11.
"""

from collections.abc import Iterator
from typing import Any

import torch

# Numbers of a chunk: 32 MB in fp32.
_CHUNK = 2**23


def _chunks(num_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, width))
    return (slice(at, at + step) for at in range(0, num_rows, step))


def direction_norms(weight: torch.Tensor, a: Any, b: Any, scale: float) -> torch.Tensor:
    """Return ||weight + scale * b @ a|| of each row: (N,) in fp32, in fp64 of fp64.

    Args:
        weight: (N, K).
        a: (r, K) of any floating dtype.
        b: (N, r).
        scale: What b @ a is times.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    norms = [
        torch.linalg.vector_norm(torch.addmm(weight[i].to(dtype), b[i], a, alpha=scale), dim=1)
        for i in _chunks(*weight.shape)
    ]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def magnify(z: torch.Tensor, factors: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return z (M, N) times factors (N,) in fp32, plus bias (N,), rounded to z's dtype once."""
    y = torch.empty_like(z)
    if bias is None:
        return torch.mul(z, factors, out=y)
    return torch.addcmul(bias, z, factors, out=y)


def factor_gradients(dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return the gradient (N,) of the factors of z (M, N), sums of dy * z over rows, in fp32."""
    dtype = torch.promote_types(dy.dtype, torch.float32)
    total = dy.new_zeros(dy.shape[1], dtype=dtype)
    for i in _chunks(*dy.shape):
        total += (dy[i].to(dtype) * z[i]).sum(0)
    return total
