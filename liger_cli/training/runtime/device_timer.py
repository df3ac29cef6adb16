"""The time that a function takes, and the part of it in which a GPU works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from liger_cli.common.measure import synchronize

__all__ = ["DeviceTimer", "device_timer"]


class DeviceTimer(Protocol):
    """Times a function on a device."""

    def elapsed(self, function: Callable[[], object]) -> float:
        """Run a function and return the seconds until the device has done its work."""

    def busy(self, function: Callable[[], object]) -> float:
        """Run a function and return the seconds of its kernels, 0 where none can be seen."""


def device_timer(device: torch.device) -> DeviceTimer | None:
    """Return the timer of a CUDA device; None of another one, whose work is not measured."""
    return _CudaTimer(device) if device.type == "cuda" else None


class _CudaTimer:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def elapsed(self, function: Callable[[], object]) -> float:
        synchronize(self._device)
        begin = time.perf_counter()
        function()
        synchronize(self._device)
        return time.perf_counter() - begin

    def busy(self, function: Callable[[], object]) -> float:
        # The CPU's activities would slow the host down, and are not asked about.
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
            synchronize(self._device)
        microseconds = sum(
            event.time_range.elapsed_us()
            for event in profiler.events() or ()
            if event.device_type.name == "CUDA"
            # Names given to a range of kernels are events as well.
            and not getattr(event, "is_user_annotation", False)
        )
        return float(microseconds) * 1e-6
