"""What a cache is said to hold, against plain numpy on all of it at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from clustered import LABELS, source_info, write_split
from sklearn.feature_selection import f_classif

from llmembed.cache_format import CacheWriter, DatasetInfo, SourceInfo, Split
from llmembed.common.errors import (
    CacheIncompleteError,
    CacheNotFoundError,
    ConfigError,
    LLMEmbedWarning,
)
from llmembed.train.cli.report import report_main
from llmembed.train.reports.cache_report import cache_page, describe_cache
from llmembed.train.reports.page import figure

N_ROWS, WIDTH = 2500, 24  # several blocks


def write(path: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], **options: Any) -> Path:
    """Write features `[L, N, H]` and labels `[N]` of splits, hashes among the options."""
    hashes = options.pop("hashes", {})
    dataset = DatasetInfo(name="toy", labels=LABELS, provenance={})
    with CacheWriter(path, dataset=dataset) as writer:
        writer.add_source(options.pop("info", source_info("toy", WIDTH)))
        for split, (features, labels) in splits.items():
            write_split(writer, split, "toy", features, labels, hashes=hashes.get(split), **options)
    return path


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Two layers with one large dimension, one constant dimension and some unlabelled rows."""
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 3, N_ROWS).astype(np.int32)
    x = generator.normal(size=(2, N_ROWS, WIDTH)) + 0.5 * labels[:, None] * np.arange(WIDTH) / WIDTH
    x[0, :, 7] = 400 + 10 * x[0, :, 7]
    x[1, :, 3] = 0.1
    return x.astype(np.float16), labels


def test_layers_have_numpys_figures(tmp_path: Path, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    """Norms, outliers and both measures of separation are those of the whole matrix at once."""
    x, labels = drawn
    document = describe_cache(str(write(tmp_path / "c.zarr", {"train": drawn})))
    for layer, found in enumerate(document["layers"]):
        whole = x[layer].astype(np.float64)
        norms = np.linalg.norm(whole, axis=1)
        expected = norms.mean(), norms.std(), norms.min(), norms.max()
        names = ("norm_mean", "norm_std", "norm_min", "norm_max")
        assert [found[name] for name in names] == pytest.approx(expected, rel=1e-12)
        known = whole[labels >= 0]
        parts = [known[labels[labels >= 0] == c] for c in range(3)]
        within = sum(np.square(part - part.mean(axis=0)).sum(axis=0) for part in parts)
        shift = [np.square(part.mean(axis=0) - known.mean(axis=0)) * len(part) for part in parts]
        between = np.sum(shift, axis=0)
        varies = within > 1e-9
        ratio = between[varies].sum() / within[varies].sum()
        assert found["trace_ratio"] == pytest.approx(ratio, rel=1e-7)
        explained = (between[varies] / (between + within)[varies]).sum() / WIDTH
        assert found["explained"] == pytest.approx(explained, rel=1e-7)
    large, without = document["layers"]
    assert (large["layer"], large["n_outliers"], large["largest_outliers"]) == (1, 1, [7])
    squares = np.square(x[0].astype(np.float64)).sum(axis=0)
    assert large["outlier_share"] == pytest.approx(squares[7] / squares.sum(), rel=1e-12)
    assert (without["n_outliers"], without["outlier_share"]) == (0, 0)


def test_explained_is_what_the_f_test_of_each_dimension_tests(
    tmp_path: Path, drawn: tuple[np.ndarray, np.ndarray]
) -> None:
    """Its share follows from scikit-learn's F; by chance alone it is what the document says."""
    x, labels = drawn
    x[1, :, 3] = x[1, :, 4]
    path = str(write(tmp_path / "c.zarr", {"train": (x, labels)}))
    known = labels >= 0
    f, _ = f_classif(x[1][known].astype(np.float64), labels[known])
    odds = f * 2 / (known.sum() - 3)
    (_, found) = describe_cache(path)["layers"]
    assert found["explained"] == pytest.approx(float((odds / (1 + odds)).mean()), rel=1e-6)
    generator = np.random.default_rng(1)
    shares = []
    for k in range(3):
        noise = generator.normal(size=(1, 60, WIDTH)).astype(np.float16)
        chance = generator.permutation(np.arange(60) % 3).astype(np.int32)
        document = describe_cache(str(write(tmp_path / f"{k}.zarr", {"train": (noise, chance)})))
        shares.append(document["layers"][0]["explained"])
    assert document["explained_by_chance"] == 2 / 59
    assert np.mean(shares) == pytest.approx(2 / 59, rel=0.3)


def test_a_cache_is_read_block_by_block(
    tmp_path: Path, drawn: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of every layer is read once, 1,024 rows at a time at most, and verified."""
    path = write(tmp_path / "c.zarr", {"train": drawn})
    read: list[tuple[int, int, int]] = []
    features = Split.features

    def counted(self: Split, layer: int, *args: Any, rows: slice, verify: bool, **more: Any) -> Any:
        assert verify
        read.append((layer, rows.start, rows.stop))
        return features(self, layer, *args, rows=rows, verify=verify, **more)

    monkeypatch.setattr(Split, "features", counted)
    describe_cache(str(path))
    ends = [0, 1024, 2048, N_ROWS]
    assert read == [(k, *ends[i : i + 2]) for k in (1, 2) for i in range(3)]


def test_repeated_texts_are_counted(tmp_path: Path) -> None:
    """Within a split, with other labels, and across splits, by the hashes of the texts."""
    features = np.zeros((1, 6, WIDTH), np.float16)
    hashes = {"train": [1, 1, 2, 2, 3, 4], "test": [1, 3, 3, 5, 6, 7], "validation": [8] * 6}
    labels = np.array([0, 0, 1, 2, 0, 1], np.int32)
    path = write(
        tmp_path / "c.zarr",
        dict.fromkeys(hashes, (features, labels)),
        hashes={name: np.array(values, np.uint64) for name, values in hashes.items()},
    )
    document = describe_cache(str(path))
    counted = [tuple(one.values()) for one in document["splits"]]
    assert counted == [
        ("test", 6, 0, 5, 2, 2),
        ("train", 6, 0, 4, 4, 2),
        ("validation", 6, 0, 1, 6, 6),
    ]
    assert [(*one["splits"], *one["n_rows"]) for one in document["shared_texts"]] == [
        ("test", "train", 3, 3),
        ("test", "validation", 0, 0),
        ("train", "validation", 0, 0),
    ]


def test_lengths_are_quantiles_of_the_tokens(tmp_path: Path) -> None:
    """Quantiles are lengths that texts have, and texts as long as the maximum are counted."""
    n_tokens = np.array([3, 8, 5, 8, 1], np.int32)
    info = source_info("toy", WIDTH)
    info = SourceInfo(**{**vars(info), "fingerprint": {"max_length": 8}})
    with CacheWriter(
        tmp_path / "c.zarr", dataset=DatasetInfo(name="toy", labels=LABELS, provenance={})
    ) as writer:
        writer.add_source(info)
        labels = np.array([0, 1, 2, 0, 1], np.int32)
        writer.add_split("train", labels=labels, text_hash=np.arange(5, dtype=np.uint64))
        plan = writer.plan("train", "toy", arrays=[("mean", 1)])
        x = {("mean", 1): np.ones((5, WIDTH), np.float16)}
        writer.write(plan, plan.blocks[0], n_tokens=n_tokens, features=x)
        writer.finish("train", "toy")
    (found,) = describe_cache(str(tmp_path / "c.zarr"))["lengths"]
    assert found == {
        "split": "train",
        "source": "toy",
        "n_tokens": 25,
        "min": 1,
        "median": 5,
        "p95": 8,
        "max": 8,
        "max_length": 8,
        "n_at_max_length": 2,
    }


def test_table_document_and_page_say_the_same(
    tmp_path: Path, drawn: tuple[np.ndarray, np.ndarray]
) -> None:
    """The command prints each figure of its document, and the page has them too."""
    x, labels = drawn
    path = write(tmp_path / "c.zarr", {"train": drawn, "test": (x[:, :300], labels[:300])})
    page = tmp_path / "p.html"
    arguments = ["--cache", str(path), "--split", "test", "--output", str(page)]
    table = CliRunner().invoke(report_main, arguments, catch_exceptions=False).stdout
    document = json.loads(CliRunner().invoke(report_main, [*arguments, "--json"]).stdout)
    assert document["split"] == "test"
    assert "Layers, on split test" in table
    html = page.read_text("utf-8")
    for layer in document["layers"]:
        for name in ("norm_mean", "norm_std", "trace_ratio", "explained"):
            assert f"{layer[name]:.4g}" in table
            assert figure(layer[name]) in html
    assert table.endswith(f"page: {page}\n")
    assert html.count("<svg") == 2
    hostile = cache_page({**document, "dataset": "<script>alert(1)</script>"})
    assert "<script>alert" not in hostile


def test_a_cache_without_labels_has_no_separation(tmp_path: Path) -> None:
    """All else is told, and one sentence says what is left out."""
    features = np.ones((1, 4, WIDTH), np.float16)
    path = write(tmp_path / "c.zarr", {"train": (features, np.full(4, -1, np.int32))})
    with pytest.warns(LLMEmbedWarning, match=r"has labels of 0 classes, so how well its layers"):
        document = describe_cache(str(path))
    (layer,) = document["layers"]
    assert (layer["trace_ratio"], layer["explained"]) == (None, None)
    assert layer["norm_mean"] == pytest.approx(WIDTH**0.5)
    assert document["explained_by_chance"] is None


def test_what_a_cache_does_not_have_is_told(
    tmp_path: Path, drawn: tuple[np.ndarray, np.ndarray]
) -> None:
    """Unknown names and an unfinished or missing cache are errors that name what there is."""
    path = str(write(tmp_path / "c.zarr", {"train": drawn}))
    for options, message in (
        ({"split": "tset"}, "split 'tset' does not exist"),
        ({"source": ("to",)}, r"source 'to' does not exist; did you mean 'toy'\?"),
        ({"pooling": ("last",)}, r"pooling 'last' does not exist\. Known: mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            describe_cache(path, **options)  # type: ignore[arg-type]
    parts = dict.fromkeys(("a", "b"), (drawn[0][:, :99], drawn[1][:99]))
    with pytest.raises(ConfigError, match="has the splits a, b and no train"):
        describe_cache(str(write(tmp_path / "d.zarr", parts)))
    with pytest.raises(CacheNotFoundError):
        describe_cache(str(tmp_path / "nowhere.zarr"))
    unfinished = write(tmp_path / "e.zarr", {"train": drawn}, finish=False)
    with pytest.raises(CacheIncompleteError, match=r"rows of train/toy/.* are not committed"):
        describe_cache(str(unfinished))
