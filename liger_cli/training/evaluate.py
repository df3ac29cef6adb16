"""Evaluation sets batch by batch, as means over everything in them, whatever the batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from liger_cli.common.failures import is_out_of_memory
from liger_cli.config import RunConfig
from liger_cli.data.batches import PLACEHOLDER, load_windows
from liger_cli.training.checkpoints.random_state import kept_random_state
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.inputs import Inputs
from liger_cli.training.memory.limits import evaluation_out_of_memory
from liger_cli.training.objectives.objective import Evaluation, Objective, TwoPassEvaluation

__all__ = ["evaluate", "evaluate_inputs"]


@torch.no_grad()
def evaluate(
    objective: Objective,
    model: Any,
    sets: Mapping[str, Any],
    collator: Any,
    *,
    batch_size: int,
    accelerator: Any,
    record: Any = None,
    on_batch: Callable[[], None] | None = None,
) -> EvalResult:
    """Evaluate a model; its mode and every random generator are as they were afterwards.

    A model that is compiled is run as it is without: its graphs are for the shapes of training. The
    loss is the language model's alone, without the balance of experts that some train on too.

    Args:
        objective: Of the run.
        model: The prepared model.
        sets: Rows with input_ids and labels by the name of their set, at least one of which has a
            label; one set alone may have the name "".
        collator: Makes a padded batch of rows.
        batch_size: Rows of a batch on each process; the result does not depend on it.
        accelerator: Of the run; the rows are shared among its processes.
        record: A PatchRecord that counts the calls of the first batch.
        on_batch: Called after each batch of this process.
    """
    model = accelerator.unwrap_model(model)
    evaluation = objective.evaluation(model)
    sums_of = _SumsOf(evaluation, collator, batch_size, accelerator, on_batch)
    was_training = model.training
    model.eval()
    try:
        with kept_random_state(accelerator.device):
            found = {}
            for name, examples in sets.items():
                found[name] = sums_of(examples, record)
                record = None
    finally:
        model.train(was_training)
    named = {name: evaluation.result(sums) for name, sums in found.items() if name}
    return replace(evaluation.result(torch.stack(list(found.values())).sum(0)), sets=named)


def evaluate_inputs(
    config: RunConfig,
    objective: Objective,
    model: Any,
    inputs: Inputs,
    accelerator: Any,
    **options: Any,
) -> EvalResult:
    """Evaluate a model on the evaluation sets of a run.

    Args:
        config: The run; gives the rows of a batch.
        objective: Of the run.
        model: The prepared model.
        inputs: The sets and their collator.
        accelerator: Of the run.
        options: `record` and `on_batch` of evaluate.

    Raises:
        OutOfMemory: The batches are too large; with the flag that makes them smaller.
    """
    try:
        return evaluate(
            objective,
            model,
            inputs.eval,
            inputs.collator,
            batch_size=config.per_device_eval_batch_size,
            accelerator=accelerator,
            **options,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise evaluation_out_of_memory(error, config) from error
        raise


class _SumsOf:
    """Sums an evaluation over the rows of a set, on all processes."""

    def __init__(
        self,
        evaluation: Evaluation,
        collator: Any,
        batch_size: int,
        accelerator: Any,
        on_batch: Callable[[], None] | None,
    ) -> None:
        self._evaluation = evaluation
        self._collator = collator
        self._batch_size = batch_size
        self._accelerator = accelerator
        self._on_batch = on_batch

    def __call__(self, examples: Any, record: Any) -> torch.Tensor:
        if isinstance(self._evaluation, TwoPassEvaluation):
            first = self._evaluation.first_sums, self._evaluation.num_first_sums
            self._evaluation.begin(self._pass(examples, None, *first))
        return self._pass(examples, record, self._evaluation.sums, self._evaluation.num_sums)

    def _pass(
        self,
        examples: Any,
        record: Any,
        sums_of: Callable[[Any], torch.Tensor],
        num_sums: int,
    ) -> torch.Tensor:
        """Return sums over all batches and processes."""
        accelerator, size = self._accelerator, self._batch_size
        rows = range(accelerator.process_index, len(examples), accelerator.num_processes)
        # Every process runs as many batches: each takes part in the collectives of all.
        most = math.ceil(len(examples) / accelerator.num_processes)
        windows = [[list(rows[i : i + size]) or [PLACEHOLDER]] for i in range(0, most, size)]
        sums = torch.zeros(num_sums, dtype=torch.float64)
        for i, [batch] in enumerate(load_windows(examples, iter(windows), self._collator)):
            is_counted = record is not None and i == 0
            with record.count_calls() if is_counted else contextlib.nullcontext():
                sums += sums_of(batch)
            if self._on_batch is not None:
                self._on_batch()
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return sums
