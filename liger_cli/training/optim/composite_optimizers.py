"""Optimizers around other optimizers: several as one, and float32 copies of half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["CompositeOptimizer", "MasterWeights", "state_tree"]


class CompositeOptimizer(torch.optim.Optimizer):
    """Optimizers of different parameters that step as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        # Schedules look up the learning rate here.
        self.defaults = dict(parts[0].defaults)
        self._share_groups()

    @property
    def parts(self) -> list[torch.optim.Optimizer]:
        return self._parts

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

    @property
    def inner(self) -> torch.optim.Optimizer:
        return self._inner

    @property
    def masters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Parameters of half precision, each with its float32 copy."""
        return list(zip(self._parameters, self._masters, strict=True))

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


def state_tree(
    optimizer: Any,
    of_plain: Callable[[torch.optim.Optimizer], Any],
    of_master: Callable[[nn.Parameter, nn.Parameter], Any],
) -> dict[str, Any]:
    """Return a state that load_state_dict takes, put together from those of the plain optimizers.

    Args:
        optimizer: A plain one, or one of this module.
        of_plain: Returns the state of a plain optimizer; they are asked in a fixed order.
        of_master: Returns the value of a float32 copy, from the parameter and the copy.
    """
    if isinstance(optimizer, CompositeOptimizer):
        return {"parts": [state_tree(part, of_plain, of_master) for part in optimizer.parts]}
    if isinstance(optimizer, MasterWeights):
        inner = state_tree(optimizer.inner, of_plain, of_master)
        return {"inner": inner, "masters": [of_master(*pair) for pair in optimizer.masters]}
    return dict(of_plain(optimizer))
