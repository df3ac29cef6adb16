"""The number of labels of a batch, copied to the host asynchronously, and which tokens have one."""

from __future__ import annotations

import torch

from liger_kernels.ops.losses.options import IGNORE_INDEX, label_argument

# Above this share of the tokens it does not pay to gather those that take part.
_GATHER_BELOW = 0.95


class LabelCount:
    """The number of labels of a batch, on its way to the host."""

    def __init__(self, count: torch.Tensor | int, event: torch.Event | None = None) -> None:
        self._count = count
        self._event = event

    def is_here(self) -> bool:
        """Return whether there is nothing to wait for."""
        return self._event is None or self._event.query()

    def wait(self) -> int:
        """Return the number, after waiting for its own copy and nothing else."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return int(self._count)


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
    count = (target != ignore_index).sum()
    if count.device.type not in ("cuda", "xpu"):
        return LabelCount(count)
    host = torch.empty((), dtype=count.dtype, pin_memory=True)
    host.copy_(count, non_blocking=True)
    runtime = torch.get_device_module(count.device)
    event = runtime.Event()
    event.record(runtime.current_stream(count.device))
    return LabelCount(host, event)


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
