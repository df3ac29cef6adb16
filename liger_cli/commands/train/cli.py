"""liger train: fine-tunes a model and reports what was patched and what that gained."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from liger_cli.common.readers import expand_path
from liger_cli.common.text import shorten
from liger_cli.config import RunConfig, config_flags
from liger_cli.errors import ConfigError
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


def _file_of_run(arguments: dict[str, Any]) -> Path | None:
    """Return the configuration of the run, or of the checkpoint's run, that --resume names."""
    resume = arguments["resume"]
    if resume is None or resume == "auto":
        return None
    found = expand_path(resume, "--resume")
    if not found.exists():
        raise ConfigError(f"--resume {shorten(resume)}: there is no checkpoint of this name")
    # The folder of a run that has lost its file may hold another program's config.yaml.
    file = (found.parent if found.name.startswith("checkpoint-") else found) / "config.yaml"
    return file if file.is_file() else None


@functools.partial(config_flags, file_of=_file_of_run)
def command(
    config: RunConfig,
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

    from liger_cli.commands.train.prepare import RunOptions
    from liger_cli.commands.train.run import run_train
    from liger_cli.report import show_report
    from liger_cli.report.required_ops import check_required

    options = RunOptions(baseline, require, resume, dry_run)
    report = run_train(config, options)
    if report is not None:
        show_report(report, as_json=as_json, is_result=report.train is not None)
        check_required(report, require, is_reported=True)
