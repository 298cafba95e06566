"""Bar charts as SVG, made on the server: no script, no asset, no inline style, so any content policy lets them pass.

Pure. Colours are classes of llmsite/static/llmsite/console.css, which knows light and dark. Everything that is
interpolated is escaped; hovering a bar says its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

WIDTH, HEIGHT = 720, 200
LEFT, RIGHT, TOP, BOTTOM = 60, 4, 18, 26
MOST_LABELS = 8
GAP = 0.25
"""Part of a bar's place that stays free."""


@dataclass(frozen=True, slots=True)
class Series:
    """One colour of a chart. tone: a number from 0 on, or a word of the stylesheet such as `bad`."""

    name: str
    values: Sequence[float]
    tone: str


def stacked_bars(
    labels: Sequence[str], series: Sequence[Series], *, title: str, shown: Callable[[float], str]
) -> SafeString:
    """A bar for each label, in it the series upon each other. `shown` words a number; empty series are left out."""
    series = [each for each in series if any(each.values)]
    top = ceiling(max((sum(each.values[place] for each in series) for place in range(len(labels))), default=0))
    return format_html(
        '<figure class="console-chart"><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}{}</svg>{}</figure>',
        WIDTH,
        HEIGHT,
        title,
        _grid(top, shown),
        format_html_join("", "{}", ((each,) for each in _bars(labels, series, top, shown))),
        _labels(labels),
        _legend(series, shown),
    )


def ceiling(highest: float) -> float:
    """The end of the axis: the next 1, 2, 4, 5 or 10 of its power of ten; 1 where there is nothing."""
    if highest <= 0:
        return 1
    power = 1.0
    while power * 10 < highest:
        power *= 10
    while power > highest:
        power /= 10
    return next(power * step for step in (1, 2, 4, 5, 10) if power * step >= highest)


def _height(value: float, top: float) -> float:
    return (HEIGHT - TOP - BOTTOM) * value / top


def _grid(top: float, shown: Callable[[float], str]) -> SafeString:
    lines = []
    for part in (0.0, 0.5, 1.0):
        y = round(HEIGHT - BOTTOM - _height(top * part, top), 1)
        lines.append((LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, shown(top * part)))
    return format_html_join(
        "",
        '<line x1="{}" x2="{}" y1="{}" y2="{}" class="chart-line"/>'
        '<text x="{}" y="{}" text-anchor="end" class="chart-text">{}</text>',
        lines,
    )


def _place(number: int, count: int) -> tuple[float, float]:
    """(left edge, width) of a bar."""
    width = (WIDTH - LEFT - RIGHT) / max(1, count)
    return LEFT + width * (number + GAP / 2), width * (1 - GAP)


def _bars(
    labels: Sequence[str], series: Sequence[Series], top: float, shown: Callable[[float], str]
) -> list[SafeString]:
    found = []
    for number, label in enumerate(labels):
        x, width = _place(number, len(labels))
        y = float(HEIGHT - BOTTOM)
        parts = []
        for each in series:
            value = each.values[number]
            if value <= 0:
                continue
            height = _height(value, top)
            y -= height
            parts.append((each.tone, round(x, 1), round(y, 1), round(width, 1), round(max(height, 0.5), 1)))
        said = [f"{each.name}: {shown(each.values[number])}" for each in series if each.values[number] > 0]
        rects = format_html_join("", '<rect class="chart-{}" x="{}" y="{}" width="{}" height="{}"/>', parts)
        if parts:
            found.append(format_html("<g><title>{}</title>{}</g>", "\n".join([label, *said]), rects))
    return found


def _labels(labels: Sequence[str]) -> SafeString:
    every = -(-len(labels) // MOST_LABELS)
    rows = []
    for number in range(0, len(labels), max(1, every)):
        x, width = _place(number, len(labels))
        rows.append((round(x + width / 2, 1), HEIGHT - 6, labels[number]))
    return format_html_join("", '<text x="{}" y="{}" text-anchor="middle" class="chart-text">{}</text>', rows)


def _legend(series: Sequence[Series], shown: Callable[[float], str]) -> SafeString:
    rows = [(each.tone, each.name, shown(sum(each.values))) for each in series]
    items = format_html_join(
        "",
        '<li><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="chart-{}" width="10" height="10" rx="2"/></svg>'
        "{} <strong>{}</strong></li>",
        rows,
    )
    return format_html("<figcaption><ul>{}</ul></figcaption>", items) if rows else SafeString("")
