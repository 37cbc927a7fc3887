"""Reports of runs and caches that are not as they were written, by accident or by intent."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from llmembed.cache_format import CacheWriter, DatasetInfo, open_cache
from llmembed.train.cli.report import report_main
from llmembed.train.reports.run_page import find_sweep
from llmembed.train.reports.texts import TextsNotFoundError, evaluated_texts, find_texts

GOLDEN = Path(__file__).parent.parent / "golden/run_format_1"
Damage = Callable[[Path], None]


def told(*runs: Path) -> str:
    """What llmembed-report says of runs that it cannot read, which is one sentence or two."""
    page = runs[0].parent / "page.html"
    result = CliRunner().invoke(report_main, [*map(str, runs), "--output", str(page)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert not page.exists()
    return result.stderr.splitlines()[-1]


def changed(name: str, **values: Any) -> Damage:
    def damage(run: Path) -> None:
        document = json.loads((run / name).read_text()) | values
        kept = {key: value for key, value in document.items() if value is not None}
        (run / name).write_text(json.dumps(kept))

    return damage


def predicted(column: str, value: Any) -> Damage:
    def damage(run: Path) -> None:
        table = pq.read_table(run / "predictions.parquet")
        values = pa.array([value] * len(table), table[column].type)
        at = table.column_names.index(column)
        pq.write_table(table.set_column(at, column, values), run / "predictions.parquet")

    return damage


@pytest.mark.parametrize("n_others", [0, 1])
@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (changed("config.json", labels=None), "config.json"),
        (changed("metrics.json", eval_split=None), "metrics.json"),
        (changed("metrics.json", seconds={"total": "long"}), "metrics.json"),
        (changed("metrics.json", baselines={"majority": {"accuracy": "high"}}), ""),
        (predicted("p_earn", float("nan")), "predictions.parquet"),
        (predicted("p_earn", -1e300), "predictions.parquet"),
        (predicted("p_earn", 2.0), "predictions.parquet"),
        (predicted("row", -1), "predictions.parquet"),
        (predicted("row", None), "predictions.parquet"),
    ],
)
def test_a_damaged_run_is_told(tmp_path: Path, damage: Damage, file: str, n_others: int) -> None:
    """Alone and beside another run it is one sentence that names its place, and no page."""
    run = shutil.copytree(GOLDEN / "cooc", tmp_path / "run")
    damage(run)
    said = told(run, *[GOLDEN / "auto"][:n_others])
    place = run / file if n_others else run
    assert said.startswith(f"error: {place}")
    assert "is damaged or was not written by llmembed-fit" in said


def test_no_name_forges_a_line(tmp_path: Path) -> None:
    """An end of line in a label, a split, a baseline, a data set or a folder is shown escaped."""
    forged = "x\nforged"
    run = shutil.copytree(GOLDEN / "cooc", tmp_path / forged)
    metrics = {"classes_without_rows": [forged], "eval_split": forged, "baselines": {}}
    other = shutil.copytree(GOLDEN / "auto", tmp_path / "other")
    for one in (run, other):
        changed("metrics.json", **metrics)(one)
    baselines = {forged: {"accuracy": 0.5}}
    changed("metrics.json", baselines=baselines)(other)
    dataset = DatasetInfo(name=forged, labels=("a",), provenance={})
    with CacheWriter(tmp_path / "toy.zarr", dataset=dataset) as writer:
        writer.add_split("test", labels=np.zeros(1, np.int32), text_hash=np.zeros(1, np.uint64))
    page = ["--output", str(tmp_path / "page.html")]
    for asked in ([str(run)], [str(other), str(run)], ["--cache", str(tmp_path / "toy.zarr")]):
        result = CliRunner().invoke(report_main, [*asked, *page], catch_exceptions=False)
        assert result.exit_code == 0
        assert "x\\nforged" in result.stdout
        assert not any(line.startswith("forged") for line in result.stdout.splitlines())


def test_no_sweep_beside_a_run_stops_its_page(tmp_path: Path) -> None:
    """A number of a layer that no picture takes leaves the picture out."""
    feature = {"source": "tiny", "pooling": "mean", "layer": 10**400}
    row = {"fusion": "single", "features": [feature], "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}
    row_of_1 = row | {"features": [feature | {"layer": 1}]}
    document = {"cache": {"fingerprint": "abc"}, "candidates": [row, row_of_1]}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(document))
    assert find_sweep(tmp_path / "run", "abc") is None
    (tmp_path / "sweep" / "sweep.json").write_text(
        json.dumps({**document, "candidates": [row_of_1]})
    )
    assert find_sweep(tmp_path / "run", "abc") is not None


def test_a_run_makes_no_report_ask_a_server(tmp_path: Path) -> None:
    """A record may name any URL as its cache: nobody is asked."""
    asked: list[str] = []

    class Listening(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listening) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/stranger.zarr"
        config = {"fit": {"cache": place}, "cache": {"fingerprint": "abc"}}
        with pytest.raises(TextsNotFoundError, match="is not on this machine"):
            evaluated_texts(config, {"splits": {"eval": {"split": "test"}}})
        server.shutdown()
    assert not asked


@pytest.mark.parametrize(
    "known",
    [
        {"delimiter": "abc"},
        {"text_column": 5},
        {"unlabelled": 4},
        {"origin": "/" + "x" * 5000},
    ],
)
def test_a_cache_that_records_nonsense_has_no_texts(tmp_path: Path, known: dict[str, Any]) -> None:
    """It is a clause for the page, not the end of a fit that has been trained already."""
    (tmp_path / "toy.csv").write_text("text,label\none,a\ntwo,b\n")
    provenance = {"origin": str(tmp_path / "toy.csv"), **known}
    dataset = DatasetInfo(name="toy", labels=("a", "b"), provenance=provenance)
    with CacheWriter(tmp_path / "toy.zarr", dataset=dataset) as writer:
        labels, hashes = np.array([0, 1], np.int32), np.array([1, 2], np.uint64)
        writer.add_split("train", labels=labels, text_hash=hashes)
    with pytest.raises(TextsNotFoundError, match=r"could not be read again|is not where it was"):
        find_texts(open_cache(tmp_path / "toy.zarr"), ["train"])


def test_looking_for_texts_leaves_the_hub_within_reach(tmp_path: Path) -> None:
    """`datasets` keeps what HF_HUB_OFFLINE was when it was imported, and that was not set."""
    code = """
from llmembed.train.reports import texts
place = texts._place("new", {"origin": "me/new"})
with texts._from_this_machine():
    import datasets
print(datasets.config.HF_HUB_OFFLINE)
"""
    (tmp_path / "me___new").mkdir()
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"
