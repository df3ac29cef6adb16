"""The gradient of an optimizer step, micro-batch by micro-batch."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch

from liger_cli.common.failures import is_out_of_memory
from liger_cli.data.feed import Window
from liger_cli.training.forward import LossOf
from liger_cli.training.runtime.auto_fit import ResizableBatches

__all__ = ["Gradients"]

_log = logging.getLogger(__name__)


class Gradients:
    """Accumulates the gradients of the micro-batches of a step.

    Args:
        model: The prepared model.
        loss_of: Computes the part of a micro-batch in the loss of the step.
        accelerator: Of the run.
        feed: Repeats a step in smaller micro-batches.
        shrinks: Whether to do that where memory runs out.
    """

    def __init__(
        self,
        model: Any,
        loss_of: LossOf,
        accelerator: Any,
        feed: ResizableBatches,
        *,
        shrinks: bool,
    ) -> None:
        self._model = model
        self._loss_of = loss_of
        self._accelerator = accelerator
        self._feed = feed
        self._shrinks = shrinks

    def add(self, step: int, batches: Window, num_labels: int) -> torch.Tensor:
        """Accumulate the gradients of a step in the parameters.

        Args:
            step: The number of the step, for messages.
            batches: The micro-batches of this process.
            num_labels: Trained tokens of the whole step, on all processes.

        Returns:
            The part of this process in the loss of the step, a scalar.
        """
        while (loss := self._unless_full(batches, num_labels)) is None:
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
        return loss

    def _unless_full(self, batches: Window, num_labels: int) -> torch.Tensor | None:
        """Return the loss, or None where memory ran out and smaller micro-batches can be tried.

        By the time of the return the error is gone, and with it the tensors that its frames hold.
        """
        try:
            return self._add(batches, num_labels)
        except Exception as error:
            can_shrink = self._shrinks and self._feed.plan.batch_size > 1
            if not (can_shrink and is_out_of_memory(error)):
                raise
        return None

    def _add(self, batches: Window, num_labels: int) -> torch.Tensor:
        accelerator = self._accelerator
        loss = torch.zeros((), device=accelerator.device)
        for batch in batches:
            is_last = batch is batches[-1]
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self._model):
                part = self._loss_of(self._model, batch, num_labels)
                # Gradients are averaged over processes, but the parts are one sum.
                accelerator.backward(part * accelerator.num_processes)
            loss += part.detach()
        return loss
