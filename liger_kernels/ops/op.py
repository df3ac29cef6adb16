"""Op: the one description of an operation, read by tests, commands and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from liger_kernels.ops.arguments import Option, TensorArgument


@dataclass(frozen=True)
class Case:
    """One set of sizes and options an op is compared on."""

    id: str
    # The meaning of each size is the op's own; its sample function reads them.
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    # True: only on a GPU, since the interpreter or a CPU would take minutes.
    needs_gpu: bool = False


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. Floating tensors that require grad are differentiated."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _no_flops(case: Case) -> int:
    return 0


@dataclass(frozen=True)
class Op:
    """An operation: what computes it, what defines it, what to try it on, its least cost."""

    name: str
    aliases: tuple[str, ...]
    # One line: what is computed and what memory it saves.
    summary: str
    function: Callable[..., Any]
    # Plain torch in the dtype of its arguments; in fp64 it is the truth.
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    # (case, dtype, device, generator) -> arguments; the generator lives on the CPU.
    sample: Callable[[Case, torch.dtype, torch.device, torch.Generator], Sample]
    # (case, dtype) -> least bytes read and written by the forward, by the backward.
    num_bytes: Callable[[Case, torch.dtype], tuple[int, int]]
    # case -> floating-point operations of matrix products, forward and backward together.
    num_flops: Callable[[Case], int] = _no_flops
    # Every parameter of function, in one or the other: its values. The function validates by
    # the same rows; the property tests go through them.
    tensors: tuple[TensorArgument, ...] = ()
    options: tuple[Option, ...] = ()
    # The names of --ops whose modules run it, for an op that is not such a name itself.
    part_of: tuple[str, ...] | None = None

    @property
    def patch_names(self) -> tuple[str, ...]:
        """Return the names in --ops, --require and coverage under which patching runs it."""
        return (self.name,) if self.part_of is None else self.part_of


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Return x in fp32, or as it is in fp64: the precision references compute in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def randn(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    requires_grad: bool = True,
) -> torch.Tensor:
    """Return a normal tensor drawn on the CPU, so that every device gets the same numbers."""
    x = torch.randn(shape, generator=generator, dtype=torch.float32) * scale + shift
    return x.to(device=device, dtype=dtype).requires_grad_(requires_grad)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return x's values in another memory layout, as a new tensor that requires grad.

    "contiguous"; "transposed", whose last dimension is the outermost in memory; or "strided", every
    second row of a wider buffer, in which neither rows nor columns are packed.
    """
    x = x.detach()
    if layout == "transposed":
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    elif layout == "strided":
        num_rows, width = x.shape
        x = x.new_zeros(2 * num_rows, width + 3)[::2, :width].copy_(x)
    else:
        assert layout == "contiguous", layout
    return x.requires_grad_()


def traffic(forward: int, backward: int) -> Callable[[Case, torch.dtype], tuple[int, int]]:
    """Return the num_bytes of an op that reads or writes this many tensors of a case's shape."""

    def num_bytes(case: Case, dtype: torch.dtype) -> tuple[int, int]:
        size = torch.Size(case.shape).numel() * dtype.itemsize
        return forward * size, backward * size

    return num_bytes
