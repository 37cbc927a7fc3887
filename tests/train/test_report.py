from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from clustered import MakeCache

from llmembed.train import FitConfig, Run, fit
from llmembed.train.reports.report import report_page


class _Balanced(HTMLParser):
    """Refuses a tag that closes another one than the last opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(make_cache: MakeCache, tmp_path: Path) -> Run:
    return fit(
        FitConfig(
            cache=str(make_cache()),
            fusion="concat",
            head="lda",
            n_seeds=2,
            output=str(tmp_path / "run"),
        )
    )


def test_a_run_holds_its_page(run: Run) -> None:
    """The page has the figures of metrics.json and loads nothing from elsewhere."""
    page = (run.path / "report.html").read_text(encoding="utf-8")
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open
    assert f"{run.metrics['accuracy']:.4f}  (95 % interval" in page
    assert "<h2>Seeds</h2>" in page
    for name, row in run.metrics["per_class"].items():
        assert f"<td>{name}</td>" in page
        assert f">{row['f1']:.4f}</td>" in page
    for row in run.metrics["confusion"]:
        cells = "".join(f'<td class="number">{count}</td>' for count in row)
        assert cells in page
    assert not re.search(r"(src|href)=|@import|url\(", page)


def test_names_are_text_not_markup(run: Run) -> None:
    """A class that is called like a tag is shown, not obeyed."""
    name = "<script>alert(1)</script>"
    labels = [name, *run.config["labels"][1:]]
    per_class = dict(zip(labels, run.metrics["per_class"].values(), strict=True))
    page = report_page({**run.config, "labels": labels}, {**run.metrics, "per_class": per_class})
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_of_many_classes_the_commonest_errors_are_listed(run: Run) -> None:
    """With more than 20 classes there is no matrix; errors stand in order, hits are left out."""
    counts = np.eye(21, dtype=int) * 50
    counts[3, 4], counts[5, 6] = 2, 7
    labels = [f"c{k}" for k in range(21)]
    page = report_page(
        {**run.config, "labels": labels}, {**run.metrics, "confusion": counts.tolist()}
    )
    listed = re.findall(
        r'<tr><td class="number">(\d+)</td><td>(c\d+)</td><td>(c\d+)</td></tr>', page
    )
    assert listed == [("7", "c5", "c6"), ("2", "c3", "c4")]
