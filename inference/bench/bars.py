"""Horizontal bars as SVG text: groups of a few bars each, from zero, with their values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from inference.bench.chart import COLOURS

WIDTH, LABELS, VALUES = 840, 330, 90
TOP, BAR, GAP, GROUP = 52, 13, 2, 12


@dataclass(frozen=True, slots=True)
class Group:
    """Values of the series in their order; None where there is none."""

    label: str
    values: Sequence[float | None]


def draw(title: str, series: Sequence[str], groups: Sequence[Group]) -> str:
    """One chart. Raises ValueError without a single value above zero."""
    most = max((value for group in groups for value in group.values if value is not None), default=0.0)
    if most <= 0:
        raise ValueError(f"nothing to draw in {title!r}")
    parts = [_text(12, 20, title, size=13)]
    parts += [
        _text(LABELS + index * 150, 40, f"■ {name}", colour=COLOURS[index % len(COLOURS)])
        for index, name in enumerate(series)
    ]
    y = float(TOP)
    for group in groups:
        shown = [(index, value) for index, value in enumerate(group.values) if value is not None]
        height = len(shown) * (BAR + GAP)
        parts.append(_text(LABELS - 8, y + height / 2 + 4, group.label, anchor="end"))
        for index, value in shown:
            width = max(1.0, value / most * (WIDTH - LABELS - VALUES))
            name = f"<title>{escape(series[index])}</title>"
            colour = COLOURS[index % len(COLOURS)]
            parts.append(
                f'<g>{name}<rect x="{LABELS}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" fill="{colour}"/></g>'
            )
            parts.append(_text(LABELS + width + 5, y + BAR - 2, f"{value:.3g}"))
            y += BAR + GAP
        y += GROUP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}" '
        f'font-family="sans-serif" font-size="11"><rect width="{WIDTH}" height="{y:.0f}" fill="#ffffff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, colour: str = "#333333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
