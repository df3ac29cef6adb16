"""The gradient of an optimizer step, micro-batch by micro-batch."""

from __future__ import annotations

import functools
import logging
from typing import Any

from liger_cli.common.failures import is_out_of_memory
from liger_cli.data.feed import Window
from liger_cli.training.objectives.objective import Objective, Part, Totals
from liger_cli.training.parallel.engine import Engine
from liger_cli.training.runtime.auto_fit import ResizableBatches

__all__ = ["Gradients"]

_log = logging.getLogger(__name__)


class Gradients:
    """Accumulates the gradients of the micro-batches of a step.

    Args:
        model: The prepared model.
        objective: Computes the part of a micro-batch in the step.
        engine: Of the run.
        feed: Repeats a step in smaller micro-batches.
        shrinks: Whether to do that where memory runs out.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        engine: Engine,
        feed: ResizableBatches,
        *,
        shrinks: bool,
    ) -> None:
        self._model = model
        self._objective = objective
        self._engine = engine
        self._feed = feed
        self._shrinks = shrinks

    def add(self, step: int, batches: Window, totals: Totals) -> Part:
        """Accumulate the gradients of a step in the parameters.

        Args:
            step: The number of the step, for messages.
            batches: The micro-batches of this process.
            totals: Counts of the whole step, on all processes.

        Returns:
            The part of this process in the step, without a graph.
        """
        while (part := self._unless_full(batches, totals)) is None:
            self._model.zero_grad()
            batches = self._feed.shrink(step)
            plan = self._feed.plan
            _log.warning(
                "out of memory in step %d: continuing with %d rows a micro-batch and %d "
                "micro-batches a step",
                step,
                plan.batch_size,
                plan.accumulation,
            )
        return part

    def _unless_full(self, batches: Window, totals: Totals) -> Part | None:
        """Return the part of this process; None: out of memory, smaller micro-batches may do.

        By the time of the return the error is gone, and with it the tensors that its frames hold.
        """
        try:
            return self._add(batches, totals)
        except Exception as error:
            can_shrink = self._shrinks and self._feed.plan.batch_size > 1
            if not (can_shrink and is_out_of_memory(error)):
                raise
        return None

    def _add(self, batches: Window, totals: Totals) -> Part:
        engine, objective = self._engine, self._objective
        objective.begin(self._model, batches, totals)
        parts = []
        for batch in batches:
            with engine.micro_step(self._model, is_last=batch is batches[-1]):
                part = objective.part(self._model, batch, totals)
                engine.backward(part.loss)
            parts.append(Part(part.loss.detach(), part.metrics))
        return functools.reduce(Part.plus, parts)
