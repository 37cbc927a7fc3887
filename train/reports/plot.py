"""Accuracy over depth as an SVG, written by hand: a drawing library would cost more than it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 48
_BOTTOM, _RIGHT = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444")


def depth_plot(table: Mapping[str, Any]) -> str:
    """Draw of a sweep's single features a line for each source and pooling, with 95 % intervals."""
    singles = [row for row in table["candidates"] if row["fusion"] == "single"]
    low = min(row["accuracy_ci95"][0] for row in singles)
    high = max(row["accuracy_ci95"][1] for row in singles)
    deepest = max(1, *(row["features"][0]["layer"] for row in singles))
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row in singles:
        feature = row["features"][0]
        x = _MARGIN + feature["layer"] / deepest * (_WIDTH - 2 * _MARGIN)
        heights = [_y(value, low, high) for value in (row["accuracy"], *row["accuracy_ci95"])]
        lines.setdefault(f"{feature['source']}, {feature['pooling']}", []).append((x, *heights))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
    parts = [
        head + 'font-family="sans-serif" font-size="12">',
        f'<path d="M{_MARGIN} {_MARGIN}V{_BOTTOM}H{_RIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{_MARGIN - 6}" y="{_MARGIN + 4}" text-anchor="end">{high:.3f}</text>',
        f'<text x="{_MARGIN - 6}" y="{_BOTTOM + 4}" text-anchor="end">{low:.3f}</text>',
        f'<text x="{_MARGIN}" y="{_BOTTOM + 18}" text-anchor="middle">0</text>',
        f'<text x="{_RIGHT}" y="{_BOTTOM + 18}" text-anchor="middle">{deepest}</text>',
        f'<text x="{_WIDTH / 2}" y="{_BOTTOM + 34}" text-anchor="middle">layer</text>',
        f'<text x="{_MARGIN}" y="24">held-out accuracy with its 95 % interval</text>',
    ]
    for index, (name, points) in enumerate(lines.items()):
        colour, y = _COLOURS[index % len(_COLOURS)], 24 + 16 * index
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points)
        bars = "".join(f"M{x:.1f} {bottom:.1f}V{top:.1f}" for x, _, bottom, top in points)
        parts += [
            f'<path d="{bars}" stroke="{colour}" stroke-opacity="0.4"/>',
            f'<path d="{path}" fill="none" stroke="{colour}"/>',
            *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y, *_ in points),
            f'<text x="{_RIGHT}" y="{y}" text-anchor="end" fill="{colour}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return _BOTTOM - share * (_HEIGHT - 2 * _MARGIN)
