"""What `liger train` does, from a configuration to a report."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from liger_cli.commands.train.announce import announce_data, announce_kernels
from liger_cli.commands.train.dry_run import describe_dry_run
from liger_cli.common.failures import is_out_of_memory
from liger_cli.common.outputs import write_file
from liger_cli.config import RunConfig
from liger_cli.data.feed import plan_batches, total_steps
from liger_cli.data.packing import check_packed
from liger_cli.errors import ConfigError
from liger_cli.report import (
    PeerPart,
    RunReport,
    TrainProgress,
    eval_texts,
    notify,
)
from liger_cli.report.build import (
    add_evaluation,
    add_training,
    find_gain,
    read_report,
    report_of,
)
from liger_cli.report.requirements import check_places, check_required, parse_ops
from liger_cli.training.checkpoints.files import step_of
from liger_cli.training.checkpoints.resume import describe_resume
from liger_cli.training.evaluate import EvalResult, evaluate_inputs
from liger_cli.training.inputs import Inputs, load_inputs
from liger_cli.training.loop import train
from liger_cli.training.memory.limits import (
    RunMemory,
    check_memory,
    out_of_memory,
)
from liger_cli.training.model.adapters import adapts, quantization, trained_line
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.source import ModelSource, resolve_model
from liger_cli.training.optim.optimizers import check_optimization
from liger_cli.training.result import StepMetrics, TrainResult
from liger_cli.training.runtime.arms import run_arm
from liger_cli.training.runtime.launch import make_accelerator, quiet_libraries, run_directory
from liger_cli.training.runtime.launch_variables import config_of_launch
from liger_cli.training.runtime.peer_patch import apply_peer_patch
from liger_cli.training.runtime.trackers import check_trackers, prefixed, tracking
from liger_kernels.transformers.api import inspect_model

__all__ = ["run_train"]


def run_train(
    config: RunConfig,
    *,
    baseline: int = 0,
    require: str = "",
    resume: str | None = None,
    dry_run: bool = False,
    measure_only: bool = False,
    peer_patch: bool = False,
) -> RunReport | None:
    """Trains and returns the report; None on processes other than the main one.

    Args:
        baseline: Eager steps to run first, in a process of their own.
        require: Ops that must be patched throughout.
        resume: "auto", or a checkpoint or run to go on from.
        dry_run: Stop before weights are loaded.
        measure_only: Write no checkpoint, evaluate nothing and report to no tracker.
        peer_patch: Let a peer's own patch follow, for a comparison.

    Raises:
        LigerError: Anything a user can mend; what is cheap to find out comes first.
    """
    config = config_of_launch(config)
    parse_ops(config.ops, require)
    quiet_libraries()
    if measure_only:
        config = config.model_copy(update={"report_to": None, "profile_steps": None})
    source = resolve_model(config.model, notify)
    accelerator = make_accelerator(config, adapts=adapts(config, source))
    quantization(config, source, accelerator.device)
    check_optimization(config, accelerator.device)
    check_trackers(config)
    if accelerator.num_processes > 1:
        _refuse_several_processes(config, baseline)
    writes = not dry_run
    with run_directory(config, resume, accelerator, notify, writes=writes) as (run_dir, checkpoint):
        return _run_in(
            run_dir,
            checkpoint,
            config.model_copy(update={"output_dir": run_dir}),
            source,
            accelerator,
            baseline=baseline,
            require=require,
            dry_run=dry_run,
            measure_only=measure_only,
            peer_patch=peer_patch,
        )


def _run_in(
    run_dir: Path,
    checkpoint: Path | None,
    config: RunConfig,
    source: ModelSource,
    accelerator: Any,
    *,
    baseline: int,
    require: str,
    dry_run: bool,
    measure_only: bool,
    peer_patch: bool,
) -> RunReport | None:
    """Train in a directory that is this run's alone; the arguments are those of run_train."""
    inputs = load_inputs(config, source=source, notify=notify)
    batches = plan_batches(config, inputs.train, accelerator)
    num_steps = total_steps(config, batches)
    if config.profiled_steps and config.profiled_steps[-1] > num_steps:
        raise ConfigError(
            f"profile_steps is {config.profile_steps}, and the run has {num_steps} steps"
        )
    plan = inspect_model(inputs.meta_model, config.ops)
    report = report_of("train", config, inputs, plan)
    check_places(plan)
    check_required(report, require)
    is_main = accelerator.is_main_process
    if is_main:
        announce_data(inputs, batches, num_steps)
        notify(f"model: {trained_line(inputs.meta_model)}")
    # Looks at many rows, and follows a step: only where it is needed.
    memory_of_step = functools.partial(RunMemory.of, config, inputs, accelerator.device)
    if dry_run:
        check_memory(config, inputs.meta_model, accelerator.device)
        if not is_main:
            return None
        return describe_dry_run(report, inputs, batches, memory_of_step(), accelerator.device)
    done = step_of(checkpoint) if checkpoint else 0
    report_file = run_dir / "report.json"
    if done >= num_steps and report_file.is_file():
        notify(f"{run_dir} is finished: {done} of {num_steps} steps")
        return read_report(report_file) if is_main else None
    if done >= num_steps and not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{checkpoint} is at step {done} of {num_steps}: nothing is left to train",
            hint="A larger --max-steps or --num-train-epochs goes on from it.",
        )
    if checkpoint and is_main:
        notify(describe_resume(checkpoint, config, accelerator.device))

    check_memory(config, inputs.meta_model, accelerator.device)
    eager = None
    if baseline:
        notify(f"baseline: {baseline} eager steps in a process of their own")
        eager = run_arm(config, name="eager", ops="none", steps=baseline)
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Of a run that ended earlier; there is none until this one ends.
        report_file.unlink(missing_ok=True)
    try:
        result, record, peer = _train_loaded(
            config,
            inputs,
            accelerator=accelerator,
            run_dir=run_dir,
            checkpoint=checkpoint,
            first_step=done,
            num_steps=num_steps,
            require=require,
            measure_only=measure_only,
            peer_patch=peer_patch,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, memory_of_step(), accelerator.device) from error
        raise
    accelerator.end_training()
    if not is_main:
        return None
    fitted = {
        "per_device_train_batch_size": result.plan.batch_size,
        "gradient_accumulation_steps": result.plan.accumulation,
    }
    report = report_of("train", config.model_copy(update=fitted), inputs, record)
    add_training(report, result)
    report.peer = PeerPart(**peer) if peer else None
    if not measure_only:
        report.gain = find_gain(memory_of_step, report, result, eager, baseline)
    report.write(report_file)
    return report


def _refuse_several_processes(config: RunConfig, baseline: int) -> None:
    if config.auto_fit:
        raise ConfigError(
            "auto_fit is for one process: the others would wait for the one that ran out"
        )
    if baseline:
        raise ConfigError("--baseline measures one process; this launch has several")


def _train_loaded(
    config: RunConfig,
    inputs: Inputs,
    *,
    accelerator: Any,
    run_dir: Path,
    checkpoint: Path | None,
    first_step: int,
    num_steps: int,
    require: str,
    measure_only: bool,
    peer_patch: bool,
) -> tuple[TrainResult, Any, dict[str, Any] | None]:
    """Loads the weights and trains: all that takes the device's memory."""
    is_main = accelerator.is_main_process
    source = resolve_model(str(checkpoint)) if checkpoint else inputs.source
    keep_base = run_dir if is_main and not measure_only else None
    model, record = load_patched(config, source, accelerator.device, notify, keep_base=keep_base)
    peer = apply_peer_patch(model) if peer_patch else None
    if config.packing:
        check_packed(model, flatten=inputs.collator.flatten)
    # The plan was made on meta tensors; what fails its check on this device is known only now.
    if require:
        check_required(report_of("train", config, inputs, record), require)
    if is_main:
        announce_kernels(record)
        # The directory stays free for another try until there is something to run.
        write_file(run_dir / "config.yaml", config.to_yaml())

    def evaluate_now(prepared: Any) -> EvalResult:
        return evaluate_inputs(config, prepared, inputs, accelerator)

    with (
        tracking(config, run_dir, is_main=is_main) as track,
        TrainProgress(num_steps, first_step=first_step) as progress,
    ):

        def show(metrics: StepMetrics, last_step: int) -> None:
            track(prefixed("train", asdict(metrics)), metrics.step)
            if metrics.step % config.logging_steps == 0 or metrics.step == last_step:
                progress.update(
                    metrics.step,
                    loss=metrics.loss,
                    tokens_per_s=metrics.tokens_per_s,
                    peak_memory_bytes=metrics.peak_memory_bytes,
                )

        def show_evaluation(found: EvalResult, step: int) -> None:
            track(prefixed("eval", found.by_name()), step)
            report = RunReport(command="train")
            add_evaluation(report, found)
            for text in eval_texts(report):
                progress.note(f"eval {step}/{num_steps}  {text}")

        result = train(
            config,
            model,
            inputs.preprocessing,
            inputs.train,
            inputs.collator,
            accelerator=accelerator,
            record=record,
            run_dir=run_dir,
            evaluate=evaluate_now if inputs.eval and not measure_only else None,
            on_step=show,
            on_eval=show_evaluation,
            resume_from=checkpoint,
            save=not measure_only,
        )
    return result, record, peer
