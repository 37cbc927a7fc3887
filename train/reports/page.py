"""Pages that stand alone: a template with its style and script inside, and nothing loaded.

Names and texts are data: they are escaped, and what a browser would obey or hide (controls, changes
of direction) is shown escaped. A policy in the page lets no other script run and no request leave.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_CHARACTERS = 300
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


COLOURS = _read("colours.css")
"""Variables of the style, for light, then for dark."""


def render(template: str, **values: Any) -> str:
    """Fill a template of `templates/`, which extends `base.html.j2`."""
    return _environment().get_template(template).render(**values)


def figure(value: Any) -> str:
    """Write a value as tables show it.

    >>> [figure(value) for value in (1234, 0.5, True, None, ["a", "b"])]
    ['1,234', '0.5000', 'yes', '-', 'a, b']
    """
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            if abs(value) >= 10:
                return f"{value:,.1f}"
            return f"{value:.4f}" if abs(value) >= 1e-4 or not value else f"{value:.3g}"
        case list() | tuple():
            return short(", ".join(map(str, value)))
        case _:
            return short(str(value))


def short(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Cut a text that is too long for a table, and say how long it is.

    >>> short("abc" * 1000, 4)
    'abca… (3,000 characters)'
    """
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def plain(value: Any) -> Any:
    r"""Escape what a browser would obey or hide in a text that is no markup.

    >>> print(plain(chr(27) + "[31mred" + chr(0x202E)))
    \x1b[31mred\u202e
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), value)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = COLOURS + _read("style.css"), _read("sort.js")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(
        style=Markup(style),  # noqa: S704 - our own files
        script=Markup(script),  # noqa: S704
        script_hash=f"sha256-{digest}",
    )
    environment.filters.update(figure=figure, short=short)
    return environment
