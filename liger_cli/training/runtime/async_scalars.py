"""Scalars that are copied from a device without waiting for it."""

from __future__ import annotations

import torch

__all__ = ["AsyncScalars"]


class AsyncScalars:
    """Scalars of a device that are copied to the host while the device works on.

    `get` waits for the work that they depend on, and not for work that was queued later.

    Args:
        scalars: 0-dim tensors of one device.
    """

    def __init__(self, *scalars: torch.Tensor) -> None:
        values = torch.stack([scalar.detach().float() for scalar in scalars])
        self._event: torch.Event | None = None
        if values.device.type == "cpu":
            self._values = values
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.Event(device=values.device.type)
        self._event.record()

    def get(self) -> list[float]:
        """Return the numbers; wait for the copy if it has not finished."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
