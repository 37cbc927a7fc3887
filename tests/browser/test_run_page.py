from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from browsing import OpenPage, assert_usable
from clustered import LABELS, clustered, write_cache

from llmembed.train import FitConfig, SweepConfig, fit, run_sweep
from llmembed.train.reports.run_page import report_page

N_MANY = 77
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "\x1b[31mred\x00",
    "\u202eright to left",
    "شكوى عن الفاتورة",
    "very long " * 1000,
    "{{ 7 * 7 }} $x^2$",
)
KINDS = ("two", "three", "many")


@pytest.fixture(scope="session", params=KINDS)
def page_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run: of two classes with curves, of three beside a sweep, of many, hostile."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    cache, output = folder / "c.zarr", folder / "run"
    if kind == "two":
        splits = {"train": clustered(90, 0, n_classes=2), "test": clustered(60, 1, n_classes=2)}
        write_cache(cache, splits, labels=("no", "yes"))
        options = {"fusion": "cooc", "epochs": 4, "n_seeds": 2}
    elif kind == "three":
        write_cache(cache, labels=LABELS)
        run_sweep(SweepConfig(cache=str(cache), output=str(folder / "sweep")))
        options = {"fusion": "auto"}
    else:
        names = [*HOSTILE, *(f"class number {k}" for k in range(len(HOSTILE), N_MANY))]
        of = {"n_classes": N_MANY}
        splits = {"train": clustered(1540, 0, **of), "test": clustered(3000, 1, **of)}
        write_cache(cache, splits, labels=names)
        options = {"fusion": "concat", "head": "lda"}
    run = fit(FitConfig(cache=str(cache), output=str(output), **options))
    path = output / "report.html"
    if kind == "many":
        texts = [HOSTILE[row % len(HOSTILE)] for row in range(3000)]
        path = folder / "with_texts.html"
        path.write_text(report_page(run.path, texts), encoding="utf-8")
        assert path.stat().st_size < 2_000_000
    return path


def test_a_page_is_quiet_fits_and_is_accessible(page_path: Path, open_page: OpenPage) -> None:
    """Nothing is asked for or complained of, nothing juts out, axe finds nothing serious."""
    assert_usable(open_page, page_path)


def shown(page: object, column: int) -> list[str]:
    rows = page.locator("table.sortable", has_text="precision").locator("tbody tr")  # type: ignore[attr-defined]
    return [row.locator("th, td").nth(column).inner_text() for row in rows.all()]


def test_a_table_sorts_by_mouse_and_keyboard(page_path: Path, open_page: OpenPage) -> None:
    """A head sorts largest first, then smallest first; names by the alphabet; and says so."""
    page = open_page(page_path)
    heads = page.locator("table.sortable", has_text="precision").locator("thead th")
    page.get_by_role("button", name="precision").click()
    values = [float(one) for one in shown(page, 1)]
    assert values == sorted(values, reverse=True)
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="precision").press("Enter")
    assert [float(one) for one in shown(page, 1)] == sorted(values)
    assert heads.nth(1).get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="class", exact=True).press("Space")
    assert heads.nth(1).get_attribute("aria-sort") == "none"
    numbered = [one for one in shown(page, 0) if one.startswith("class number")]
    assert numbered == sorted(numbered, key=lambda name: int(name.split()[-1]))


@pytest.mark.parametrize("page_path", ["many"], indirect=True)
def test_hostile_names_are_shown(page_path: Path, open_page: OpenPage) -> None:
    """Names and texts make no element, and what a terminal or browser would obey is escaped."""
    page = open_page(page_path)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    names = shown(page, 0)
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[4], HOSTILE[6]} <= set(names)
    assert "\\x1b[31mred\\x00" in names
    assert "\\u202eright to left" in names
    assert any(name.endswith("(10,000 characters)") for name in names)
    assert np.char.str_len(names).max() < 400
