"""Train a model, from a configuration to a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from liger_cli.commands.train.announce import announce_data, announce_kernels
from liger_cli.commands.train.dry_run import describe_dry_run
from liger_cli.commands.train.prepare import RunOptions, prepare_run
from liger_cli.common.failures import is_out_of_memory
from liger_cli.common.outputs import write_file
from liger_cli.common.ranks import find_rank
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.report import PeerPart, RunReport, TrainProgress, eval_texts, notify
from liger_cli.report.build import (
    add_evaluation,
    add_training,
    find_gain,
    read_report,
    report_of,
)
from liger_cli.report.required_ops import check_required
from liger_cli.training.checkpoints.files import checkpoint_path
from liger_cli.training.checkpoints.resume import describe_resume
from liger_cli.training.document_check import check_documents
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.inputs import Inputs
from liger_cli.training.loop import train
from liger_cli.training.memory.limits import check_memory, out_of_memory
from liger_cli.training.objectives.peer_losses import find_chunked_loss
from liger_cli.training.prepared import PreparedRun
from liger_cli.training.result import StepMetrics, TrainResult
from liger_cli.training.runtime.arms import ArmResult, run_arm
from liger_cli.training.runtime.peer_patch import apply_peer_patch
from liger_cli.training.runtime.trackers import Tracking, prefixed, tracking
from liger_cli.training.session import Callbacks

__all__ = ["run_train"]

_DEFAULTS = RunOptions()
# Means of an objective that the line of a step shows; metrics.jsonl has all.
_SHOWN = ("rewards/accuracies", "rewards/margins", "accuracy")


class _Trained(NamedTuple):
    """The result of training, the PatchRecord of the model, the `peer` part of the report, and the
    inputs as the model in memory takes them.
    """

    result: TrainResult
    record: Any
    peer: dict[str, Any] | None
    inputs: Inputs


def run_train(config: RunConfig, options: RunOptions = _DEFAULTS) -> RunReport | None:
    """Train a model and return the report; None on processes other than the main one.

    Raises:
        LigerError: Anything a user can mend.
    """
    with prepare_run(config, options) as run:
        if run.is_main:
            announce_data(run)
        if options.dry_run:
            check_memory(run.config, run.inputs.meta_model, run.device)
            return describe_dry_run(run) if run.is_main else None
        if _is_finished(run):
            notify(
                f"{run.run_dir} is finished: {run.first_step} of {run.num_steps} steps; a larger "
                "--max-steps or --num-train-epochs continues it"
            )
            return read_report(run.report_file) if run.is_main else None
        if run.checkpoint and run.is_main:
            count = run.accelerator.num_processes
            notify(describe_resume(run.checkpoint, run.config, run.device, count))
        check_memory(run.config, run.inputs.meta_model, run.device)
        eager = _run_baseline(run, options.baseline)
        if run.is_main:
            run.run_dir.mkdir(parents=True, exist_ok=True)
            # Of a run that ended earlier; there is none until this one ends.
            run.report_file.unlink(missing_ok=True)
        if (rank := find_rank()) is not None:
            rank.say_run_dir(run.run_dir)
        try:
            trained = _load_and_train(run, options)
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, run.memory, run.device) from error
            raise
        run.accelerator.end_training()
        if not run.is_main:
            return None
        saved = checkpoint_path(run.run_dir, trained.result.history[-1].step)
        if saved.is_dir():
            notify(f"saved: {saved}")
        return _report(run, trained, eager, options.baseline)


def _is_finished(run: PreparedRun) -> bool:
    """Return whether the checkpoint is that of the last step and the report is there.

    Raises:
        ConfigError: Nothing is left to train, and there is nothing to report on.
    """
    if run.first_step < run.num_steps:
        return False
    if run.report_file.is_file():
        return True
    if not (run.run_dir / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{run.checkpoint} is at step {run.first_step} of {run.num_steps}: nothing is left to "
            "train",
            hint="A larger --max-steps or --num-train-epochs continues from it.",
        )
    return False


def _run_baseline(run: PreparedRun, num_steps: int) -> ArmResult | None:
    if not num_steps:
        return None
    notify(f"baseline: {num_steps} eager steps in another process")
    return run_arm(run.config, name="eager", ops="none", steps=num_steps)


def _load_and_train(run: PreparedRun, options: RunOptions) -> _Trained:
    """Load the weights and train: everything that takes the device's memory."""
    config = run.config
    keep_base = run.run_dir if run.is_main and not run.measure_only else None
    loaded_as = run.inputs.attention.applied(config)
    model, record = run.engine.load(loaded_as, run.source, _notify_of(run), keep_base=keep_base)
    peer = apply_peer_patch(model) if options.peer_patch else None
    if peer is not None:
        objective, peer["loss"] = find_chunked_loss(config, run.inputs, model, run.device)
        run = replace(run, objective=objective)
    with run.engine.evaluation(model):
        inputs = check_documents(config, run.inputs, model, run.accelerator, _notify_of(run))
    run = replace(run, inputs=inputs)
    # The plan was made on meta tensors; an op that fails its check on this device shows only now.
    report = report_of("train", config, run.inputs, record)
    if options.require:
        check_required(report, options.require)
    if run.is_main:
        announce_kernels(report, record)
    with (
        tracking(run.run_dir, is_main=run.is_main, notify=notify) as trackers,
        TrainProgress(run.num_steps, first_step=run.first_step) as progress,
    ):
        result = train(run, model, record, _callbacks(run, trackers, progress))
    return _Trained(result, record, peer, run.inputs)


def _notify_of(run: PreparedRun) -> Callable[[str], None]:
    """Return the function that prints lines, which the main process alone does."""
    return notify if run.is_main else lambda line: None


def _callbacks(run: PreparedRun, trackers: Tracking, progress: TrainProgress) -> Callbacks:
    """Return the callbacks that show steps and evaluations and log them to the trackers."""

    def start(config: RunConfig, line: str | None) -> None:
        # Not before: torch_compile may have been measured.
        trackers.start(config)
        if line is not None:
            progress.note(line)
        # The directory stays free for another try until there is something to run.
        write_file(run.run_dir / "config.yaml", config.to_yaml())

    def show_step(metrics: StepMetrics) -> None:
        trackers.log(prefixed("train", metrics.row()), metrics.step)
        if metrics.step % run.config.logging_steps == 0 or metrics.step == run.num_steps:
            progress.update(
                metrics.step,
                loss=metrics.loss,
                tokens_per_s=metrics.tokens_per_s,
                peak_memory_bytes=metrics.peak_memory_bytes,
                means={name: metrics.means[name] for name in _SHOWN if name in metrics.means},
            )

    def show_evaluation(found: EvalResult, step: int) -> None:
        trackers.log(prefixed("eval", found.by_name()), step)
        report = RunReport(command="train")
        add_evaluation(report, found)
        for text in eval_texts(report):
            progress.note(f"eval {step}/{run.num_steps}  {text}")

    return Callbacks(start, show_step, show_evaluation, progress.note)


def _report(
    run: PreparedRun, trained: _Trained, eager: ArmResult | None, num_eager_steps: int
) -> RunReport:
    """Return the report of a run that has ended, and write it into its directory."""
    result = trained.result
    fitted = {
        "torch_compile": result.compiles,
        "per_device_train_batch_size": result.plan.batch_size,
        "gradient_accumulation_steps": result.plan.accumulation,
    }
    config = run.config.model_copy(update=fitted)
    report = report_of("train", config, trained.inputs, trained.record)
    add_training(report, result)
    report.peer = PeerPart(**trained.peer) if trained.peer else None
    if not run.measure_only:
        report.gain = find_gain(lambda: run.memory, report, result, eager, num_eager_steps)
    report.write(run.report_file)
    return report
