"""What `liger train` and `liger eval` do, from a configuration to a report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.environment import environment
from liger_cli.errors import ConfigError, RequirementFailed
from liger_cli.estimate import StepShape, estimate_memory_ratio
from liger_cli.inspection import describe_model
from liger_cli.report import (
    DataPart,
    EvalPart,
    GainPart,
    RunReport,
    TrainPart,
    TrainProgress,
    format_count,
    show_lines,
    unmet_requirements,
)
from liger_cli.training.arms import ArmResult, run_arm
from liger_cli.training.batches import BatchPlan, count_labels, count_tokens
from liger_cli.training.checkpoint import StepMetrics, check_same_run
from liger_cli.training.evaluate import EvalResult, evaluate
from liger_cli.training.feed import make_feed
from liger_cli.training.loop import TrainResult, plan_batches, total_steps, train
from liger_cli.training.model import resolve_model
from liger_cli.training.packing import PackedRows, check_packed
from liger_cli.training.setup import (
    Inputs,
    check_memory,
    choose_run_dir,
    load_inputs,
    load_patched,
    make_accelerator,
    parameter_dtype,
    parse_ops,
    quiet_libraries,
)
from liger_kernels.transformers.api import inspect_model
from liger_kernels.transformers.plan import PatchPlan

__all__ = ["check_required", "run_eval", "run_train"]

# Rows whose longest stands for all in the memory estimate.
_ROWS_LOOKED_AT = 1000


def run_train(
    config: RunConfig,
    *,
    baseline: int = 0,
    require: str = "",
    resume: str | None = None,
    dry_run: bool = False,
    measure_only: bool = False,
) -> RunReport | None:
    """Trains and returns the report; None on processes other than the main one.

    Args:
        baseline: Eager steps to run first, in a process of their own.
        require: Ops that must be patched throughout.
        resume: "auto", or a checkpoint or run to go on from.
        dry_run: Stop before weights are loaded.
        measure_only: Write no checkpoint and evaluate nothing.

    Raises:
        LigerError: Anything a user can mend; what is cheap to find out comes first.
    """
    parse_ops(config.ops, require)
    quiet_libraries()
    accelerator = make_accelerator(config)
    if baseline and accelerator.num_processes > 1:
        raise ConfigError("--baseline measures one process; this launch has several")
    run_dir, checkpoint = choose_run_dir(config, resume, accelerator)
    config = config.model_copy(update={"output_dir": run_dir})
    inputs = load_inputs(config, notify=_notify)
    batches = plan_batches(config, inputs.train, accelerator)
    num_steps = total_steps(config, batches)
    plan = inspect_model(inputs.meta_model, config.ops)
    report = _report("train", config, inputs, plan)
    _check_places(plan)
    check_required(report, require)
    is_main = accelerator.is_main_process
    if is_main:
        _tell_data(inputs, batches, num_steps)
    if dry_run:
        if is_main:
            _tell_first_batch(inputs, batches)
        return report if is_main else None
    done = check_same_run(checkpoint, config) if checkpoint else 0
    report_file = run_dir / "report.json"
    if done >= num_steps and report_file.is_file():
        _notify(f"{run_dir} is finished: {done} of {num_steps} steps")
        return _read_report(report_file) if is_main else None
    if done >= num_steps and not (run_dir / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{checkpoint} is at step {done} of {num_steps}: nothing is left to train",
            hint="A larger --max-steps or --num-train-epochs goes on from it.",
        )

    check_memory(config, inputs.meta_model, accelerator.device)
    eager = None
    if baseline:
        _notify(f"baseline: {baseline} eager steps in a process of their own")
        eager = run_arm(config, name="eager", ops="none", steps=baseline)
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    source = resolve_model(str(checkpoint)) if checkpoint else inputs.source
    model, record = load_patched(config, source, accelerator.device, _notify)
    if config.packing:
        check_packed(model, flatten=inputs.collator.flatten)
    if is_main:
        # The directory stays free for another try until there is something to run.
        (run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")

    def evaluate_now(prepared: Any) -> EvalResult:
        return evaluate(
            prepared,
            inputs.eval,
            inputs.collator,
            batch_size=config.per_device_eval_batch_size,
            accelerator=accelerator,
        )

    with TrainProgress(num_steps, first_step=done) as progress:

        def show(metrics: StepMetrics, last_step: int) -> None:
            if metrics.step % config.logging_steps == 0 or metrics.step == last_step:
                progress.update(
                    metrics.step,
                    loss=metrics.loss,
                    tokens_per_s=metrics.tokens_per_s,
                    peak_memory_bytes=metrics.peak_memory_bytes,
                )

        result = train(
            config,
            model,
            inputs.tokenizer,
            inputs.train,
            inputs.collator,
            accelerator=accelerator,
            record=record,
            run_dir=run_dir,
            evaluate=None if inputs.eval is None or measure_only else evaluate_now,
            on_step=show,
            resume_from=checkpoint,
            save=not measure_only,
        )
    accelerator.end_training()
    if not is_main:
        return None
    report = _report("train", config, inputs, record)
    report.train = TrainPart(**result.summary())
    report.eval = EvalPart(**asdict(result.eval)) if result.eval else None
    report.gain = _gain(config, inputs, report, result, eager, baseline, accelerator.device)
    report.write(report_file)
    return report


def run_eval(config: RunConfig) -> RunReport | None:
    """Evaluates and returns the report; None on processes other than the main one.

    Raises:
        LigerError: Anything a user can mend.
    """
    parse_ops(config.ops)
    quiet_libraries()
    accelerator = make_accelerator(config)
    inputs = load_inputs(config, trains=False, notify=_notify)
    check_memory(config, inputs.meta_model, accelerator.device, trains=False)
    model, record = load_patched(config, inputs.source, accelerator.device, _notify)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    result = evaluate(
        model,
        inputs.eval,
        inputs.collator,
        batch_size=config.per_device_eval_batch_size,
        accelerator=accelerator,
        record=record,
    )
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    report = _report("eval", config, inputs, record)
    report.eval = EvalPart(**asdict(result))
    return report


def _report(command: str, config: RunConfig, inputs: Inputs, patches: Any) -> RunReport:
    """The report of a PatchPlan, or of the PatchRecord of a patched model."""
    plan = getattr(patches, "plan", patches)
    return RunReport(
        command=command,
        model=describe_model(inputs.source, inputs.meta_model, plan),
        config=config.model_dump(mode="json"),
        environment=environment(),
        coverage=patches.coverage,
        modules=patches.modules,
        missing=list(plan.missing),
        data=DataPart(
            name=inputs.data.name,
            eval_rows=0 if inputs.eval is None else len(inputs.eval),
            **asdict(inputs.data.stats),
        ),
    )


def _read_report(path: Path) -> RunReport:
    try:
        return RunReport.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} cannot be read as a report: {str(error).splitlines()[0]}",
            hint="Without that file, --resume writes it anew.",
        ) from error


def check_required(report: RunReport, require: str, *, is_reported: bool = False) -> None:
    """Checks the ops of --require, in the plan and again when it is known which modules ran.

    Raises:
        RequirementFailed: One is not patched wherever the model has a place for it.
    """
    if unmet := unmet_requirements(report, parse_ops("none", require)):
        raise RequirementFailed("\n".join(unmet), is_reported=is_reported)


def _check_places(plan: PatchPlan) -> None:
    if plan.ops and not any(op in plan.coverage for op in plan.ops):
        raise RequirementFailed(
            f"{plan.model_type} has no place for any of {', '.join(plan.ops)}",
            hint="liger inspect shows its modules; --ops none trains it as it is.",
        )


def _gain(
    config: RunConfig,
    inputs: Inputs,
    report: RunReport,
    result: TrainResult,
    eager: ArmResult | None,
    num_steps: int,
    device: torch.device,
) -> GainPart | None:
    """The measured gain over the same steps of an eager run, else an estimate of the memory's."""
    if eager is not None:
        patched = result.speed(num_steps)
        return GainPart(
            source="measured",
            speed=patched["tokens_per_s"] / eager.tokens_per_s,
            memory=patched["peak_memory_bytes"] / eager.peak_memory_bytes,
        )
    if not any(counts["patched"] for counts in (report.coverage or {}).values()):
        return None
    is_autocast = config.bf16 or config.fp16
    parameter_bytes = parameter_dtype(config, device).itemsize
    step = StepShape(
        batch_size=config.per_device_train_batch_size,
        sequence_length=_longest_row(config, inputs),
        parameter_bytes=parameter_bytes,
        compute_bytes=2 if is_autocast else parameter_bytes,
        num_parameters=sum(p.numel() for p in inputs.meta_model.parameters()),
        gradient_checkpointing=config.gradient_checkpointing,
        accumulates=config.gradient_accumulation_steps > 1,
        on_cpu=device.type == "cpu",
    )
    try:
        shape = inputs.meta_model.config.to_dict()
        return GainPart(
            source="estimated", memory=estimate_memory_ratio(shape, report.coverage or {}, step)
        )
    except ValueError:
        # A configuration without the usual sizes has no estimate.
        return None


def _longest_row(config: RunConfig, inputs: Inputs) -> int:
    # A stream has no rows to look at, and images would be read for their lengths alone.
    if config.streaming or inputs.data.has_images:
        return config.max_length
    count = min(_ROWS_LOOKED_AT, len(inputs.train))
    return max(len(inputs.train[i]["input_ids"]) for i in range(count))


def _tell_data(inputs: Inputs, batches: BatchPlan, num_steps: int) -> None:
    data, stats = inputs.data, inputs.data.stats
    if batches.num_rows:
        notes = [
            f"{format_count(stats.rows)} rows",
            f"{format_count(stats.tokens)} tokens, {format_count(stats.trained_tokens)} trained on",
            *data.notes,
        ]
        if isinstance(inputs.train, PackedRows):
            notes.append(f"packed into {format_count(len(inputs.train))} rows")
    else:
        notes = ["streamed; the report counts what was read"]
    if stats.dropped_rows:
        notes.append(f"{format_count(stats.dropped_rows)} rows left out: nothing to train on")
    if stats.truncated_rows:
        notes.append(f"{format_count(stats.truncated_rows)} rows cut to max_length")
    if inputs.eval is not None:
        notes.append(f"{format_count(len(inputs.eval))} rows for evaluation")
    licence = f" ({data.licence})" if data.licence else ""
    _notify(f"data: {data.name}{licence}: " + "; ".join(notes))
    epoch = f", {batches.steps_per_epoch} an epoch" if batches.num_rows else ""
    _notify(f"plan: {num_steps} steps{epoch}")


def _tell_first_batch(inputs: Inputs, batches: BatchPlan) -> None:
    [window] = make_feed(inputs.train, batches, inputs.collator).windows(1, 1)
    shapes = ", ".join("x".join(map(str, batch["input_ids"].shape)) for batch in window)
    num_tokens = sum(map(count_tokens, window))
    num_trained = sum(map(count_labels, window))
    _notify(f"first step: {shapes}; {num_tokens} tokens, {num_trained} trained on")


def _notify(message: str) -> None:
    show_lines(message, stderr=True)
