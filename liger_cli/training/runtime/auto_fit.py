"""Micro-batches that become smaller when memory runs out; every step keeps its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from liger_cli.common.measure import free_cached_memory
from liger_cli.data.batches import BatchPlan
from liger_cli.data.feed import Feed, Window

__all__ = ["ResizableBatches", "smaller_batches"]


def smaller_batches(batch_size: int, accumulation: int) -> tuple[int, int]:
    """Return half the micro-batch and twice the accumulation: as many rows a step as before.

    Of a size that is odd it takes the next divisor below the half: 9 becomes 3.
    """
    smaller = next(size for size in range(batch_size // 2, 0, -1) if batch_size % size == 0)
    return smaller, accumulation * (batch_size // smaller)


class ResizableBatches:
    """A Feed that can repeat a step in smaller micro-batches.

    Args:
        plan: The order of the data.
        make: Returns the feed of a plan.
    """

    def __init__(self, plan: BatchPlan, make: Callable[[BatchPlan], Feed]) -> None:
        self.plan = plan
        self._make = make
        self._feed = make(plan)
        self._windows: Iterator[Window] = iter(())
        self._before: Mapping[str, Any] = {}
        self._last_step = 0

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        self._windows = self._feed.windows(first_step, last_step)
        self._last_step = last_step
        for _ in range(first_step, last_step + 1):
            self._before = self._feed.state_dict()
            yield next(self._windows)

    def shrink(self, step: int) -> Window:
        """Return the last window once more, in smaller micro-batches, as are those that follow.

        The size of the micro-batch must be above 1.
        """
        size, accumulation = smaller_batches(self.plan.batch_size, self.plan.accumulation)
        self.plan = replace(self.plan, batch_size=size, accumulation=accumulation)
        free_cached_memory()
        self._feed = self._make(self.plan)
        self._feed.load_state_dict(self._before)
        self._windows = self._feed.windows(step, self._last_step)
        return next(self._windows)

    def state_dict(self) -> dict[str, Any]:
        return self._feed.state_dict()

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        self._feed.load_state_dict(values)
