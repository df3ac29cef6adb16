"""Optimizers that look at a whole matrix, for matrices of which each process has a shard.

AdamW and SGD go element by element and take shards as they are. Adafactor keeps means of rows and
columns, and muon makes the update of a matrix orthogonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from transformers.optimization import Adafactor

__all__ = ["ShardedAdafactor", "ShardedMuon"]


class ShardedAdafactor(Adafactor):
    """Adafactor whose means of rows and columns are DTensors."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter.grad, DTensor) and not self.state[parameter]:
                    self.state[parameter] = _first_state(parameter.grad, group)
        return super().step(closure)

    @staticmethod
    def _rms(tensor: Tensor) -> Tensor:
        return _reduced(tensor.norm(2)) / tensor.numel() ** 0.5

    @staticmethod
    def _approx_sq_grad(exp_avg_sq_row: Tensor, exp_avg_sq_col: Tensor) -> Tensor:
        mean = _reduced(exp_avg_sq_row.sum(dim=-1, keepdim=True)) / exp_avg_sq_row.shape[-1]
        rows = (exp_avg_sq_row / mean).rsqrt().unsqueeze(-1)
        return rows * exp_avg_sq_col.unsqueeze(-2).rsqrt()


def _first_state(grad: DTensor, group: dict[str, Any]) -> dict[str, Any]:
    """Return the state that Adafactor would make of plain tensors."""
    zeros = torch.zeros_like(grad, dtype=torch.float32)
    state: dict[str, Any] = {"step": 0, "RMS": 0}
    if group["beta1"] is not None:
        state["exp_avg"] = zeros
    if grad.ndim < 2:
        state["exp_avg_sq"] = torch.zeros_like(zeros)
    else:
        state["exp_avg_sq_row"] = _reduced(zeros.sum(dim=-1))
        state["exp_avg_sq_col"] = _reduced(zeros.sum(dim=-2))
    return state


def _reduced(x: Tensor) -> Tensor:
    """Return a tensor whose partial sums over processes are summed."""
    if not isinstance(x, DTensor):
        return x
    placements = [Replicate() if p.is_partial() else p for p in x.placements]
    return x.redistribute(placements=placements)


class ShardedMuon(torch.optim.Muon):
    """Muon that gathers the update of one matrix at a time; every process makes it orthogonal."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad, state, momentum = parameter.grad, self.state[parameter], group["momentum"]
        assert isinstance(grad, DTensor)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        average = state["momentum_buffer"]
        average.lerp_(grad, 1 - momentum)
        update: Any = grad.lerp(average, momentum) if group["nesterov"] else average
        whole = _zeropower_via_newtonschulz(
            update.full_tensor(), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        # Every process has it: each takes its part.
        part = distribute_tensor(whole, grad.device_mesh, grad.placements, src_data_rank=None)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(part, alpha=-rate)
