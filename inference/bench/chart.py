"""A line chart as SVG text: a few series over the number of clients, logarithmic both ways. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 40, 44
COLOURS = ("#0b6e4f", "#c1440e", "#3a5a98", "#7a7a7a")


@dataclass(frozen=True, slots=True)
class Series:
    """points: (x, y) pairs with x and y above 0."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    series: Sequence[Series]


def draw(panels: Sequence[Panel], x_label: str) -> str:
    """Panels side by side. Raises ValueError without a single point."""
    width = WIDTH * len(panels)
    body = "".join(
        f'<g transform="translate({index * WIDTH},0)">{_panel(panel, x_label)}</g>'
        for index, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>{body}</svg>\n'
    )


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten that enclose the range."""
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [factor * 10.0**power for factor in (1, 2, 5)]
    below = max((tick for tick in found if tick <= low), default=low)
    above = min((tick for tick in found if tick >= high), default=high)
    inside = [tick for tick in found if below <= tick <= above]
    return inside if len(inside) > 1 else [below, below * 10]


def _panel(panel: Panel, x_label: str) -> str:
    points = [point for series in panel.series for point in series.points]
    if not points:
        raise ValueError(f"nothing to draw in {panel.title!r}")
    xs = sorted({x for x, _ in points})
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def across(x: float) -> float:
        return LEFT + _share(x, xs[0], xs[-1]) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - _share(y, y_ticks[0], y_ticks[-1]) * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 18, panel.title, size=13)]
    for tick in y_ticks:
        parts.append(_line(LEFT, down(tick), WIDTH - RIGHT, down(tick), "#dddddd"))
        parts.append(_text(LEFT - 6, down(tick) + 4, f"{tick:g}", anchor="end"))
    parts += [_text(across(x), HEIGHT - BOTTOM + 16, f"{x:g}", anchor="middle") for x in xs]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, anchor="middle"))
    for index, series in enumerate(panel.series):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(_series(series, [(across(x), down(y)) for x, y in series.points], colour))
        parts.append(_text(LEFT + 6 + index * 120, 33, f"● {series.label}", colour=colour))
    return "".join(parts)


def _share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low) if high > low else 0.5


def _series(series: Series, points: list[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)
    name = f"<title>{escape(series.label)}</title>"
    return f'<g>{name}<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}</g>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, colour: str = "#333333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
