"""liger compare: the losses, evaluations, speed, memory and settings of runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Directories of runs; the first is the base."),
    ],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw the losses there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Compare runs: losses at the same steps, evaluations, speed, memory and settings.

    A run that is not finished is compared by what it has logged so far.
    """
    from liger_cli.commands.compare.runs import compare_runs
    from liger_cli.commands.compare.tables import loss_chart, show_comparison
    from liger_cli.report.plots import check_plot, draw

    if plot is not None:
        check_plot(plot, "--plot")
    comparison = compare_runs(runs)
    if plot is not None:
        draw(loss_chart(comparison), plot)
    show_comparison(comparison, as_json=as_json)
