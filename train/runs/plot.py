"""Accuracy over depth as an SVG, written by hand: a drawing library would cost more than it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 48
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444")


def depth_plot(table: Mapping[str, Any]) -> str:
    """Draw a line for each source and pooling, with the 95 % intervals of its layers.

    Args:
        table: what a sweep gives; its single features are drawn.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in table["candidates"]:
        if row["fusion"] == "single":
            feature = row["features"][0]
            name = f"{feature['source']}, {feature['pooling']}"
            lines.setdefault(name, []).append({**row, "layer": feature["layer"]})
    rows = [row for line in lines.values() for row in line]
    low = min(row["accuracy_ci95"][0] for row in rows)
    high = max(row["accuracy_ci95"][1] for row in rows)
    deepest = max(1, *(row["layer"] for row in rows))
    body = [*_axes(low, high, deepest)]
    for index, (name, line) in enumerate(lines.items()):
        points = [_point(row, low, high, deepest) for row in line]
        body += _line(name, points, _COLOURS[index % len(_COLOURS)], index)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
    style = 'font-family="sans-serif" font-size="12">'
    return "\n".join([head + style, *body, "</svg>"]) + "\n"


def _point(
    row: Mapping[str, Any], low: float, high: float, deepest: int
) -> tuple[float, float, float, float]:
    """Give x, y, and the y of both ends of the interval."""
    x = _MARGIN + row["layer"] / deepest * (_WIDTH - 2 * _MARGIN)
    heights = [_y(value, low, high) for value in (row["accuracy"], *row["accuracy_ci95"])]
    return x, heights[0], heights[1], heights[2]


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return _HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN)


def _axes(low: float, high: float, deepest: int) -> list[str]:
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    return [
        f'<path d="M{_MARGIN} {_MARGIN}V{bottom}H{right}" fill="none" stroke="#888"/>',
        f'<text x="{_MARGIN - 6}" y="{_MARGIN + 4}" text-anchor="end">{high:.3f}</text>',
        f'<text x="{_MARGIN - 6}" y="{bottom + 4}" text-anchor="end">{low:.3f}</text>',
        f'<text x="{_MARGIN}" y="{bottom + 18}" text-anchor="middle">0</text>',
        f'<text x="{right}" y="{bottom + 18}" text-anchor="middle">{deepest}</text>',
        f'<text x="{_WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">layer</text>',
        f'<text x="{_MARGIN}" y="24">held-out accuracy with its 95 % interval</text>',
    ]


def _line(
    name: str, points: Sequence[tuple[float, float, float, float]], colour: str, index: int
) -> list[str]:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points)
    bars = "".join(f"M{x:.1f} {bottom:.1f}V{top:.1f}" for x, _, bottom, top in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y, _, _ in points]
    label = f'<text x="{_WIDTH - _MARGIN}" y="{24 + 16 * index}" text-anchor="end" fill="{colour}">'
    return [
        f'<path d="{bars}" stroke="{colour}" stroke-opacity="0.4"/>',
        f'<path d="{path}" fill="none" stroke="{colour}"/>',
        *dots,
        f"{label}{escape(name)}</text>",
    ]
