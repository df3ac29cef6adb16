"""The state of a training run, and what can be done with it: the parts of the loop.

Where to add a feature:
- an objective: a class in objectives/, with a row in objectives/table.py;
- a parallel layout: a plan of parallel/mesh.py, and an engine for it in parallel/engine.py, which
  is all that the session asks;
- an attention: `load_model` (model/source.py) selects it before the session exists.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from accelerate.utils import set_seed

from liger_cli.common.measure import StepTime
from liger_cli.config import RunConfig
from liger_cli.data.batches import BatchPlan
from liger_cli.data.feed import Feed, make_feed
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.activation_offload import checkpoint_layers, offload_of
from liger_cli.training.auto_compile import AUTO, decide_measured
from liger_cli.training.checkpoints.run_log import STEP_LOG, JsonLines, copy_logs
from liger_cli.training.checkpoints.saver import Saver, is_due
from liger_cli.training.checkpoints.state import ResumePoint, TrainState, load_state
from liger_cli.training.embedding_noise import add_embedding_noise
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.evaluate import evaluate_inputs
from liger_cli.training.evaluations import EVAL_LOG, EarlyStop, Evaluations, eval_interval
from liger_cli.training.model_files import ModelFiles
from liger_cli.training.objectives.objective import Part, Setting, Totals
from liger_cli.training.objectives.table import make_objective
from liger_cli.training.optim.optimizers import Schedule, make_optimizer
from liger_cli.training.prepared import PreparedRun
from liger_cli.training.result import COUNTS, STEP_FIELDS, StepMetrics, TrainResult
from liger_cli.training.runtime.async_scalars import AsyncScalars
from liger_cli.training.runtime.auto_fit import ResizableBatches
from liger_cli.training.runtime.stop_signals import interrupted, non_finite
from liger_cli.training.step import Gradients

__all__ = ["Callbacks", "OptimizerStep", "TrainSession"]


def _ignore(*values: Any) -> None:
    pass


@dataclass(frozen=True)
class Callbacks:
    """Functions that the main process calls.

    Attributes:
        on_start: Gets the configuration with all that the run has decided, before the first step,
            and a line about a decision, or None.
        on_step: Gets the metrics of each step.
        on_eval: Gets the result of each evaluation and its step.
        on_note: Gets a line about what the objective does before the first step.
    """

    on_start: Callable[[RunConfig, str | None], None] = _ignore
    on_step: Callable[[StepMetrics], None] = _ignore
    on_eval: Callable[[EvalResult, int], None] = _ignore
    on_note: Callable[[str], None] = _ignore


@dataclass(frozen=True)
class OptimizerStep:
    """An optimizer step.

    Attributes:
        loss: Mean over the step, before its update.
        learning_rate: The rate that the step was taken with.
        grad_norm: Norm of the gradient before clipping.
        totals: Counts of the step, over all processes.
        metrics: The objective's other means over the step, by name; None where there is none.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    totals: Totals
    metrics: Mapping[str, float | None]

    @property
    def num_tokens(self) -> int:
        return self.totals.tokens


class TrainSession:
    """A model in training: `train` (loop.py) calls the methods in their order.

    Args:
        run: The prepared run.
        model: The patched model on the device of the run, in the dtype of its parameters; of a run
            that is resumed with the weights of its checkpoint.
        record: The PatchRecord of the model; the first step counts the calls of its modules.
        callbacks: Functions to call after steps and evaluations.

    Attributes:
        num_done: Steps that are done, those before a resume included.
    """

    def __init__(
        self, run: PreparedRun, model: Any, record: Any, callbacks: Callbacks | None = None
    ) -> None:
        config, accelerator = run.config, run.accelerator
        self._run, self._record, self._callbacks = run, record, callbacks or Callbacks()
        self._objective = run.objective or make_objective(config, model, run.device)
        if config.gradient_checkpointing:
            notify = self._callbacks.on_note if run.is_main else _ignore
            offload = offload_of(config, run.device, notify, run.host_bytes)
            checkpoint_layers(model, offload)
        if config.neftune_noise_alpha:
            add_embedding_noise(model, config.neftune_noise_alpha)
        optimizer = make_optimizer(config, model)
        self._scheduler = Schedule(config, optimizer, run.num_steps)
        set_seed(config.seed, device_specific=True)
        self._model, self._optimizer = run.engine.prepare(model, optimizer)
        # Of the data as they were read: an objective may add to their rows.
        data = run.inputs.train_identity
        self._run = run = replace(run, inputs=self._objective.prepare(self._setting()))
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._feed = ResizableBatches(run.batches, self._feed_of)
        self._gradients = Gradients(
            self._model, self._objective, run.engine, self._feed, shrinks=config.auto_fit
        )
        plain = accelerator.unwrap_model(self._model)
        files = ModelFiles(run, plain, self._optimizer)
        self._state = TrainState(
            accelerator,
            plain,
            self._optimizer,
            self._scheduler,
            self._feed,
            data,
            files.stage,
            files.write_whole,
            self._objective,
        )
        self._evaluated: EvalResult | None = None
        self.num_done = 0

    def _setting(self) -> Setting:
        run = self._run
        return Setting(
            config=run.config,
            accelerator=run.accelerator,
            engine=run.engine,
            model=self._model,
            inputs=run.inputs,
            batches=run.batches,
            num_steps=run.num_steps,
            run_dir=run.run_dir,
            checkpoint=run.checkpoint,
            notify=self._callbacks.on_note if run.is_main else _ignore,
        )

    def _feed_of(self, batches: BatchPlan) -> Feed:
        run = self._run
        return make_feed(
            run.inputs.train,
            batches,
            run.inputs.collator,
            num_workers=run.config.dataloader_num_workers,
            pin_memory=run.device.type == "cuda",
        )

    def settle(self) -> None:
        """Decide on torch_compile where it is auto, before anything of the run has begun."""
        line = None
        if self._run.config.torch_compile == AUTO:
            decision = decide_measured(self._run, self._model, self._objective)
            config = self._run.config.model_copy(update={"torch_compile": decision.compiles})
            self._run, line = replace(self._run, config=config), decision.line
        if self._run.is_main:
            self._callbacks.on_start(self._run.config, line)

    def resume(self) -> None:
        """Restore the checkpoint of the run, if there is one, and open the logs at its step.

        Raises:
            DataError: The data have changed, or a file of the checkpoint cannot be read.
        """
        run, config = self._run, self._run.config
        start = load_state(run.checkpoint, self._state) if run.checkpoint else ResumePoint(0, False)
        self._first_step = self.num_done = start.step
        self._open_logs()
        self._windows = self._feed.windows(start.step + 1, run.num_steps)
        self._model.train()
        self._evaluated = self._evals.at(start.step)
        is_due_again = start.step < run.num_steps and self._evaluates_after(start.step)
        if is_due_again and not start.is_evaluated:
            # This checkpoint was written before the evaluation that follows its step.
            if self._evaluated is None:
                self.evaluate()
            else:
                self._scheduler.evaluated(self._evaluated.loss)
        if start.step == 0 and config.eval_on_start and self._evaluated is None:
            self.evaluate()

    def _open_logs(self) -> None:
        run, step = self._run, self.num_done
        if run.checkpoint and run.checkpoint.parent != run.run_dir:
            copy_logs((STEP_LOG, EVAL_LOG), run.checkpoint.parent, run.run_dir, run.accelerator)
        self._log = JsonLines(
            run.run_dir / STEP_LOG,
            required=STEP_FIELDS,
            counts=COUNTS,
            last_step=step,
            write=run.is_main,
        )
        self._evals = Evaluations(
            run.config,
            run.run_dir,
            last_step=step if run.evaluates else 0,
            write=run.evaluates and run.is_main,
        )
        self._saver = Saver(
            run.config,
            run.run_dir,
            self._state,
            log=self._log,
            evals=self._evals,
            resumed=run.checkpoint,
            is_on=not run.measure_only,
        )

    def saving(self) -> AbstractContextManager[None]:
        """Return the context of all steps: an error leaves a checkpoint time to be written."""
        return self._saver.finishing()

    @property
    def is_done(self) -> bool:
        """Whether all steps are done, or early stopping ends the run before."""
        return self.num_done >= self._run.num_steps or self._evals.should_stop

    def step(self) -> OptimizerStep:
        """Do the next optimizer step.

        Raises:
            NonFiniteLoss: The loss or a gradient is NaN or infinite.
        """
        accelerator, step = self._run.accelerator, self.num_done + 1
        batches = next(self._windows)
        own = sum(map(self._objective.count, batches), Totals())
        totals = own.like(self._sum_over_processes(*astuple(own)))
        is_first = step == self._first_step + 1
        with self._record.count_calls() if is_first else contextlib.nullcontext():
            part = self._gradients.add(step, batches, totals)
        max_norm = self._run.config.max_grad_norm or math.inf
        norm = self._run.engine.clip(self._parameters, max_norm)
        values = AsyncScalars(accelerator.reduce(part.loss, "sum"), norm, *self._reduced(part))
        learning_rate = self._scheduler.learning_rate
        # The device runs the optimizer while the host waits for the values. Where they are not
        # finite the run ends, and the weights do not matter.
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        loss_value, norm_value, *found = values.get()
        if not _is_finite(loss_value, norm_value, accelerator):
            with contextlib.suppress(EnvironmentProblem):
                self._saver.finish()
            raise non_finite(step, loss_value, norm_value, self._saver.newest)
        self.num_done = step
        self._objective.updated(step)
        # A mean of a kind that the step has none of is NaN.
        means = (value if math.isfinite(value) else None for value in found)
        metrics = dict(zip(self._objective.metrics, means, strict=True))
        return OptimizerStep(loss_value, learning_rate, norm_value, totals, metrics)

    def _reduced(self, part: Part) -> list[torch.Tensor]:
        if not self._objective.metrics:
            return []
        return list(self._run.accelerator.reduce(part.metrics, "sum"))

    def log(self, done: OptimizerStep, time: StepTime, peak_memory_bytes: int) -> None:
        """Write the metrics of the step that was done last."""
        metrics = StepMetrics(
            step=self.num_done,
            loss=done.loss,
            learning_rate=done.learning_rate,
            grad_norm=done.grad_norm if math.isfinite(done.grad_norm) else None,
            tokens=done.totals.tokens,
            trained_tokens=done.totals.labels,
            step_ms=time.step_ms,
            tokens_per_s=time.tokens_per_s,
            peak_memory_bytes=peak_memory_bytes,
            means=done.metrics,
        )
        self._log.write(metrics.row())
        if self._run.is_main:
            self._callbacks.on_step(metrics)

    def save(self, *, stop_requested: bool) -> bool:
        """Write a checkpoint if one is due, the run was stopped or the step was the last.

        It comes before the evaluation, for which memory may be too small.

        Args:
            stop_requested: Whether this process was asked to stop. One process that is asked stops
                all of them, each after the same step.

        Returns:
            Whether a checkpoint was written or begun.

        Raises:
            EnvironmentProblem: It, or one that was being written, cannot be written; those before
                are kept.
            Interrupted: The run was stopped before its last step.
        """
        stops, is_late, fails = self._sum_over_processes(
            stop_requested, self._saver.is_late, self._saver.has_failed
        )
        if fails:
            self._saver.finish()
        is_last = self.num_done == self._run.num_steps
        now = is_last or stops > 0 or is_late > 0
        is_saved = self._saver.save_if_due(self.num_done, now=now, is_final=is_last)
        if is_last or stops > 0:
            self._saver.finish()
        if stops > 0 and not is_last:
            raise interrupted(self.num_done, self._saver.newest)
        return is_saved

    def evaluate_if_due(self) -> bool:
        """Evaluate after a step if eval_strategy says so, and return whether it did.

        Not after the last step: `finish` does that, also of a run that was killed before it.
        """
        self._evaluated = None
        if self.num_done < self._run.num_steps and self._evaluates_after(self.num_done):
            self.evaluate()
        return self._evaluated is not None

    def _evaluates_after(self, step: int) -> bool:
        interval = eval_interval(self._run.config, self._run.batches.steps_per_epoch)
        return step > 0 and is_due(step, interval)

    def evaluate(self) -> None:
        """Evaluate the model as it is and log the result; nothing where there is no data for it."""
        run, step = self._run, self.num_done
        if not run.evaluates:
            return
        with run.engine.evaluation(self._model) as model:
            result = evaluate_inputs(
                run.config, self._objective, model, run.inputs, run.accelerator
            )
        self._evals.add(step, result)
        if step > 0:
            self._scheduler.evaluated(result.loss)
        if run.is_main:
            self._callbacks.on_eval(result, step)
        self._saver.evaluated(step)
        self._evaluated = result

    def finish(self) -> TrainResult:
        """Evaluate the final model, bring checkpoint and logs to the disk and return the result.

        Raises:
            EnvironmentProblem: One of them cannot be written.
        """
        if self._evaluated is None:
            self.evaluate()
        self._saver.finish()
        self._log.sync()
        self._evals.sync()
        is_early = self.num_done < self._run.num_steps
        return TrainResult(
            history=tuple(map(StepMetrics.from_row, self._log.rows)),
            eval=self._evaluated,
            plan=self._feed.plan,
            best=self._evals.best,
            compiles=bool(self._run.config.torch_compile),
            stop=EarlyStop(self.num_done, self._evals.num_vain) if is_early else None,
        )

    def _sum_over_processes(self, *numbers: float) -> list[float]:
        accelerator = self._run.accelerator
        if accelerator.num_processes == 1:
            return list(numbers)
        # Counts are exact in it.
        counts = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
        return accelerator.reduce(counts, "sum").tolist()


def _is_finite(loss: float, norm: float, accelerator: Any) -> bool:
    # Loss scaling overflows now and then on purpose: the scaler skips the step and scales less.
    return math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None)
