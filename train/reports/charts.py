"""Pictures as SVG: inside a page they take its colours, alone they bring their own.

Drawn by matplotlib, without pyplot. Texts stay texts. A picture is drawn in stand-in colours, which
then become the variables of `templates/colours.css`: it follows the page from light to dark.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from llmembed.train.reports.page import COLOURS, plain

_SIZE_INCHES, _DPI = (5.6, 3.5), 72  # of matplotlib's SVG, whose unit is 1/72 inch
_STAND_INS = {
    "#010101": "var(--ink)",
    "#010102": "var(--soft)",
    "#010103": "var(--line)",
    **{f"#01020{k}": f"var(--c{k})" for k in range(6)},
}
_INK, _SOFT, _LINE, *_COLOURS = _STAND_INS
_LOOK: Any = {  # settings of matplotlib
    **dict.fromkeys(("text.color", "axes.labelcolor", "legend.labelcolor"), _INK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), _SOFT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "text.parse_math"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "axes.facecolor": "none",
    "grid.color": _LINE,
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
}
_MARKERS = "os^Dvx"  # colours alone tell too little
_MOST_MARKS = 60


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one thing in a picture."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Lower ends of intervals around `y`; none means no intervals."""
    high: Sequence[float] = ()
    n: Sequence[int] = ()
    """Rows that each point is about; none means not told."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture and its numbers."""

    title: str
    caption: str
    svg: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __html__(self) -> str:
        """Give the SVG as markup, which it is."""
        return self.svg

    def alone(self) -> str:
        """Give the SVG as a file of its own, in the light colours of the pages."""
        light = dict(re.findall(r"(--\w+): (#\w+)", COLOURS.partition("@media")[0]))
        drawn = re.sub(r"var\((--\w+)\)", lambda found: light[found[1]], self.svg)
        page = f'<rect width="100%" height="100%" fill="{light["--page"]}"/>'
        return drawn.replace("</desc>", f"</desc>{page}", 1) + "\n"


def line_chart(
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    bars: bool = False,
    diagonal: bool = False,
) -> Chart:
    """Draw lines, or bars side by side, over one axis.

    Args:
        title: names the picture; unique on its page.
        caption: what it shows, in a sentence.
        lines: at least one.
        x: what is measured along the horizontal axis.
        y: what is measured along the vertical axis.
        bars: draw bars from 0 instead of lines.
        diagonal: draw where both are equal, both from 0 to 1.
    """

    def draw(axes: Any) -> None:
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_SOFT, linestyle="--", linewidth=1)
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for k, one in enumerate(lines):
            colour, marker = _COLOURS[k % len(_COLOURS)], _MARKERS[k % len(_MARKERS)]
            label = f" {plain(one.name)}"  # matplotlib leaves out what begins with _
            if bars:
                width = 0.8 / len(lines)
                shift = (k + 0.5) * width - 0.4
                axes.bar([at + shift for at in one.x], one.y, width, color=colour, label=label)
                continue
            if one.low:
                axes.vlines(one.x, one.low, one.high, color=colour, alpha=0.45, linewidth=1.5)
            style = {"markersize": 4} if len(one.x) <= _MOST_MARKS else {"marker": ""}
            axes.plot(one.x, one.y, **{"marker": marker, **style}, color=colour, label=label)
        axes.set(xlabel=plain(x), ylabel=plain(y))
        if all(isinstance(at, int) for one in lines for at in one.x):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if bars:
            axes.margins(x=0.2)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=11)

    first = lines[0]
    more = [*(["95 % from", "to"] if first.low else []), *(["rows"] if first.n else [])]
    heads = ["", x, y, *more]
    rows = [
        [one.name, *point]
        for one in lines
        for point in zip(*filter(len, (one.x, one.y, one.low, one.high, one.n)), strict=True)
    ]
    if len(lines) == 1:
        heads, rows = heads[1:], [row[1:] for row in rows]
    svg = _drawn(title, caption, draw)
    return Chart(title=title, caption=caption, svg=svg, heads=heads, rows=rows)


def lines_over_depth(points: Iterable[tuple[Any, ...]]) -> list[Line]:
    """Make a line over the layers for each source and pooling.

    Args:
        points: of each a feature as JSON has it, its value, and the ends of an interval, if any.
    """
    groups: dict[str, list[tuple[Any, ...]]] = {}
    for feature, *values in points:
        name = f"{feature['source']}, {feature['pooling']}"
        groups.setdefault(name, []).append((feature["layer"], *values))
    lines = []
    for name, own in groups.items():
        x, y, *ends = zip(*sorted(own), strict=True)
        low, high = ends or ((), ())
        lines.append(Line(name=name, x=x, y=y, low=low, high=high))
    return lines


def depth_chart(table: Mapping[str, Any]) -> Chart:
    """Draw of a sweep's single features a line for each source and pooling."""
    singles = [row for row in table["candidates"] if row["fusion"] == "single"]
    if any("nll" in row for row in singles):
        return line_chart(
            "Loss over depth",
            "Mean surprise at the labels of held-out training rows, of each single layer.",
            lines_over_depth([(row["features"][0], row["nll"]) for row in singles]),
            x="layer",
            y="held-out NLL",
        )
    points = [(row["features"][0], row["accuracy"], *row["accuracy_ci95"]) for row in singles]
    lines = lines_over_depth(points)
    return line_chart(
        "Accuracy over depth",
        "Accuracy of each single layer on held-out training rows, with its 95 % interval.",
        lines,
        x="layer",
        y="held-out accuracy",
    )


def _drawn(title: str, caption: str, draw: Callable[[Any], None]) -> str:
    """Draw on axes; the SVG has a name and a description for who does not see it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**_LOOK, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the viewer's fonts draw it
        canvas: Any = FigureCanvasSVG(Figure(_SIZE_INCHES, _DPI, facecolor="none", layout="tight"))
        draw(canvas.figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.print_svg(file, metadata=nothing)
    svg = file.getvalue()
    name = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'<defs>\s*<style type="text/css">.*?</style>\s*</defs>', "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for colour, variable in _STAND_INS.items():
        svg = svg.replace(colour, variable)
    width, height = (round(side * _DPI) for side in _SIZE_INCHES)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-t {name}-d" '
        'stroke-linejoin="round">'
        f'<title id="{name}-t">{escape(plain(title))}</title>'
        f'<desc id="{name}-d">{escape(plain(caption))}</desc>'
    )
    return head + svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
