"""Read from the call stack who uses deferred logits: a function, and whose code.

torch names a function to __torch_function__ by looking it up again: a tool that is in its place by
then, and called the original, would be called a second time, and change the result twice.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

__all__ = ["is_stock_loss", "running_function"]

_C_FUNCTIONS = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
# The module of the patched forward.
_FORWARD = "liger_kernels.transformers.lazy_logits.head"
# Packages whose losses have the labels of the forward as targets, shifted or with fewer of them.
_STOCK = ("torch", "transformers", "accelerate", "liger_kernels")


def running_function(function: Any) -> Any:
    """Return the function that called the __torch_function__ from which this is called.

    Args:
        function: As __torch_function__ gets it: what stands in its place in torch by now.
    """
    caller = sys._getframe(2)
    if caller.f_code is not handle_torch_function.__code__:
        return _running_method(function)
    body: Any = caller.f_back
    code = body.f_code
    is_itself = getattr(function, "__code__", None) is code
    if is_itself or code.co_freevars or _package_of(body) != "torch":
        return function
    # Its defaults are not needed: torch passes every argument on.
    return FunctionType(code, body.f_globals, code.co_name)


def is_stock_loss() -> bool:
    """Return whether only code of known packages is between the patched forward and this call.

    Code of others, such as a model's from elsewhere, a hook or a loss function that was replaced,
    may compute a loss with other targets than the labels that the forward was called with.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != _FORWARD:
        if _package_of(frame) not in _STOCK:
            return False
        frame = frame.f_back
    return frame is not None


def _running_method(function: Any) -> Any:
    """Return the C method of a tensor in whose place a function is, or the function."""
    if isinstance(function, _C_FUNCTIONS):
        return function
    names = (name for name, value in vars(Tensor).items() if value is function)
    return getattr(torch._C.TensorBase, next(names, ""), function)


def _package_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
