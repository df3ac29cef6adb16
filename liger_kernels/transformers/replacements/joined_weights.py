"""Parameters of one shape that lie one after another in memory: one tensor without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernels.ops.host_copy import HostCopy


def lay_together(parts: Sequence[nn.Parameter]) -> None:
    """Move the data of parameters into one storage, one after another, unless it is so already.

    They stay the same objects. Those that cannot be one tensor (of several shapes or dtypes, on
    meta, sharded, made in inference mode) stay where they are.
    """
    if not _are_alike(parts) or _are_neighbours(parts):
        return
    # Under inference mode the memory would be of a kind that cannot be trained.
    with torch.inference_mode(False), torch.no_grad():
        buffer = parts[0].new_empty((len(parts), *parts[0].shape))
        for part, place in zip(parts, buffer, strict=True):
            place.copy_(part)
            part.data = place


def lie_together(parts: Sequence[nn.Parameter]) -> bool:
    """Return whether parameters are of one kind and lie one after another in one storage."""
    return _are_alike(parts) and _are_neighbours(parts)


def joined_view(parts: Sequence[nn.Parameter]) -> Tensor | None:
    """Return a view (number, *shape) of parameters that lie together, without a gradient; or None.

    The number of changes of the view is not that of the parameters.
    """
    return _view(parts) if lie_together(parts) else None


def join(parts: Sequence[nn.Parameter], num_rows: HostCopy | None = None) -> Tensor:
    """Return parameters that lie together as one tensor (number, *shape), with their gradients.

    Nothing is copied, in either direction: the gradients are parts of that of the result.

    Args:
        parts: The parameters; each group has as many.
        num_rows: (groups,) integers; the parameters of a group with 0 get no gradient, as those of
            a layer that was not called. None: all get one.
    """
    joined: Tensor = _Join.apply(num_rows, *parts)
    return joined


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_rows: HostCopy | None, *parts: Tensor) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.parts, ctx.versions = parts, [part._version for part in parts]
            ctx.num_rows = num_rows
        return _view(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # What the joined tensor's own count of changes does not see, since they are of its parts.
        if [part._version for part in ctx.parts] != ctx.versions:
            raise RuntimeError(
                "the weight of an expert was modified in place between forward and backward, which "
                "needs it as it was: step the optimizer after backward"
            )
        needed = ctx.needs_input_grad[1:]
        if ctx.num_rows is not None:
            # Started in forward: the copy is here by now.
            are_called = [int(number) > 0 for number in ctx.num_rows.wait().unbind()]
            group_size = len(needed) // len(are_called)
            needed = [each and are_called[i // group_size] for i, each in enumerate(needed)]
        parts = zip(grad.unbind(), needed, strict=True)
        return None, *(part if is_needed else None for part, is_needed in parts)


def _view(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0].detach()
    return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))


def _are_alike(parts: Sequence[Tensor]) -> bool:
    first = parts[0]
    return all(
        type(part) in (Tensor, nn.Parameter)
        and not part.is_meta
        and not part.is_inference()
        and (part.shape, part.dtype, part.device) == (first.shape, first.dtype, first.device)
        and part.is_contiguous()
        for part in parts
    )


def _are_neighbours(parts: Sequence[Tensor]) -> bool:
    first = parts[0]
    address, step = first.data_ptr(), first.numel() * first.element_size()
    # Two storages may be neighbours by chance.
    end = first.storage_offset() * first.element_size() + len(parts) * step
    if first.untyped_storage().nbytes() < end:
        return False
    return all(part.data_ptr() == address + i * step for i, part in enumerate(parts))
