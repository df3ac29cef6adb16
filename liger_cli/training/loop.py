"""The training loop, to be read from top to bottom.

The loss of an optimizer step is the mean over all its trained tokens, those of every micro-batch on
every process: the model is told their number (num_items_in_batch) and returns a sum divided by it.
So a step means the same whatever the accumulation, and a short window at the end of an epoch is
weighted by the tokens it has.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import get_scheduler

from liger_cli.config import RunConfig
from liger_cli.errors import Interrupted, NonFiniteLoss
from liger_cli.measure import PeakMemory, StepTimer, median_after_warm_up
from liger_cli.training.batches import BatchPlan, count_labels, count_tokens
from liger_cli.training.checkpoint import (
    JsonLines,
    StepMetrics,
    TrainState,
    load_state,
    save_checkpoint,
)
from liger_cli.training.evaluate import EvalResult
from liger_cli.training.feed import make_feed, num_rows
from liger_cli.training.forward import LossOf
from liger_cli.training.on_the_way import OnTheWay

__all__ = ["TrainResult", "plan_batches", "total_steps", "train"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run did, step by step; a resumed run includes the steps before it."""

    history: tuple[StepMetrics, ...]
    eval: EvalResult | None

    def summary(self) -> dict[str, Any]:
        """Returns the `train` part of a report; speed is a median without the first step."""
        losses = [step.loss for step in self.history]
        tenth = max(1, len(losses) // 10)
        return {
            "steps": len(losses),
            "tokens": sum(step.tokens for step in self.history),
            "trained_tokens": sum(step.trained_tokens for step in self.history),
            "first_loss": sum(losses[:tenth]) / tenth,
            "final_loss": sum(losses[-tenth:]) / tenth,
            **self.speed(),
        }

    def speed(self, num_steps: int | None = None) -> dict[str, Any]:
        """Returns tokens_per_s, step_ms, peak_memory_bytes of the first `num_steps` or all."""
        steps = self.history[:num_steps]
        return {
            "tokens_per_s": median_after_warm_up([step.tokens_per_s for step in steps]),
            "step_ms": median_after_warm_up([step.step_ms for step in steps]),
            "peak_memory_bytes": max(step.peak_memory_bytes for step in steps),
        }


def plan_batches(config: RunConfig, examples: Any, accelerator: Any) -> BatchPlan:
    """Returns the order of the training data on this process."""
    return BatchPlan(
        num_rows=num_rows(examples),
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.order_seed,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def total_steps(config: RunConfig, plan: BatchPlan) -> int:
    """Returns the optimizer steps of a whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * plan.steps_per_epoch)


def train(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    examples: Any,
    collator: Any,
    *,
    accelerator: Any,
    record: Any,
    run_dir: Path,
    evaluate: Callable[[Any], EvalResult] | None = None,
    on_step: Callable[[StepMetrics, int], None] | None = None,
    resume_from: Path | None = None,
    save: bool = True,
) -> TrainResult:
    """Trains a model and returns what every step did.

    Args:
        config: The resolved configuration.
        model: The patched model on the accelerator's device, in the dtype of its parameters.
        tokenizer: Saved with the model.
        examples: Rows with input_ids and labels.
        collator: Makes a padded batch of rows.
        accelerator: An Accelerator without gradient accumulation of its own.
        record: The PatchRecord of the model; the first step counts the calls of its modules.
        run_dir: Where metrics.jsonl, eval.jsonl and checkpoints go.
        evaluate: Evaluates the prepared model; called every eval_steps and at the end.
        on_step: Told the metrics of each step and the number of all steps, on the main process.
        resume_from: A checkpoint to go on from; the model holds its weights.
        save: False writes no checkpoint, for a run that only measures.

    Raises:
        NonFiniteLoss: The loss or a gradient is NaN or infinite; checkpoints before it are kept.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    device = accelerator.device
    plan = plan_batches(config, examples, accelerator)
    last_step = total_steps(config, plan)
    loss_of = LossOf(model, device)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    optimizer = _make_optimizer(config, model, device)
    scheduler = _make_scheduler(config, optimizer, last_step)
    set_seed(config.seed, device_specific=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    feed = make_feed(
        examples,
        plan,
        collator,
        num_workers=config.dataloader_num_workers,
        pin_memory=device.type == "cuda",
    )
    state = TrainState(accelerator, optimizer, scheduler, feed)

    done = load_state(resume_from, state) if resume_from else 0
    log = JsonLines(run_dir / "metrics.jsonl", last_step=done, write=accelerator.is_main_process)
    writes_evals = evaluate is not None and accelerator.is_main_process
    evals = JsonLines(run_dir / "eval.jsonl", last_step=done, write=writes_evals)
    windows = feed.windows(done + 1, last_step)
    timer = StepTimer(device)
    evaluated: EvalResult | None = None
    saved: Path | None = resume_from

    model.train()
    with PeakMemory(device) as memory, _StopRequest() as stop:
        timer.start()
        for step in range(done + 1, last_step + 1):
            memory.reset()
            batches = next(windows)
            num_tokens, num_labels = _sum_over_processes(
                accelerator,
                sum(map(count_tokens, batches)),
                sum(map(count_labels, batches)),
            )
            loss = torch.zeros((), device=device)
            with record.count_calls() if step == done + 1 else contextlib.nullcontext():
                for batch in batches:
                    is_last = batch is batches[-1]
                    with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                        part = loss_of(model, batch, num_labels)
                        # Gradients are averaged over processes, but the parts are one sum.
                        accelerator.backward(part * accelerator.num_processes)
                    loss += part.detach()
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            values = OnTheWay(accelerator.reduce(loss, "sum"), norm)
            learning_rate = scheduler.get_last_lr()[0]
            # While the host waits for the values, the device has the optimizer's step to do; with
            # values that are not finite the model is of no use anyway.
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            loss_value, norm_value = values.get()
            if not _is_finite(loss_value, norm_value, accelerator):
                raise _non_finite(step, loss_value, norm_value, saved)

            time = timer.lap(num_tokens)
            metrics = StepMetrics(
                step=step,
                loss=loss_value,
                learning_rate=learning_rate,
                grad_norm=norm_value if math.isfinite(norm_value) else None,
                tokens=num_tokens,
                trained_tokens=num_labels,
                step_ms=time.step_ms,
                tokens_per_s=time.tokens_per_s,
                peak_memory_bytes=memory.num_bytes,
            )
            log.write(asdict(metrics))
            if on_step is not None and accelerator.is_main_process:
                on_step(metrics, last_step)

            stopping = any(_sum_over_processes(accelerator, int(stop.requested)))
            is_end = step == last_step or stopping
            saves = save and (is_end or _is_due(step, config.save_steps))
            evaluates = evaluate is not None and not is_end and _is_due(step, config.eval_steps)
            if saves:
                saved = save_checkpoint(run_dir, step, model, tokenizer, state, config)
            if stopping and step < last_step:
                raise _interrupted(step, saved)
            if evaluates and evaluate is not None:
                evals.write({"step": step, **asdict(evaluate(model))})
            if saves or evaluates:
                timer.start()
        # Not in the last step: a run that was killed after it is resumed to be evaluated.
        if evaluate is not None:
            evaluated = evaluate(model)
            evals.write({"step": last_step, **asdict(evaluated)})
    return TrainResult(tuple(StepMetrics(**row) for row in log.rows), evaluated)


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts as it would without this."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        # Python delivers signals to the main thread, and lets no other thread ask for them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
        _log.warning("stopping after this step; once more stops at once")


def _sum_over_processes(accelerator: Any, *numbers: int) -> list[int]:
    if accelerator.num_processes == 1:
        return list(numbers)
    return accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "sum").tolist()


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _is_finite(loss: float, norm: float, accelerator: Any) -> bool:
    # Loss scaling overflows now and then on purpose: the scaler skips the step and scales less.
    return math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None)


def _non_finite(step: int, loss: float, norm: float, saved: Path | None) -> NonFiniteLoss:
    what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
    kept = f"the last checkpoint is {saved}" if saved else "no checkpoint was written before it"
    return NonFiniteLoss(
        f"step {step}: the {what}; {kept}",
        hint="A lower --learning-rate, a longer --warmup-steps or --dtype float32 may help; "
        "--save-steps sets how often a checkpoint is written.",
    )


def _interrupted(step: int, saved: Path | None) -> Interrupted:
    if saved is None:
        return Interrupted(f"interrupted after step {step}")
    return Interrupted(
        f"interrupted after step {step}; its checkpoint is {saved}",
        hint="The same command with --resume auto goes on from there.",
    )


def _make_optimizer(config: RunConfig, model: Any, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases) do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cuda",
    )


def _make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    name = config.lr_scheduler_type
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
    return get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
    )


def _checkpoint_activations(model: Any) -> None:
    # Renamed in transformers 5.24; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
