"""Numbers of a device that the host will ask for later."""

from __future__ import annotations

import torch

__all__ = ["OnTheWay"]


class OnTheWay:
    """Scalars that begin their way to the host at once.

    Asking for them waits for the work they depend on, and not for what the device was given since.

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
        """Returns the numbers, waiting for them if they are not there yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
