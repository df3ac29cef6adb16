"""Helpers of liger_kernel that other packages import for kernels and wrappers of their own."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from liger_kernels.ops.launcher import next_power_of_2

__all__ = [
    "PEFT_AVAILABLE",
    "FSDPForwardRedirection",
    "calculate_settings",
    "compare_version",
    "ensure_contiguous",
    "is_npu_available",
    "torch_to_triton_dtype",
]

PEFT_AVAILABLE = importlib.util.find_spec("peft") is not None

# Elements of a row that one program of a kernel holds at most, and that a warp takes.
_LARGEST_BLOCK = 65536
_WARP_ELEMENTS = 512


def is_npu_available() -> bool:
    """Return whether torch has an NPU of Ascend."""
    npu: Any = getattr(torch, "npu", None)
    return npu is not None and bool(npu.is_available())


def compare_version(package: str, operator: Callable[[Any, Any], bool], target: str) -> bool:
    """Return operator(installed version of a package, target)."""
    from packaging.version import parse

    return operator(parse(version(package)), parse(target))


def calculate_settings(n: int) -> tuple[int, int]:
    """Compute the block that holds a row of n elements, and the number of warps of its program.

    Raises:
        RuntimeError: A row is longer than a block may be.
    """
    block = next_power_of_2(n)
    if block > _LARGEST_BLOCK:
        raise RuntimeError(f"n must be at most {_LARGEST_BLOCK} for a row in one block, got {n}")
    return block, min(32, max(4, block // _WARP_ELEMENTS))


def ensure_contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of tensors get contiguous ones."""

    def contiguous(value: Any) -> Any:
        return value.contiguous() if isinstance(value, torch.Tensor) else value

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        options = {name: contiguous(value) for name, value in options.items()}
        return function(*map(contiguous, args), **options)

    return wrapped


def torch_to_triton_dtype() -> dict[torch.dtype, Any]:
    """Return the dtype of Triton for each floating dtype of torch that kernels take."""
    import triton.language as tl

    return {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }


class FSDPForwardRedirection:
    """Run a function where the parameters of an FSDP module are whole: in the module's forward."""

    def __call__(
        self, wrapper: nn.Module, function: Callable[..., Any], /, *args: Any, **options: Any
    ) -> Any:
        """Return function(*args, **options), run in the place of the wrapped module's forward."""
        module: Any = wrapper.module
        # Of an instance whose forward was replaced before.
        own = {name: value for name, value in vars(module).items() if name == "forward"}

        def restore() -> None:
            vars(module).pop("forward", None)
            vars(module).update(own)

        def instead(*inner: Any, **inner_options: Any) -> Any:
            restore()
            return function(*inner, **inner_options)

        module.forward = instead
        try:
            return wrapper(*args, **options)
        finally:
            restore()
