"""Charts as picture files. matplotlib is imported only where one is drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec

from liger_cli.common.optional_packages import require_package
from liger_cli.common.outputs import check_writable, replacing
from liger_cli.errors import ConfigError

__all__ = ["Chart", "check_plot", "draw", "plain_names"]

_Args = ParamSpec("_Args")

_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        lines: y by x of each curve, by its name in the legend.
        marks: Points of a curve's colour, by the name of the curve; marks_label says what they are.
    """

    x_label: str
    y_label: str
    lines: Mapping[str, Mapping[int, float]]
    marks: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    marks_label: str = ""


def check_plot(path: Path, what: str) -> None:
    """Find out whether a chart can be drawn, before there is something to draw.

    Args:
        path: The picture.
        what: The flag that asks for it.

    Raises:
        ConfigError: The name has no ending of a picture.
        EnvironmentProblem: matplotlib is missing, or the file cannot be written.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{what} {path} should end in {', '.join(_SUFFIXES)}")
    require_package("matplotlib.figure", what, "pip install 'liger-kernels[plots]'")
    check_writable(path, what)


def plain_names(function: Callable[_Args, None]) -> Callable[_Args, None]:
    """Give a function that draws text in which a $ begins no formula."""

    @functools.wraps(function)
    def drawing(*args: _Args.args, **options: _Args.kwargs) -> None:
        with import_module("matplotlib").rc_context({"text.parse_math": False}):
            function(*args, **options)

    return drawing


@plain_names
def draw(chart: Chart, path: Path) -> None:
    """Draw a chart into a file of the kind of its suffix."""
    # Without pyplot there is no window, no display and no state that other charts share.
    figure: Any = import_module("matplotlib.figure").Figure(
        figsize=(8, 4.5), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot(xlabel=chart.x_label, ylabel=chart.y_label)
    # Each is thinner than the one before it, which it would hide where they are equal.
    widths = [1.2 + min(1.6, 5 / len(chart.lines)) * n for n in range(len(chart.lines))]
    for (name, points), width in zip(chart.lines.items(), reversed(widths), strict=True):
        axes.plot(*_columns(points), label=name, linewidth=width)
        if marks := chart.marks.get(name):
            color, label = axes.lines[-1].get_color(), f"{name}: {chart.marks_label}"
            axes.plot(*_columns(marks), "o", color=color, label=label, markeredgecolor="black")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished)


def _columns(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(points.keys()), list(points.values())
