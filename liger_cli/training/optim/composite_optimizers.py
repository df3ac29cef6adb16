"""Optimizers around other optimizers: several as one, and float32 copies of half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["CompositeOptimizer", "MasterWeights"]


class CompositeOptimizer(torch.optim.Optimizer):
    """Optimizers of different parameters that step as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        # Schedules look up the learning rate here.
        self.defaults = dict(parts[0].defaults)
        self._share_groups()

    def _share_groups(self) -> None:
        # The very dictionaries of the parts: the schedule writes the learning rate into them.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, values in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(values)
        self._share_groups()


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of float32 copies, which are rounded into parameters of half precision.

    So an update that is too small to change a bfloat16 value is kept, and adds up.

    Args:
        inner: The optimizer of the parameters, before its first step.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._inner = inner
        self._parameters: list[nn.Parameter] = []
        self._masters: list[nn.Parameter] = []
        super().__init__([dict(group) for group in inner.param_groups], {})
        self.defaults = dict(inner.defaults)
        for group in inner.param_groups:
            group["params"] = [self._master(parameter) for parameter in group["params"]]
        self._share_groups()

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        self._parameters.append(parameter)
        self._masters.append(nn.Parameter(parameter.detach().float()))
        return self._masters[-1]

    def _share_groups(self) -> None:
        self.param_groups = self._inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter.grad is not None:
                # One after the other, so that never both are there of all.
                master.grad, parameter.grad = parameter.grad.float(), None
        self._inner.step()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            parameter.copy_(master)
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        masters = [master.detach() for master in self._masters]
        return {"inner": self._inner.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict["inner"])
        self._share_groups()
        for master, values in zip(self._masters, state_dict["masters"], strict=True):
            master.copy_(values)
