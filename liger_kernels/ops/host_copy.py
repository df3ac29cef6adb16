"""A tensor on its way to the host, which does not wait for what the device computes before it."""

from __future__ import annotations

import torch


class HostCopy:
    """A tensor of the host, and the event after which it holds its numbers."""

    def __init__(self, value: torch.Tensor | int, event: torch.Event | None = None) -> None:
        self.value = value
        self.event = event

    def is_here(self) -> bool:
        """Return whether there is nothing to wait for."""
        return self.event is None or self.event.query()

    def wait(self) -> torch.Tensor | int:
        """Return the value, after waiting for its own copy and nothing else."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        return self.value


def copy_to_host(x: torch.Tensor) -> HostCopy:
    """Start copying a tensor to the host, beside what the device computes next."""
    if x.device.type not in ("cuda", "xpu"):
        return HostCopy(x)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    runtime = torch.get_device_module(x.device)
    event = runtime.Event()
    event.record(runtime.current_stream(x.device))
    return HostCopy(host, event)
