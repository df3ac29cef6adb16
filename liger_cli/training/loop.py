"""The training loop, to be read from top to bottom.

The loss of an optimizer step is the mean over all its trained tokens, those of every micro-batch on
every process: the model is told their number (num_items_in_batch) and returns a sum divided by it.
So a step means the same whatever the accumulation, and a short window at the end of an epoch is
weighted by the tokens it has.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from liger_cli.common.measure import PeakMemory, StepTimer
from liger_cli.config import RunConfig
from liger_cli.data.batches import BatchPlan, count_labels, count_tokens
from liger_cli.data.feed import Feed, identity, make_feed, plan_batches, total_steps
from liger_cli.training.checkpoints.run_log import STEP_LOG, JsonLines, copy_logs
from liger_cli.training.checkpoints.saver import Saver, is_due
from liger_cli.training.checkpoints.state import Reached, TrainState, load_state
from liger_cli.training.evaluate import EvalResult
from liger_cli.training.evaluations import EVAL_LOG, EarlyStop, Evaluations, eval_interval
from liger_cli.training.forward import LossOf
from liger_cli.training.model.tokenizers import Preprocessing
from liger_cli.training.optim.optimizers import Schedule, make_optimizer
from liger_cli.training.result import COUNTS, STEP_FIELDS, StepMetrics, TrainResult
from liger_cli.training.runtime.async_scalars import OnTheWay
from liger_cli.training.runtime.auto_fit import FittingFeed
from liger_cli.training.runtime.profiling import StepProfiler
from liger_cli.training.runtime.stop_signals import StopRequest, interrupted, non_finite
from liger_cli.training.step import Gradients

__all__ = ["train"]


def train(
    config: RunConfig,
    model: Any,
    preprocessing: Preprocessing,
    examples: Any,
    collator: Any,
    *,
    accelerator: Any,
    record: Any,
    run_dir: Path,
    evaluate: Callable[[Any], EvalResult] | None = None,
    on_step: Callable[[StepMetrics, int], None] | None = None,
    on_eval: Callable[[EvalResult, int], None] | None = None,
    resume_from: Path | None = None,
    save: bool = True,
) -> TrainResult:
    """Trains a model and returns what every step did.

    Args:
        config: The resolved configuration.
        model: The patched model on the accelerator's device, in the dtype of its parameters.
        preprocessing: Saved with the model.
        examples: Rows with input_ids and labels.
        collator: Makes a padded batch of rows.
        accelerator: An Accelerator without gradient accumulation of its own.
        record: The PatchRecord of the model; the first step counts the calls of its modules.
        run_dir: Where metrics.jsonl, eval.jsonl and checkpoints go.
        evaluate: Evaluates the prepared model; called when eval_strategy says, and at the end.
        on_step: Told the metrics of each step and the number of all steps, on the main process.
        on_eval: Told the result of each evaluation and its step, on the main process.
        resume_from: A checkpoint to go on from; the model holds its weights.
        save: False writes no checkpoint, for a run that only measures.

    Raises:
        NonFiniteLoss: The loss or a gradient is NaN or infinite; checkpoints before it are kept.
        EnvironmentProblem: A checkpoint or a log cannot be written; checkpoints before it are kept.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    device, is_main = accelerator.device, accelerator.is_main_process
    plan = plan_batches(config, examples, accelerator)
    last_step = total_steps(config, plan)
    loss_of = LossOf(model, device)
    if config.gradient_checkpointing:
        _recompute_activations(model)
    optimizer = make_optimizer(config, model)
    scheduler = Schedule(config, optimizer, last_step)
    set_seed(config.seed, device_specific=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def feed_of(plan: BatchPlan) -> Feed:
        workers, pin_memory = config.dataloader_num_workers, device.type == "cuda"
        return make_feed(examples, plan, collator, num_workers=workers, pin_memory=pin_memory)

    feed = FittingFeed(plan, feed_of)
    gradients = Gradients(model, loss_of, accelerator, feed, shrinks=config.auto_fit)
    state = TrainState(accelerator, optimizer, scheduler, feed, identity(examples))

    done, is_evaluated = load_state(resume_from, state) if resume_from else Reached(0, False)
    if resume_from and resume_from.parent != run_dir:
        copy_logs((STEP_LOG, EVAL_LOG), resume_from.parent, run_dir, accelerator)
    log = JsonLines(
        run_dir / STEP_LOG, required=STEP_FIELDS, counts=COUNTS, last_step=done, write=is_main
    )
    writes_evals = evaluate is not None and is_main
    evals = Evaluations(config, run_dir, last_step=done if evaluate else 0, write=writes_evals)
    eval_steps = eval_interval(config, plan.steps_per_epoch)
    saver = Saver(
        config,
        run_dir,
        model,
        preprocessing,
        state,
        log=log,
        evals=evals,
        resumed=resume_from,
        is_on=save,
    )

    def evaluate_after(step: int) -> EvalResult | None:
        if evaluate is None:
            return None
        result = evaluate(model)
        evals.add(step, result)
        if step > 0:
            scheduler.evaluated(result.loss)
        if on_eval is not None and is_main:
            on_eval(result, step)
        saver.evaluated(step)
        return result

    model.train()
    evaluated = evals.at(done)
    if done and not is_evaluated and done < last_step and is_due(done, eval_steps):
        # This checkpoint was written before the evaluation that follows its step.
        if evaluated is None:
            evaluated = evaluate_after(done)
        else:
            scheduler.evaluated(evaluated.loss)
    if done == 0 and config.eval_on_start and evaluated is None:
        evaluate_after(0)

    step, windows = done, feed.windows(done + 1, last_step)
    timer = StepTimer(device)
    trace = run_dir / f"profile-{config.profile_steps}.json"
    traced = config.profiled_steps if is_main else range(0)
    with (
        PeakMemory(device) as memory,
        StepProfiler(traced, trace, device) as profiler,
        StopRequest() as stop,
    ):
        timer.start()
        while step < last_step and not evals.is_in_vain:
            step += 1
            memory.reset()
            profiler.begin(step)
            batches = next(windows)
            num_tokens, num_labels = _sum_over_processes(
                accelerator,
                sum(map(count_tokens, batches)),
                sum(map(count_labels, batches)),
            )
            with record.count_calls() if step == done + 1 else contextlib.nullcontext():
                loss = gradients.add(step, batches, num_labels)
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            values = OnTheWay(accelerator.reduce(loss, "sum"), norm)
            learning_rate = scheduler.learning_rate
            # While the host waits for the values, the device has the optimizer's step to do; with
            # values that are not finite the model is of no use anyway.
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            loss_value, norm_value = values.get()
            if not _is_finite(loss_value, norm_value, accelerator):
                raise non_finite(step, loss_value, norm_value, saver.newest)

            lap = timer.lap(num_tokens)
            metrics = StepMetrics(
                step=step,
                loss=loss_value,
                learning_rate=learning_rate,
                grad_norm=norm_value if math.isfinite(norm_value) else None,
                tokens=num_tokens,
                trained_tokens=num_labels,
                step_ms=lap.step_ms,
                tokens_per_s=lap.tokens_per_s,
                peak_memory_bytes=memory.num_bytes,
            )
            log.write(asdict(metrics))
            if on_step is not None and is_main:
                on_step(metrics, last_step)

            # One process that is told to stop stops all of them, each after the same step.
            stops, is_late = _sum_over_processes(accelerator, stop.requested, saver.is_late)
            is_end = stops > 0 or step == last_step
            # Before the evaluation, for which memory may be too small.
            is_saved = saver.save_if_due(step, now=is_end or is_late > 0)
            if stops > 0 and step < last_step:
                raise interrupted(step, saver.newest)
            evaluated = None
            if not is_end and is_due(step, eval_steps):
                evaluated = evaluate_after(step)
            if profiler.end(step) or is_saved or evaluated is not None:
                timer.start()
    # Not in the last step: a run that was killed after it is resumed to be evaluated.
    if evaluated is None:
        evaluated = evaluate_after(step)
    log.sync()
    evals.sync()
    return TrainResult(
        history=tuple(map(StepMetrics.from_row, log.rows)),
        eval=evaluated,
        plan=feed.plan,
        best=evals.best,
        stop=EarlyStop(step, evals.num_vain) if step < last_step else None,
    )


def _sum_over_processes(accelerator: Any, *numbers: int) -> list[int]:
    if accelerator.num_processes == 1:
        return list(numbers)
    counts = torch.tensor(numbers, dtype=torch.int64, device=accelerator.device)
    return accelerator.reduce(counts, "sum").tolist()


def _is_finite(loss: float, norm: float, accelerator: Any) -> bool:
    # Loss scaling overflows now and then on purpose: the scaler skips the step and scales less.
    return math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None)


def _recompute_activations(model: Any) -> None:
    # Renamed in transformers 5.24; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
