"""Errors of many tensors at once: no worse than eager, for whole modules and whole models.

The rule is that of liger_kernels.compare, which is made for the few tensors of one op. Of the
hundreds of gradients of a model some are zero but for rounding, and in some eager happens to be
luckier than in the next layer. So the scale of a gradient is at least a hundredth of the largest
one's, and what is allowed goes by eager's error in the same tensor of all layers.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping

import torch

from liger_cli.report.verify import TensorPart
from liger_kernels.compare import allowed_error, error_floor

__all__ = ["GRADIENT", "Errors", "errors_of", "judge", "largest", "norm"]

Errors = Mapping[str, float]
Size = Callable[[torch.Tensor], float]

# How the names of gradients begin.
GRADIENT = "gradient of "
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|\s|$)")
_LEAST_SCALE = 0.01
# Where eager's own error is unknown: what a deep model adds up to, in roundings.
_ROUNDINGS = 16


def errors_of(
    values: Mapping[str, torch.Tensor | None], truth: Mapping[str, torch.Tensor], size: Size
) -> dict[str, float]:
    """Return the deviation from the truth of each tensor, over the size of the truth.

    A tensor that is missing, of another shape or not finite has an infinite error.

    Args:
        size: largest, the measure of one module; or norm, that of a whole model, through which a
            rounding of one element may grow until it is all that the largest one says.
    """
    sizes = {name: size(tensor) for name, tensor in truth.items()}
    gradients = [scale for name, scale in sizes.items() if name.startswith(GRADIENT)]
    least = _LEAST_SCALE * max(gradients, default=0.0)
    errors = {}
    for name, wanted in truth.items():
        value = values.get(name)
        if value is None or value.shape != wanted.shape:
            errors[name] = float("inf")
            continue
        scale = max(sizes[name], least) if name.startswith(GRADIENT) else sizes[name]
        difference = size(value.detach().to(wanted.device, wanted.dtype) - wanted)
        error = difference / scale if scale else difference
        # NaN compares false with everything and must never pass.
        errors[name] = error if error == error else float("inf")
    return errors


def largest(tensor: torch.Tensor) -> float:
    """Return the largest element without its sign."""
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


def norm(tensor: torch.Tensor) -> float:
    """Return the root of the sum of the squares."""
    return torch.linalg.vector_norm(tensor.detach()).item()


def judge(
    ours: Errors,
    eager: Errors | None,
    times: float,
    dtype: torch.dtype,
    device: torch.device,
) -> list[TensorPart]:
    """Return each error beside eager's and what is allowed.

    Args:
        ours: Errors by name.
        eager: Those of eager; without them the limit is a fixed one.
        times: How many of eager's errors are allowed.
        dtype: What half an ulp is added of.
        device: Where it ran.
    """
    if eager is None:
        limit = _ROUNDINGS * error_floor(dtype, device)
        return [
            TensorPart(name=name, ours=error, eager=None, allowed=limit, ok=error <= limit)
            for name, error in ours.items()
        ]
    gradients = [error for name, error in eager.items() if name.startswith(GRADIENT)]
    usual = statistics.median(gradients) if gradients else 0.0
    by_kind: dict[str, float] = {}
    for name, error in eager.items():
        least = usual if name.startswith(GRADIENT) else 0.0
        by_kind[_kind(name)] = max(by_kind.get(_kind(name), least), error)
    parts = []
    for name, error in ours.items():
        limit = allowed_error(by_kind[_kind(name)], dtype, device, times)
        parts.append(
            TensorPart(name=name, ours=error, eager=eager[name], allowed=limit, ok=error <= limit)
        )
    return parts


def _kind(name: str) -> str:
    """Return the name without the number of its layer."""
    return _NUMBER.sub("*", name)
