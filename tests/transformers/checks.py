"""Running a model and comparing two runs: loss, logits and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Run:
    """One call of a model, and its backward if there was a loss to train on."""

    loss: float | None
    logits: Tensor | None
    grads: dict[str, Tensor] = field(default_factory=dict)


def run(model: nn.Module, inputs: dict[str, Any], *, backward: bool | None = None) -> Run:
    """Call a model; train modes also run backward. Gradients of an earlier run are dropped."""
    model.zero_grad(set_to_none=True)
    is_backward = model.training if backward is None else backward
    with torch.set_grad_enabled(is_backward):
        out = model(**inputs)
    if is_backward and out.loss is not None:
        out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    # Training logits are made only when read, which would hide that the loss did not need them.
    logits = None if is_backward and out.loss is not None else out.logits.detach()
    return Run(None if out.loss is None else out.loss.item(), logits, grads)


def assert_same(ours: Run, stock: Run, tolerance: float = 2e-5) -> None:
    """Check two runs within `tolerance` of each tensor's largest element.

    Some gradients are zero but for rounding (a bias that softmax does not feel): those are measured
    against the largest gradient of the model.
    """
    assert (ours.loss is None) == (stock.loss is None)
    if stock.loss is not None and ours.loss is not None:
        assert abs(ours.loss - stock.loss) <= tolerance * abs(stock.loss)
    assert (ours.logits is None) == (stock.logits is None)
    if stock.logits is not None and ours.logits is not None:
        assert type(ours.logits) is Tensor
        assert ours.logits.dtype == stock.logits.dtype
        assert _distance(ours.logits, stock.logits) <= tolerance
    assert ours.grads.keys() == stock.grads.keys()
    largest = max((g.abs().max().item() for g in stock.grads.values()), default=0.0)
    for name, wanted in stock.grads.items():
        got = ours.grads[name]
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
        assert _distance(got, wanted, floor=0.05 * largest) <= tolerance, name


def _distance(value: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    scale = max(wanted.abs().max().item(), floor, 1e-30)
    return (value.double() - wanted.double()).abs().max().item() / scale


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Return every module's class and attributes; containers are copied one level deep."""
    return {
        name: (type(module), {k: _shallow(v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


def _shallow(value: Any) -> Any:
    if type(value) is Tensor:
        # Positions that a model keeps between calls; == would compare them number by number.
        return value.tolist()
    return dict(value) if isinstance(value, dict) else value
