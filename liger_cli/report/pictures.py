"""The charts of a report as picture files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from liger_cli.common.outputs import replacing
from liger_cli.errors import ConfigError
from liger_cli.report.charts import (
    BarChart,
    Curves,
    ablation_charts,
    arm_charts,
    loss_charts,
    step_charts,
    sweep_charts,
)
from liger_cli.report.plots import check_plot, draw, plain_names
from liger_cli.report.summary import SavedReport

__all__ = ["write_pictures"]


def write_pictures(saved: SavedReport, path: Path) -> list[Path]:
    """Return the files that it drew: every chart into a directory, or the first into a .png.

    Raises:
        ConfigError: The report has nothing to draw.
        EnvironmentProblem: matplotlib is missing.
    """
    report = saved.report
    charts: Sequence[BarChart | Curves] = [
        *arm_charts(report),
        *sweep_charts(report),
        *ablation_charts(report),
        *loss_charts(report),
        *step_charts(saved.steps, saved.evaluations),
    ]
    if not charts:
        raise ConfigError("--png: this report has no figures over arms or steps to draw")
    files = [path]
    if not path.suffix:
        names = [chart.title.lower().replace(" ", "-") for chart in charts]
        files = [path / f"{name}.png" for name in names]
    check_plot(files[0], "--png")
    for chart, file in zip(charts, files, strict=False):
        if isinstance(chart, Curves):
            draw(chart, file)
        else:
            _draw_bars(chart, file)
    return files


@plain_names
def _draw_bars(chart: BarChart, path: Path) -> None:
    # Without pyplot there is no window, no display and no state that other charts share.
    figure: Any = import_module("matplotlib.figure").Figure(
        figsize=(8, 1.2 + 0.5 * len(chart.bars)), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot(xlabel=chart.unit, title=chart.title)
    bars = list(reversed(chart.bars))
    spread = [
        [(bar.value or 0.0) - (bar.low or bar.value or 0.0) for bar in bars],
        [(bar.high or bar.value or 0.0) - (bar.value or 0.0) for bar in bars],
    ]
    drawn = axes.barh(
        [bar.name for bar in bars], [bar.value or 0.0 for bar in bars], xerr=spread, capsize=3
    )
    axes.bar_label(drawn, [bar.text for bar in bars], padding=4)
    axes.margins(x=0.2)
    with replacing(path) as unfinished:
        figure.savefig(unfinished)
