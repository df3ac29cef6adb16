"""The number of labels of a batch, copied to the host asynchronously, and which tokens have one."""

from __future__ import annotations

import torch

from liger_kernels.ops.host_copy import HostCopy, copy_to_host
from liger_kernels.ops.losses.options import IGNORE_INDEX, label_argument

# Above this share of the tokens it does not pay to gather those that take part.
_GATHER_BELOW = 0.95


class LabelCount(HostCopy):
    """The number of labels of a batch, on its way to the host."""

    def wait(self) -> int:
        """Return the number, after waiting for its own copy and nothing else."""
        return int(super().wait())


def count_labels(target: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> LabelCount:
    """Return the number of labels in target that are not ignore_index, without waiting for it.

    Call it as soon as the labels are on their device: the copy to the host then runs beside the
    model. In a CUDA graph or compiled code nothing can be waited for: there it is target's size.

    Raises:
        ValueError: target is no tensor.
    """
    if not isinstance(target, torch.Tensor):
        raise label_argument("target").error(target)
    if target.is_meta or torch.compiler.is_compiling() or is_capturing(target):
        return LabelCount(target.numel())
    count = copy_to_host((target != ignore_index).sum())
    return LabelCount(count.value, count.event)


def is_capturing(x: torch.Tensor) -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def rows_with_labels(
    label: torch.Tensor, ignore_index: int, count: LabelCount
) -> torch.Tensor | None:
    """Return the indices of the tokens to compute, or None for all; count is an upper bound.

    They are the first in an order that puts labels before ignored tokens. So the host need not know
    the exact number, and no token is there twice.
    """
    most = _GATHER_BELOW * label.numel()
    if count.is_here() and count.wait() > most:
        return None
    # Started before the wait, which would leave the GPU idle until the host is awake again.
    order = (label == ignore_index).to(torch.uint8).argsort(stable=True)
    bound = count.wait()
    return None if bound > most else order[:bound]
