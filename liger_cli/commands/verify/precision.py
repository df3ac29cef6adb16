"""A stock model computed in a higher precision throughout: the truth that errors are against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["in_precision"]


@contextlib.contextmanager
def in_precision(model: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """Widen a module where it stands, so that it is there once, and narrow it again.

    A number comes back from a wider dtype as it was; each tensor gets its own dtype again.
    """
    tensors = {
        id(tensor): (tensor, tensor.dtype)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point()
    }
    try:
        for tensor, _ in tensors.values():
            tensor.data = tensor.data.to(precision)
        kind = next(model.parameters(), torch.empty(0)).device.type
        # Under autocast a product would be rounded to its dtype, whatever its factors are.
        with torch.autocast(kind, enabled=False), _Widens(precision), _plain_experts(model):
            yield
    finally:
        for tensor, own in tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
            tensor.data = tensor.data.to(own)


class _Widens(TorchFunctionMode):
    """Make float32 mean another dtype.

    Norms, softmax and losses of transformers compute in float32 whatever they are given: a truth
    that does so too would round as eager does, and eager seem more exact than it is.
    """

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self._precision = precision

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.float:
            return args[0].to(self._precision)
        args, kwargs = tree_map(self._widen, (args, kwargs or {}))
        return function(*args, **kwargs)

    def _widen(self, value: Any) -> Any:
        return self._precision if value is torch.float32 else value


@contextlib.contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """Experts by a product each: the grouped product of torch knows no fp64."""
    name = "_experts_implementation"
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    own = [(config, getattr(config, name)) for config in configs.values() if hasattr(config, name)]
    try:
        for config, _ in own:
            setattr(config, name, "eager")
        yield
    finally:
        for config, value in own:
            setattr(config, name, value)
