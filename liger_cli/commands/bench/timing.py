"""Time of one call of an op, forward alone and with its backward.

Two clocks read a GPU. "wall" is time as a stream sees it: calls are queued one after the other, and
where the host is slower than the device, the device waits and the waiting counts. "gpu" gives the
host a head start, so that only the device's work counts. The L2 cache is flushed before each call.
On a CPU there is one clock, caches are as they are, and "gpu" is empty.

Ours and the peers, which run in their own interpreter, are timed by this same code; it needs torch
and the standard library alone.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from liger_cli.common.measure import synchronize, transient_bytes

__all__ = ["Arm", "Part", "Stopwatch", "Times", "copy_rate", "matmul_rate"]

Part = Literal["forward", "full"]
# Milliseconds of each call, by clock.
Times = dict[str, list[float]]

# More than the L2 cache of any card: 50 MB on an H100, 126 MB on a B200.
_FLUSH_BYTES = 256 * 2**20
# A call this long hides whatever the host does; one clock reads for both.
_LONG_MS = 5.0
_MIN_CALLS, _MAX_CALLS = 2, 12
_HOST_CALLS = 200


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type != "cpu"
        self._flush_ms = 0.0
        if self.is_gpu:
            self._runtime = torch.get_device_module(device)
            self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
            times = self.times(self._flush, lambda: None, num_calls=10)
            self._flush_ms = sorted(times)[5]

    def times(
        self,
        call: Callable[[], Any],
        before: Callable[[], Any],
        *,
        num_calls: int,
        head_start_ms: float = 0.0,
    ) -> list[float]:
        """Return the milliseconds of each call.

        Args:
            call: What is timed.
            before: Runs before each call, untimed.
            num_calls: How often.
            head_start_ms: What the device still has to do when the host begins the call.
        """
        if not self.is_gpu:
            return [self._wall_ms(call, before) for _ in range(num_calls)]
        num_flushes = 1
        if head_start_ms:
            num_flushes += math.ceil(head_start_ms / self._flush_ms)
        events = []
        for _ in range(num_calls):
            before()
            for _ in range(num_flushes):
                self._flush()
            start, end = (self._runtime.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]

    def host_ms(self, call: Callable[[], Any], before: Callable[[], Any], num_calls: int) -> float:
        """Return the mean milliseconds the host needs to start a call; nothing is waited for."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(num_calls):
            before()
            call()
        elapsed = time.perf_counter() - began
        synchronize(self.device)
        return elapsed * 1e3 / num_calls

    def free(self) -> None:
        """Free the allocator's cache: the next check or the peer needs it."""
        gc.collect()
        if self.is_gpu:
            self._runtime.empty_cache()

    def _wall_ms(self, call: Callable[[], Any], before: Callable[[], Any]) -> float:
        before()
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3

    def _flush(self) -> None:
        self._flushed.zero_()


class Arm:
    """One way to compute an op, on arguments it already has.

    Args:
        name: As the tables show it.
        function: Takes nothing and returns a tensor or a tuple of them.
        leaves: The tensors it differentiates; those that do not require grad are left out.
        stopwatch: Of the device the tensors are on.
        dtype: What the incoming gradients are rounded to, whatever the outputs have.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[], Any],
        leaves: Sequence[Any],
        stopwatch: Stopwatch,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self._function = function
        self.leaves = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        self._stopwatch = stopwatch
        self._dtype = dtype
        self._gradients: list[torch.Tensor] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._head_start_ms = 0.0
        self._expected_ms: dict[str, float] = {}

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Return the outputs that are tensors."""
        outputs = self._function()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(y for y in outputs if isinstance(y, torch.Tensor))

    def full(self) -> tuple[torch.Tensor, ...]:
        """Return the outputs after their backward, which leaves the gradients in the leaves."""
        outputs = self.forward()
        if not self._gradients:
            self._gradients = self._draw_gradients(outputs)
        if self._gradients:
            torch.autograd.backward([y for y in outputs if y.requires_grad], self._gradients)
        return outputs

    def clear(self) -> None:
        """Forget the gradients, so that the next call makes them rather than adds to them."""
        for leaf in self.leaves:
            leaf.grad = None

    def warm_up(self) -> bool:
        """Compiles, and learns how long calls take. Returns whether it writes into its inputs."""
        kept = [(x, x.detach().clone()) for x in self.leaves]
        self._gradients = self._draw_gradients(self.forward())
        kept += [(dy, dy.clone()) for dy in self._gradients]
        self.full()
        overwrites = any(not torch.equal(x, before) for x, before in kept)
        if overwrites:
            self._kept = kept
        self.clear()
        for part in ("forward", "full"):
            times = self._stopwatch.times(self._call(part), self.clear, num_calls=2)
            self._expected_ms[part] = min(times)
        # Twice the quickest of three: a head start must be long enough also on a slow call.
        host = [self._stopwatch.host_ms(self.full, self.clear, 1) for _ in range(3)]
        self._head_start_ms = 2 * min(host)
        self.clear()
        return overwrites

    def times(self, part: Part, budget_ms: float) -> Times:
        """Return the times of as many calls as fit the budget, at least two, by each clock."""
        self._refresh()
        expected = self._expected_ms[part]
        num_calls = int(min(max(budget_ms / max(expected, 1e-3), _MIN_CALLS), _MAX_CALLS))
        measure = partial(self._stopwatch.times, self._call(part), self.clear, num_calls=num_calls)
        wall = measure()
        gpu: list[float] = []
        if self._stopwatch.is_gpu:
            is_long = expected > _LONG_MS
            gpu = wall if is_long else measure(head_start_ms=self._head_start_ms)
        self.clear()
        return {"wall": wall, "gpu": gpu}

    def host_us(self) -> float:
        """Return the microseconds the host needs to start a forward and its backward."""
        self._refresh()
        found = self._stopwatch.host_ms(self.full, self.clear, _HOST_CALLS) * 1e3
        self.clear()
        return found

    def transient_bytes(self) -> int | None:
        """Return the most memory that a forward and its backward add, gradients included."""
        self._refresh()
        self.clear()
        found = transient_bytes(self.full, self._stopwatch.device)
        self.clear()
        return found

    def release(self) -> None:
        """Let go of every tensor."""
        self.clear()
        self.leaves, self._gradients, self._kept = [], [], []
        self._function = _released

    def _call(self, part: str) -> Callable[[], Any]:
        return self.forward if part == "forward" else self.full

    def _refresh(self) -> None:
        """Restore what an arm that writes into its inputs has made of them."""
        with torch.no_grad():
            for x, before in self._kept:
                x.copy_(before)

    def _draw_gradients(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        generator = torch.Generator(self._stopwatch.device).manual_seed(1)
        drawn = []
        for y in outputs:
            if not y.requires_grad:
                continue
            # A loss is the end of a step and gets 1, as loss.backward() gives it.
            dy = torch.ones((), device=y.device)
            if y.dim():
                dy = torch.randn(y.shape, generator=generator, device=y.device)
            # The layout of y, and for every dtype of y the same values.
            drawn.append(torch.empty_like(y).copy_(dy.to(self._dtype)))
        return drawn


def _released() -> None:
    raise RuntimeError("this arm has been released")


def copy_rate(stopwatch: Stopwatch) -> float:
    """Return the bytes a second that a copy on the device reads and writes."""
    size = 2**30 if stopwatch.is_gpu else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=stopwatch.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_s(stopwatch, lambda: target.copy_(source))


def matmul_rate(
    stopwatch: Stopwatch, dtype: torch.dtype, *, num_calls: int = 20, is_awake: bool = False
) -> float:
    """Return the FLOPs a second of a large square matrix product, on a card that just worked or
    is brought out of its sleep first."""
    size = 8192 if stopwatch.is_gpu else 1024
    a, b = (torch.randn(size, size, device=stopwatch.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    call = partial(torch.mm, a, b, out=out)
    return 2 * size**3 / _median_s(stopwatch, call, num_calls, num_first=0 if is_awake else 10)


def _median_s(
    stopwatch: Stopwatch, call: Callable[[], Any], num_calls: int = 20, *, num_first: int = 10
) -> float:
    """Return the seconds of a call, those of the first ones left out."""
    times = stopwatch.times(call, lambda: None, num_calls=num_first + num_calls)[num_first:]
    return sorted(times)[len(times) // 2] / 1e3
