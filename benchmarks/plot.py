"""Curves over epochs as one SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, EDGE = 420, 280, 52
COLOURS = ("#1f6feb", "#d1570a", "#2da44e")


@dataclass(frozen=True)
class Curve:
    """Values after epoch 1, 2, ... under a name."""

    name: str
    values: Sequence[float]


def svg(panels: Sequence[tuple[str, Sequence[Curve], Mapping[str, float]]]) -> str:
    """Panels side by side.

    Args:
        panels: of each its title, its curves, and values to draw as dashed lines, by name.
    """
    parts = [_panel(*panel, left=place * WIDTH) for place, panel in enumerate(panels)]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    body = "\n".join((background, *parts))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def _panel(title: str, curves: Sequence[Curve], levels: Mapping[str, float], left: int) -> str:
    values = [v for curve in curves for v in curve.values] + list(levels.values())
    low, high = min(values), max(values)
    room = 0.05 * ((high - low) or 1.0)
    low, high = low - room, high + room
    count = max(len(curve.values) for curve in curves)

    def across(epoch: float) -> float:
        return left + EDGE + (epoch - 1) / max(count - 1, 1) * (WIDTH - 2 * EDGE)

    def down(value: float) -> float:
        return HEIGHT - EDGE - (value - low) / (high - low) * (HEIGHT - 2 * EDGE)

    made = [f'<text x="{left + EDGE}" y="24" font-size="14">{escape(title)}</text>']
    for step in range(5):
        value = low + (high - low) * step / 4
        y = down(value)
        ends = f'x1="{across(1):.1f}" x2="{across(max(count, 2)):.1f}"'
        made.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        place = f'x="{left + EDGE - 6}" y="{y + 4:.1f}"'
        made.append(f'<text {place} text-anchor="end">{value:.3g}</text>')
    for epoch in range(1, count + 1):
        place = f'x="{across(epoch):.1f}" y="{HEIGHT - EDGE + 16}"'
        made.append(f'<text {place} text-anchor="middle">{epoch}</text>')
    for name, value in levels.items():
        ends = f'x1="{across(1):.1f}" x2="{across(max(count, 2)):.1f}"'
        y = down(value)
        made.append(
            f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" stroke="#555" stroke-dasharray="5 4"/>'
        )
        made.append(f'<text x="{across(1) + 4:.1f}" y="{y - 4:.1f}">{escape(name)}</text>')
    for number, (curve, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        points = " ".join(
            f"{across(epoch):.1f},{down(value):.1f}" for epoch, value in enumerate(curve.values, 1)
        )
        made.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = f'x="{left + EDGE + 120 * number}" y="{HEIGHT - 12}"'
        made.append(f'<text {at} fill="{colour}">{escape(curve.name)}</text>')
    return "\n".join(made)
