"""What every page must be in a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

OpenPage = Callable[..., Any]
_LOOKS = ((400, "light"), (400, "dark"), (1400, "light"), (1400, "dark"))
_AXE_LOOKS = _LOOKS[1:3]  # each width and each scheme once: with 77 classes it takes seconds


def assert_usable(open_page: OpenPage, path: Path) -> None:
    """Nothing juts out, narrow or wide, and axe finds nothing serious, in light and dark."""
    from axe_playwright_python.sync_playwright import Axe

    for width, scheme in _LOOKS:
        page = open_page(path, width=width, scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        if (width, scheme) not in _AXE_LOOKS:
            continue
        found = Axe().run(page).response["violations"]
        serious = {
            one["id"]: one["nodes"][0]["html"]
            for one in found
            if one["impact"] in {"serious", "critical"}
        }
        assert serious == {}, (width, scheme)
