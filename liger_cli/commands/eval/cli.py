"""liger eval: loss, perplexity and token accuracy of a model on a dataset."""

from __future__ import annotations

from typing import Annotated

import typer

from liger_cli.config import Launch, RunConfig, config_flags, launch_flags
from liger_cli.training.launch.start import launch_ranks
from liger_cli.training.model.names import check_model_name

__all__ = ["command"]


@config_flags
@launch_flags
def command(
    config: RunConfig,
    launch: Launch,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Loss, perplexity and token accuracy of a model, without making logits."""
    # Before torch and transformers are imported.
    check_model_name(config.model)
    if launch_ranks(launch, use_cpu=config.use_cpu):
        return

    from liger_cli.commands.eval.run import run_eval
    from liger_cli.report import show_report

    report = run_eval(config)
    if report is not None:
        show_report(report, as_json=as_json, is_result=True)
