"""Everything of a training run that comes before its weights are loaded, computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_cli.commands.train.publish import check_publication
from liger_cli.config import RunConfig
from liger_cli.data.feed import plan_batches, total_steps
from liger_cli.errors import ConfigError
from liger_cli.report import notify
from liger_cli.report.build import report_of
from liger_cli.report.required_ops import check_places, check_required, parse_ops
from liger_cli.training.auto_compile import AUTO, decide_early
from liger_cli.training.checkpoints.resume import saved_choice, with_older_values
from liger_cli.training.checkpoints.run_directory import run_directory
from liger_cli.training.inputs import load_inputs
from liger_cli.training.launch.agreement import (
    check_same_data,
    check_same_launch,
    check_shared_directory,
)
from liger_cli.training.memory.choice import choose_plan, with_sizes_of_launch
from liger_cli.training.memory.long_rows import settle_long_rows
from liger_cli.training.model.adapters import adapts, is_quantised, quantization
from liger_cli.training.model.loading import check_tiles
from liger_cli.training.model.source import ModelSource, resolve_model
from liger_cli.training.model.tokenizers import check_same_template
from liger_cli.training.objectives.table import check_step, resolve_objective
from liger_cli.training.optim.optimizers import check_optimization
from liger_cli.training.parallel.mesh import explicit_plan
from liger_cli.training.parallel.refusals import check_sharded
from liger_cli.training.prepared import PreparedRun
from liger_cli.training.runtime import device_timer
from liger_cli.training.runtime.launch import make_accelerator, quiet_libraries
from liger_cli.training.runtime.launch_variables import config_of_launch
from liger_cli.training.runtime.trackers import check_trackers
from liger_kernels.transformers.api import inspect_model

__all__ = ["RunOptions", "prepare_run"]


@dataclass(frozen=True)
class RunOptions:
    """Options of `liger train` that are no keys of the configuration.

    Attributes:
        baseline: Eager steps to run first, in another process; 0 for none.
        require: Ops that must be patched throughout.
        resume: "auto", or the checkpoint or run to resume from.
        dry_run: Whether to stop before weights are loaded.
        measure_only: Whether to write no checkpoint, evaluate nothing and report to no tracker.
        peer_patch: Whether a peer patches the model after `ops`, for a comparison.
    """

    baseline: int = 0
    require: str = ""
    resume: str | None = None
    dry_run: bool = False
    measure_only: bool = False
    peer_patch: bool = False


@contextlib.contextmanager
def prepare_run(config: RunConfig, options: RunOptions) -> Iterator[PreparedRun]:
    """Yield the run of a configuration, whose directory is locked until the block ends.

    The checks that take least time come first.

    Raises:
        LigerError: Anything a user can mend.
    """
    config = config_of_launch(config, notify)
    parse_ops(config.ops, options.require)
    quiet_libraries()
    if options.measure_only:
        config = config.model_copy(update={"report_to": None})
    source = resolve_model(config.model, notify)
    accelerator = make_accelerator(config, adapts=adapts(config, source))
    check_same_launch(config, accelerator)
    quantization(config, source, accelerator.device)
    check_optimization(config, accelerator.device)
    check_trackers(config)
    if accelerator.num_processes > 1:
        _refuse_several_processes(config, options.baseline)
    writes = not options.dry_run
    with run_directory(config, options.resume, accelerator, notify, writes=writes) as place:
        run_dir, checkpoint = place
        if writes:
            check_shared_directory(run_dir, accelerator)
        if checkpoint is not None:
            config = with_older_values(checkpoint, config)
            config = with_sizes_of_launch(checkpoint, config, accelerator.num_processes)
        asked = explicit_plan(config, accelerator.num_processes)
        if asked is not None and asked.is_sharded:
            check_sharded(config, source, accelerator.device)
        config = config.model_copy(update={"output_dir": run_dir})
        if not options.measure_only:
            check_publication(config)
        if config.torch_compile == AUTO:
            config = _settle_compile(config, source, accelerator, checkpoint, options)
        inputs = load_inputs(config, source=source, device=accelerator.device, notify=notify)
        if accelerator.num_processes > 1:
            check_same_data(inputs.identities, accelerator)
        if checkpoint is not None:
            check_same_template(checkpoint, config, inputs.preprocessing)
        config = resolve_objective(config, inputs)
        parallel, line = choose_plan(config, inputs, accelerator)
        config, host_bytes, rows_line = settle_long_rows(config, inputs, accelerator, parallel)
        if accelerator.is_main_process:
            for note in filter(None, (line, rows_line)):
                notify(note)
        batches = plan_batches(config, inputs.train, accelerator)
        run = PreparedRun(
            config=config,
            accelerator=accelerator,
            inputs=inputs,
            batches=batches,
            num_steps=total_steps(config, batches),
            run_dir=run_dir,
            checkpoint=checkpoint,
            patch_plan=inspect_model(inputs.meta_model, config.ops),
            parallel=parallel,
            host_bytes=host_bytes,
            measure_only=options.measure_only,
        )
        _check(run, options)
        yield run


def _settle_compile(
    config: RunConfig,
    source: ModelSource,
    accelerator: Any,
    checkpoint: Path | None,
    options: RunOptions,
) -> RunConfig:
    """Return the configuration with torch_compile decided where that needs no measurement."""
    decision = decide_early(
        config,
        accelerator.device,
        is_quantised=is_quantised(config, source),
        saved=saved_choice(checkpoint),
    )
    # A CPU has no choice: a line in every run would say nothing.
    shown = options.dry_run or device_timer.device_timer(accelerator.device) is not None
    if shown and accelerator.is_main_process:
        if decision is not None:
            notify(decision.line)
        elif options.dry_run:
            notify("torch_compile: auto: measured on the first batch, before the first step")
    return config.model_copy(update={"torch_compile": decision.compiles}) if decision else config


def _check(run: PreparedRun, options: RunOptions) -> None:
    check_step(run.config, run.batches)
    profiled = run.config.profiled_steps
    if profiled and profiled[-1] > run.num_steps:
        raise ConfigError(
            f"profile_steps is {run.config.profile_steps}, and the run has {run.num_steps} steps"
        )
    check_places(run.patch_plan)
    check_tiles(run.config, run.patch_plan, run.inputs.meta_model)
    if options.require:
        report = report_of("train", run.config, run.inputs, run.patch_plan)
        check_required(report, options.require)


def _refuse_several_processes(config: RunConfig, baseline: int) -> None:
    if config.auto_fit:
        raise ConfigError(
            "auto_fit is for one process: the others would wait for the one that ran out"
        )
    if baseline:
        raise ConfigError("--baseline measures one process; this launch has several")
