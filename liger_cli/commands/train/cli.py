"""liger train: fine-tunes a model and reports what was patched and what that gained."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from liger_cli.commands.train.resumed_file import file_of_run
from liger_cli.config import Launch, RunConfig, config_flags, launch_flags
from liger_cli.training.launch.start import launch_ranks
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


@functools.partial(config_flags, file_of=file_of_run)
@launch_flags
def command(
    config: RunConfig,
    launch: Launch,
    baseline: Annotated[
        int,
        typer.Option(
            "--baseline", metavar="N", min=0, help="First run N eager steps to measure the gain."
        ),
    ] = 0,
    require: Annotated[
        str,
        typer.Option(
            "--require", metavar="OPS", help="Exit 7 unless these are patched throughout."
        ),
    ] = "",
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            help="Resume from a checkpoint of the run; PATH gives its keys.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show plan, coverage and the first batch; no training."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Fine-tune a model with fused kernels and measure what they gain."""
    # Before torch and transformers are imported.
    check_model_name(config.model)
    if launch_ranks(launch, use_cpu=config.use_cpu):
        return

    from liger_cli.commands.train.prepare import RunOptions
    from liger_cli.commands.train.publish import publish_run
    from liger_cli.commands.train.run import run_train
    from liger_cli.report import show_report
    from liger_cli.report.required_ops import check_required

    options = RunOptions(baseline, require, resume, dry_run)
    report = run_train(config, options)
    if report is not None:
        show_report(report, as_json=as_json, is_result=report.train is not None)
        check_required(report, require, is_reported=True)
        publish_run(report)
