"""Charts as SVG: bars and curves with axes, units and a text for those who cannot see them.

Colours are classes, s0 to s7, which the page sets for light and dark; text is escaped by Markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from liger_cli.common.numbers import format_count
from liger_cli.common.text import printable
from liger_cli.report.charts import BarChart, Curves

__all__ = ["bars_svg", "curves_svg"]

# Of text of 12 px, on average; a label that is a little wider than that still has room.
_CHAR_WIDTH = 6.8
_ROW_HEIGHT = 46
_BAR_HEIGHT = 14
# Points of one curve: more would not be seen apart, and each costs bytes of the page.
_MAX_POINTS = 300
_MAX_DOTS = 40


def bars_svg(chart: BarChart, *, width: int = 360) -> Markup:
    """Return horizontal bars from zero, each below its name and figure."""
    ends = [bar.high or bar.value or 0.0 for bar in chart.bars]
    scale = _ticks(0.0, max([*ends, chart.reference or 0.0]) or 1.0, 4)
    bottom = _ROW_HEIGHT * len(chart.bars)
    left, right = 2.0, width - 20.0

    def x(value: float) -> float:
        return left + (right - left) * value / scale[-1]

    parts = [_x_axis(scale, x, 0, bottom, chart.unit, width)]
    for number, bar in enumerate(chart.bars):
        top = number * _ROW_HEIGHT
        parts.append(_text(left, top + 16, bar.name, "name"))
        if bar.value is None:
            parts.append(_text(left, top + 34, bar.text, "note"))
            continue
        parts.append(_text(right, top + 16, bar.text, "value", anchor="end"))
        parts.append(
            Markup(
                '<rect class="bar s{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"/>'
            ).format(bar.color, left, top + 23, max(x(bar.value) - left, 1), _BAR_HEIGHT)
        )
        if chart.reference is not None:
            at = x(chart.reference)
            parts.append(_path("reference", [(at, top + 19), (at, top + 27 + _BAR_HEIGHT)]))
        if bar.low is not None and bar.high is not None:
            parts.append(_whisker(x(bar.low), x(bar.high), top + 23 + _BAR_HEIGHT / 2))
    return _svg(parts, width, bottom + 38, chart.alternative)


def curves_svg(chart: Curves, *, width: int = 360, height: int = 240) -> Markup:
    """Return the curves over their axes; the legend is the page's."""
    curves = {name: _thinned(sorted(points.items())) for name, points in chart.lines.items()}
    xs = [x for points in chart.lines.values() for x in points]
    ys = [y for points in curves.values() for row in points for y in row[2:]]
    y_ticks = _ticks(min([0.0, *ys]) if chart.from_zero else min(ys), max(ys), 5)
    labels = _tick_texts(y_ticks)
    left = 10 + _CHAR_WIDTH * max(map(len, labels))
    right, top, bottom = width - 14.0, 28.0, height - 38.0
    x_ticks = (
        sorted(set(xs)) if chart.is_log_x else _ticks(min(xs), max(xs), width // 60, least=1.0)
    )
    # The axis ends where the data do: a rounded one would leave room for steps that never were.
    x_ticks = [tick for tick in x_ticks if min(xs) <= tick <= max(xs)]
    x = _scale(min(xs), max(xs), left, right, is_log=chart.is_log_x)
    y = _scale(y_ticks[0], y_ticks[-1], bottom, top)

    parts = [_text(0, 12, chart.y_label, "axis-title")]
    for tick, label in zip(y_ticks, labels, strict=True):
        parts.append(_path("grid-line", [(left, y(tick)), (right, y(tick))]))
        parts.append(_text(left - 6, y(tick) + 4, label, "tick", anchor="end"))
    parts.append(_x_axis(x_ticks, x, bottom, bottom, chart.x_label, width))
    for name, points in curves.items():
        color = chart.color(name)
        if any(low != high for _, _, low, high in points):
            edge = [(x(at), y(high)) for at, _, _, high in points]
            edge += [(x(at), y(low)) for at, _, low, _ in reversed(points)]
            parts.append(_path(f"band s{color}", edge))
        parts.append(_path(chart.css_class(name), [(x(at), y(mean)) for at, mean, _, _ in points]))
        if len(points) == 1 or color and len(points) <= _MAX_DOTS:
            parts += [
                _dot(x(at), y(mean), color, f"{name}: {chart.x_label} {at}, {mean:.6g}")
                for at, mean, _, _ in points
            ]
    return _svg(parts, width, height, chart.alternative)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float, float, float]]:
    """x, mean, smallest and largest of each of at most _MAX_POINTS neighbourhoods."""
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size else []
    values = [(group[len(group) // 2][0], [y for _, y in group]) for group in groups]
    return [(at, sum(ys) / len(ys), min(ys), max(ys)) for at, ys in values]


def _ticks(low: float, high: float, count: int, *, least: float = 0.0) -> list[float]:
    """About count round numbers, at least so far apart, from low or below to high or above."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    if max(map(abs, ticks)) >= 1e4:
        return [format_count(tick) for tick in ticks]
    return [f"{0.0 if abs(tick) < 1e-12 else tick:.6g}" for tick in ticks]


def _scale(
    low: float, high: float, start: float, end: float, *, is_log: bool = False
) -> Callable[[float], float]:
    def position(value: float) -> float:
        ends = (low, high, value)
        first, last, at = map(math.log, ends) if is_log else ends
        return start + (end - start) * ((at - first) / (last - first) if last > first else 0.5)

    return position


def _x_axis(
    ticks: Sequence[float],
    x: Callable[[float], float],
    top: float,
    bottom: float,
    title: str,
    width: float,
) -> Markup:
    parts, free = [], -math.inf
    for tick, label in zip(ticks, _tick_texts(ticks), strict=True):
        half = _CHAR_WIDTH * len(label) / 2
        at = min(max(x(tick), half), width - half)
        parts.append(_path("grid-line", [(x(tick), top), (x(tick), bottom + 4)]))
        # Of labels that would touch, as on an axis of powers, the first stays.
        if at - half > free:
            parts.append(_text(at, bottom + 17, label, "tick", anchor="middle"))
            free = at + half + _CHAR_WIDTH
    parts.append(_text(width - 2, bottom + 33, title, "axis-title", anchor="end"))
    return Markup("").join(parts)


def _whisker(low: float, high: float, at: float) -> Markup:
    ends = [f"M{x:.1f} {at - 5:.1f}V{at + 5:.1f}" for x in (low, high)]
    path = f"M{low:.1f} {at:.1f}H{high:.1f}" + "".join(ends)
    return Markup('<path class="whisker" d="{}"/>').format(path)


def _path(name: str, points: Iterable[tuple[float, float]]) -> Markup:
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return Markup('<path class="{}" d="M{}"/>').format(name, steps)


def _dot(x: float, y: float, color: int, title: str) -> Markup:
    return Markup(
        '<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}</title></circle>'
    ).format(color, x, y, printable(title))


def _text(x: float, y: float, text: str, name: str, *, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        name, x, y, anchor, printable(text)
    )


def _svg(parts: Iterable[Markup], width: float, height: float, alternative: str) -> Markup:
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        width, height, printable(alternative), Markup("").join(parts)
    )
