"""The site of docs/, as people read it."""

from __future__ import annotations

import functools
import http.server
import importlib
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly where no other machine can be reached."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures of every page lie beside it."""
    loaded = {
        link
        for page in site.rglob("*.html")
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        for link in re.findall(r'(?:src|href)="?([^"\s>]+)', tag)
    }
    assert loaded
    assert not {link for link in loaded if link.startswith(("http:", "https:", "//"))}


def test_the_site_has_every_command_and_public_name(site: Path) -> None:
    """The references have a heading for each command, and for each name of the packages."""
    commands = re.findall(r'<h2 id="([\w-]+)"', (site / "commands.html").read_text())
    assert commands == [*SCRIPTS]
    names = {*re.findall(r'<h3 id="\w+">(\w+)', (site / "python.html").read_text())}
    assert names == {
        name
        for package in ("cache_format", "extract", "train")
        for name in importlib.import_module(f"llmembed.{package}").__all__
    }


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served from, on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_site_is_searched_without_the_network(browser: Browser, address: str) -> None:
    """A word finds its page, no other machine is asked, and no page juts out on a phone."""
    page = browser.new_page(viewport={"width": 400, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    ours = (address, f"blob:{address}")
    page.on("request", lambda one: one.url.startswith(ours) or complaints.append(one.url))
    for name in ("index", "tutorial", "tour", "commands", "python", "figures"):
        page.goto(f"{address}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth") == 400, name
    page.set_viewport_size({"width": 1400, "height": 900})
    page.locator("input[name=query]").click()
    page.keyboard.type("requeued")
    # While it is typed, pages are found by the first letters.
    found = page.locator(".md-search-result__link[href*='h=requeued']").first
    assert "scaling.html" in (found.get_attribute("href", timeout=30_000) or "")
    page.close()
    assert complaints == []
