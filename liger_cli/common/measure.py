"""Time and memory of steps. The only module that reads memory statistics.

Peak memory is the allocator's on a CUDA or XPU device: what tensors took, without the context and
the libraries. On a CPU it is the resident size of the whole process, Python and libraries included,
sampled by a thread; a peak shorter than the sampling interval can be missed.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "PeakMemory",
    "StepTime",
    "StepTimer",
    "free_cached_memory",
    "median_after_warm_up",
    "synchronize",
    "transient_bytes",
]

# Short against a training step; reading the size takes about 20 us.
_SAMPLE_INTERVAL_S = 0.005


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_cached_memory() -> None:
    """Free what reference cycles hold, as those of a failed graph do, and what allocators cache."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def median_after_warm_up(values: Sequence[float]) -> float:
    """Return the median without the first value, which holds compilation, if there are others."""
    return statistics.median(values[1:] or values)


def transient_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Return how far a call raises the allocator's memory at most, or None on a CPU.

    What the call returns and leaves behind counts. A CPU has no allocator that knows, and the
    resident size of a process is too coarse for one call.
    """
    allocator: Any = getattr(torch, device.type, None)
    if not hasattr(allocator, "max_memory_allocated"):
        return None
    synchronize(device)
    allocator.reset_peak_memory_stats(device)
    before = int(allocator.memory_allocated(device))
    function()
    synchronize(device)
    return int(allocator.max_memory_allocated(device)) - before


@dataclass(frozen=True)
class StepTime:
    """Wall time of one step and the tokens of it that went through the model a second."""

    step_ms: float
    tokens_per_s: float


class StepTimer:
    """A clock of steps from the end of one to the end of the next, the device's work included.

    A step ends when the host has read its loss. Nothing else waits for the device, so the work that
    it still does for one step (the optimizer's part) counts in the next; all steps together take as
    long as the clock on the wall says.

    Args:
        device: Where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = 0.0

    def start(self) -> None:
        """Restart the clock once the device is idle: before the first step and after a pause."""
        synchronize(self._device)
        self._last = time.perf_counter()

    def lap(self, num_tokens: int) -> StepTime:
        """End a step and return its time."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return StepTime(step_ms=seconds * 1e3, tokens_per_s=num_tokens / seconds)


class PeakMemory:
    """Peak memory since its `with` block began or since `reset`; read it inside or afterwards.

    Args:
        device: The device whose memory is meant; for a CPU that of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocator: Any = getattr(torch, device.type, None)
        if not hasattr(self._allocator, "max_memory_allocated"):
            self._allocator = None
        self._sampler = _ResidentSize()
        self._final: int | None = None

    def __enter__(self) -> PeakMemory:
        self._final = None
        self.reset()
        if self._allocator is None:
            self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._final = self.num_bytes
        if self._allocator is None:
            self._sampler.stop()

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._allocator is not None:
            self._allocator.reset_peak_memory_stats(self._device)
        else:
            self._sampler.reset()

    @property
    def num_bytes(self) -> int:
        if self._final is not None:
            return self._final
        if self._allocator is not None:
            return int(self._allocator.max_memory_allocated(self._device))
        return self._sampler.read()


class _ResidentSize:
    """Sample the resident size of this process in a thread and keep the largest."""

    def __init__(self) -> None:
        # Here, since `liger bench ops` reads times in a peer's interpreter, which may lack psutil.
        import psutil

        self._process = psutil.Process()
        self._peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        self._peak = 0

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def read(self) -> int:
        self._peak = max(self._peak, int(self._process.memory_info().rss))
        return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_INTERVAL_S):
            self.read()
