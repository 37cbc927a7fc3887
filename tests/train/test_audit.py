"""Which rows look wrong: against planted mistakes, scikit-learn, and counting by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner
from clustered import HIDDEN_SIZE, LABELS, MakeCache, clustered, source_info, write_split
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from llmembed.cache_format import CacheWriter, DatasetInfo, open_cache
from llmembed.common.errors import (
    CacheCorruptError,
    ConfigError,
    DataError,
    LLMEmbedWarning,
    RunStorageError,
)
from llmembed.train import AuditConfig, FitConfig, fit, run_audit
from llmembed.train.cli.audit import audit_main
from llmembed.train.inputs import FitData, data_in_memory, draw_folds, read_features
from llmembed.train.inputs.select import select_features
from llmembed.train.linear.solved import judge_held_out
from llmembed.train.measures import calibrate
from llmembed.train.measures.confident import confident_joint, doubts

SOLVED = ("auto", "mean", "concat")


def flipped(labels: np.ndarray, n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Give n labels another class; the labels, and which rows they are."""
    generator = np.random.default_rng(5)
    rows = np.sort(generator.choice(len(labels), n, replace=False))
    labels = labels.copy()
    labels[rows] = (labels[rows] + generator.integers(1, n_classes, n)) % n_classes
    return labels, rows


@pytest.fixture
def noisy(tmp_path: Path, make_cache: MakeCache) -> tuple[Path, np.ndarray]:
    """A cache with labels flipped in one row of twenty, and these rows."""
    features, labels = clustered(400, 0)
    wrong, rows = flipped(labels, 20, 3)
    return make_cache({"train": (features, wrong), "test": clustered(60, 1)}), rows


@pytest.mark.parametrize("fusion", SOLVED)
def test_flipped_labels_stand_first(
    noisy: tuple[Path, np.ndarray], fusion: str, tmp_path: Path
) -> None:
    """Of the labels that were flipped nine in ten are among the first 7 %, with the right one."""
    path, flips = noisy
    document = audited(path, tmp_path, fusion=fusion)
    first = document["rows"][:28]
    found = [row for row in first if row["row"] in flips]
    assert len(found) >= 18
    right = [row["suggested"] == LABELS[row["row"] % 3] for row in found]
    assert np.mean(right) > 0.9
    assert document["n_rows"] == 400


@pytest.mark.parametrize("fusion", SOLVED)
def test_rows_are_judged_as_a_fit_judges_them(
    noisy: tuple[Path, np.ndarray], fusion: str, tmp_path: Path
) -> None:
    """Head, held-out accuracy and temperature are those of the run of the same fusion."""
    options = {"cache": str(noisy[0]), "fusion": fusion, "baseline": "none"}
    metrics = fit(FitConfig(**options, output=str(tmp_path / "run"))).metrics
    document = audited(noisy[0], tmp_path, fusion=fusion)
    (solved,) = metrics["per_seed"]
    for name in ("head", "held_out_accuracy", "strength", "n_members"):
        assert document.get(name) == solved.get(name)
    assert document["temperature"] == pytest.approx(metrics["temperature"], rel=1e-4)


def audited(path: Path, folder: Path, **options: Any) -> dict[str, Any]:
    return run_audit(AuditConfig(cache=str(path), output=str(folder / "audit"), **options))


def test_right_labels_are_suspected_as_often_as_chance_has_it(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """Of classes that overlap, rows score high no more often than their own posterior says."""
    generator = np.random.default_rng(7)
    centres = 0.6 * generator.normal(size=(3, HIDDEN_SIZE))
    labels = (np.arange(1500) % 3).astype(np.int32)
    x = centres[labels] + generator.normal(size=(1500, HIDDEN_SIZE))
    squares = np.square(x[:, None] - centres).sum(axis=2)
    posterior = np.exp(-squares / 2)
    posterior /= posterior.sum(axis=1, keepdims=True)
    path = make_cache({"train": (x[None].astype(np.float16), labels)})
    wrong, _ = flipped(labels, 75, 3)
    noisy = make_cache({"train": (x[None].astype(np.float16), wrong)}, name="noisy.zarr")
    options = {"fusion": "single", "head": "lda"}
    for least in (0.6, 0.8, 0.9):
        shares = [doubts(posterior, np.full(1500, k)) >= least for k in range(3)]
        expected = sum((posterior[:, k] * shares[k]).sum() for k in range(3))
        bound = expected + 3 * np.sqrt(expected)
        assert high(audited(path, tmp_path, **options), least) <= bound
        assert high(audited(noisy, tmp_path, **options), least) > bound


def high(document: Mapping[str, Any], least: float) -> int:
    return sum(row["score"] >= least for row in document["rows"])


def test_figures_are_those_of_scikit_learns_cross_validation(
    noisy: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """Scores, reasons and order follow from LDA in the same folds, and distances from numpy."""
    path, _ = noisy
    document = audited(path, tmp_path, fusion="mean", head="lda", seed=3)
    features, y = clustered(400, 0)
    y = flipped(y, 20, 3)[0].astype(np.int64)
    x = features.astype(np.float64)
    x = ((x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)).mean(axis=0)
    folds = draw_folds(y, np.arange(400), 10, np.random.default_rng(3))
    fold_of = np.empty(400, dtype=int)
    for k, rows in enumerate(folds):
        fold_of[rows] = k
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=document["strength"])
    given = {"cv": PredefinedSplit(fold_of), "method": "decision_function"}
    logits = cross_val_predict(lda, x, y, **given)
    assert document["held_out_accuracy"] == np.mean(logits.argmax(axis=1) == y)
    temperature = calibrate(logits, y)
    assert document["temperature"] == pytest.approx(temperature, rel=1e-3)
    proba = np.exp(logits / temperature)
    proba /= proba.sum(axis=1, keepdims=True)
    others = np.where(np.arange(3) == y[:, None], 0, proba).max(axis=1)
    score, joint = (1 + others - proba[np.arange(400), y]) / 2, by_hand(proba, y)[1]
    expected = {
        k: "label" if joint[k] not in {y[k], -1} else "doubt"
        for k in np.argsort(-score).tolist()
        if proba[k].argmax() != y[k]
    }
    told = [row for row in document["rows"] if {"label", "doubt"} & {*row["reasons"]}]
    assert {row["row"]: row["reasons"][0] for row in told} == expected
    assert [row["row"] for row in told] == [*expected]
    assert [row["score"] for row in told] == pytest.approx(score[[*expected]], abs=2e-3)
    for row in document["rows"]:
        seen = fold_of != fold_of[row["row"]]
        means = np.stack([x[seen & (y == k)].mean(axis=0) for k in range(3)])
        rest = x[seen] - means[y[seen]]
        covariance = rest.T @ rest / seen.sum()
        shrunk = 0.9 * covariance + 0.1 * np.eye(HIDDEN_SIZE) * covariance.trace() / HIDDEN_SIZE
        away = x[row["row"]] - means
        squares = np.einsum("ck,kc->c", away, np.linalg.solve(shrunk, away.T))
        assert row["distance"] == pytest.approx(squares.min() / HIDDEN_SIZE, rel=1e-3)


def by_hand(proba: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Count the confident joint as the paper writes it, row by row."""
    n_classes = proba.shape[1]
    thresholds = [
        np.mean([p[k] for p, label in zip(proba, y, strict=True) if label == k])
        if k in y
        else np.inf
        for k in range(n_classes)
    ]
    counts, classes = np.zeros((n_classes, n_classes), int), []
    for p, label in zip(proba, y, strict=True):
        sure = [k for k in range(n_classes) if p[k] >= thresholds[k]]
        classes.append(max(sure, key=lambda k: p[k]) if sure else -1)
        if sure:
            counts[label, classes[-1]] += 1
    return counts, classes


# What cleanlab 2.9 gives, which counts one right row of a class that has none.
CLEANLAB = [[15, 6, 6, 0], [6, 11, 0, 0], [1, 0, 6, 0], [0, 0, 0, 1]]
CLEANLAB_CALIBRATED = [[22, 9, 9, 0], [9, 16, 0, 0], [1, 0, 9, 0], [0, 0, 0, 0]]


def test_the_confident_joint_is_that_of_the_paper_and_of_cleanlab() -> None:
    """Counted by hand it is the same, and calibrated within the rounding of cleanlab 2.9's."""
    generator = np.random.default_rng(11)
    y = np.repeat([0, 1, 2], [40, 25, 10])
    logits = generator.normal(size=(75, 4)) + 0.7 * np.eye(4)[y]
    proba = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    joint = confident_joint(proba, y)
    counts, classes = by_hand(proba, y)
    assert (joint.counts.tolist(), joint.classes.tolist()) == (counts.tolist(), classes)
    assert np.maximum(counts, np.eye(4, dtype=int)).tolist() == CLEANLAB
    calibrated = joint.calibrated(y)
    assert np.abs(calibrated - CLEANLAB_CALIBRATED).max() < 1
    assert calibrated.sum(axis=1) == pytest.approx([40, 25, 10, 0])


def test_texts_of_several_labels_are_told(tmp_path: Path) -> None:
    """Rows of one text with different labels name each other; with one label they do not."""
    features, labels = clustered(60, 0)
    hashes = np.arange(60, dtype=np.uint64)
    hashes[[4, 9, 13]] = 4  # classes 1, 0, 1
    hashes[[6, 12]] = 6  # both 0
    path = write(tmp_path / "c.zarr", features, labels, hashes=hashes)
    document = audited(path, tmp_path)
    told = {row["row"]: row for row in document["rows"] if "duplicate" in row["reasons"]}
    assert {row: one["same_text"] for row, one in told.items()} == {
        4: [9, 13],
        9: [4, 13],
        13: [4, 9],
    }
    assert document["n_flagged"]["duplicate"] == 3


def write(
    path: Path,
    features: np.ndarray,
    labels: np.ndarray,
    names: tuple[str, ...] = LABELS,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    with CacheWriter(
        path, dataset=DatasetInfo(name="toy", labels=names, provenance=dict(provenance or {}))
    ) as writer:
        writer.add_source(source_info("toy", HIDDEN_SIZE))
        write_split(writer, "train", "toy", features, labels, **options)
    return path


def test_a_row_like_no_other_is_an_outlier(tmp_path: Path) -> None:
    """One that lies far from all classes is told, and of the others none."""
    features, labels = clustered(300, 0)
    features[:, 17] = 12
    document = audited(write(tmp_path / "c.zarr", features, labels), tmp_path)
    assert [row["row"] for row in document["rows"] if "outlier" in row["reasons"]] == [17]


def test_a_class_that_was_split_by_lot_is_told(tmp_path: Path) -> None:
    """Two classes with one meaning are named together, and no other pair."""
    features, labels = clustered(600, 0)
    labels[labels == 1] += (np.random.default_rng(1).random(200) < 0.5) * 2  # 1 or 3
    path = write(tmp_path / "c.zarr", features, labels, (*LABELS, "corn"))
    (pair,) = audited(path, tmp_path)["classes"]
    assert pair["classes"] == ["grain", "corn"]
    assert pair["overlap"] > 0.7
    assert sum(pair["n_rows"]) == 200


def test_a_stack_of_one_layer_is_that_layer(noisy: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """Of a single feature auto says what single says."""
    alone, stacked = (
        audited(noisy[0], tmp_path, layers="2", fusion=fusion, head="lda")
        for fusion in ("single", "auto")
    )
    for one, other in zip(alone["rows"], stacked["rows"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
        assert {**one, "score": 0} == {**other, "score": 0}


HOSTILE = ("=cmd|' /C calc'!A0", "\x1b[2Jgone", "<script>alert(1)</script>", 'a\nb, "c"')


def test_hostile_texts_and_names_are_data(tmp_path: Path) -> None:
    """The csv holds them as they are, defused on request; terminal and page show them escaped."""
    features, labels = clustered(60, 0)
    names = ("=earn", "\x1b[31mgrain", "<b>trade")
    labels[:4] = (labels[:4] + 1) % 3  # so that they are told
    texts = [*HOSTILE, *(f"text {k}" for k in range(56))]
    place = tmp_path / "texts.jsonl"
    rows = [{"text": t, "label": int(k)} for t, k in zip(texts, labels, strict=True)]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hashes = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], np.uint64)
    known = {"origin": str(place), "text_column": "text", "label_column": "label"}
    path = write(tmp_path / "c.zarr", features, labels, names, known, hashes=hashes)
    arguments = ["--cache", str(path), "--output", str(tmp_path / "a")]
    shown = CliRunner().invoke(audit_main, arguments, catch_exceptions=False).stdout
    assert r"\x1b[2Jgone" in shown
    assert r"a\nb" in shown
    assert "\x1b" not in shown
    told = read(tmp_path / "a")
    assert {*HOSTILE} <= {row["text"] for row in told}
    assert {row["given"] for row in told} & {"=earn"}
    page = (tmp_path / "a" / "audit.html").read_text("utf-8")
    assert r"\x1b[2Jgone" in page
    assert not [what for what in ("\x1b", "<script>alert", "<b>trade") if what in page]
    CliRunner().invoke(audit_main, [*arguments, "--defuse-formulas"], catch_exceptions=False)
    defused = read(tmp_path / "a")
    assert f"'{HOSTILE[0]}" in {row["text"] for row in defused}
    assert not [row for row in defused for cell in row.values() if cell.startswith("=")]
    place.write_text(place.read_text().replace("text 5", "text five"))
    arguments.append("--json")
    document = json.loads(CliRunner().invoke(audit_main, arguments, catch_exceptions=False).stdout)
    assert document["texts_missing"].endswith("are others by now")
    assert "text" not in read(tmp_path / "a")[0]


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "audit.csv").open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def test_table_document_csv_and_page_say_the_same(
    noisy: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """Rows stand in one order everywhere, and the terminal shows the first twenty."""
    arguments = ["--cache", str(noisy[0]), "--output", str(tmp_path / "a"), "--fusion", "mean"]
    lines = CliRunner().invoke(audit_main, arguments, catch_exceptions=False).stdout.splitlines()
    document = json.loads(CliRunner().invoke(audit_main, [*arguments, "--json"]).stdout)
    rows = document["rows"]
    assert [int(row["row"]) for row in read(tmp_path / "a")] == [row["row"] for row in rows]
    first = next(k for k, line in enumerate(lines) if line.startswith("row "))
    told = [int(line.split()[0]) for line in lines[first + 1 : first + 21]]
    assert told == [row["row"] for row in rows[:20]]
    assert f"and {len(rows) - 20} more, in audit.csv" in lines
    page = (tmp_path / "a" / "audit.html").read_text("utf-8")
    assert [page.index(f"{row['score']:.4f}") for row in rows[:20]]
    assert document["texts_missing"] in "\n".join(lines)


def test_a_row_alone_in_its_class_is_not_judged(tmp_path: Path) -> None:
    """It is said, and its row has no score, even if it is an outlier."""
    features, labels = clustered(60, 0, n_classes=2)
    labels[5], features[:, 5] = 2, 12
    path = write(tmp_path / "c.zarr", features, labels)
    with pytest.warns(LLMEmbedWarning, match="1 classes have one row each.*not judged: trade"):
        document = audited(path, tmp_path)
    (row,) = (row for row in document["rows"] if row["row"] == 5)
    assert (row["score"], row["suggested"], row["reasons"]) == (None, None, ["outlier"])
    assert document["n_alone"] == 1


def write_groups(path: Path, labels: np.ndarray, groups: np.ndarray) -> Path:
    """Write clustered features of these labels, and which rows belong together."""
    features, _ = clustered(len(labels), 0)
    with CacheWriter(path, dataset=DatasetInfo(name="t", labels=LABELS, provenance={})) as writer:
        writer.add_source(source_info("tiny", HIDDEN_SIZE))
        columns = {"labels": labels, "groups": groups.astype(np.uint64)}
        writer.add_split("train", text_hash=np.arange(len(labels), dtype=np.uint64), **columns)
        plan = writer.plan("train", "tiny", arrays=[("mean", 1), ("mean", 2)])
        for block in plan.blocks:
            rows = slice(block.compute_from, block.stop)
            arrays = {("mean", k + 1): features[k, rows] for k in range(2)}
            tokens = np.full(block.stop - block.compute_from, 3, dtype=np.int32)
            writer.write(plan, block, n_tokens=tokens, features=arrays)
        writer.finish("train", "tiny")
    return path


@pytest.mark.parametrize("fusion", SOLVED)
def test_no_row_is_judged_by_its_group(tmp_path: Path, fusion: str) -> None:
    """Groups are divided as a fit divides them, and as rows come where they are ignored."""
    groups = np.arange(90) // 5
    path = write_groups(tmp_path / "c.zarr", clustered(90, 0)[1], groups)
    found = []
    for ignored in (False, True):
        judged = audited(path, tmp_path, fusion=fusion, ignore_groups=ignored)
        method = FitConfig(cache=str(path), fusion=fusion).plan().method
        data = data_of(path, None if ignored else groups, fusion)
        expected = judge_held_out(method, data).details
        assert judged["held_out_accuracy"] == pytest.approx(expected["held_out_accuracy"])
        assert judged["temperature"] == pytest.approx(expected["temperature"])
        found.append(judged["temperature"])
    assert found[0] != found[1]


def data_of(path: Path, groups: np.ndarray | None, fusion: str) -> FitData:
    """All rows of the training split, as an audit reads them."""
    cache, reading = open_cache(path), FitConfig(cache=str(path), fusion=fusion).plan().reading
    split = cache["train"]
    features = select_features(cache, split, reading)
    y = np.asarray(split.labels, dtype=np.int64)
    x = read_features(split, features)
    return data_in_memory(reading, x, y, LABELS, features, groups=groups)


def test_a_class_of_one_group_is_not_judged(tmp_path: Path) -> None:
    """All its rows are in one fold, and the class is named once."""
    labels = clustered(60, 0)[1]
    groups = np.where(labels == 2, 1000, np.arange(60))
    path = write_groups(tmp_path / "c.zarr", labels, groups)
    with pytest.warns(LLMEmbedWarning, match=r"1 classes .* or one group, .* not judged: trade\."):
        document = audited(path, tmp_path)
    assert document["n_alone"] == 20


@pytest.mark.parametrize(
    ("n_groups", "options", "error", "message"),
    [
        (1, {}, DataError, "all 60 training rows are of one group, so none can be held out"),
        (3, {"folds": 4}, ConfigError, "3 groups of training rows can't be divided into 4 folds"),
    ],
)
def test_groups_that_an_audit_cannot_divide(
    tmp_path: Path, n_groups: int, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """One group, or fewer than folds, is refused; ignored, they are no obstacle."""
    path = write_groups(tmp_path / "c.zarr", clustered(60, 0)[1], np.arange(60) % n_groups)
    with pytest.raises(error, match=message):
        audited(path, tmp_path, **options)
    assert audited(path, tmp_path, ignore_groups=True, **options)["n_rows"] == 60


UNUSABLE = {
    "has a label": np.full(6, -1),
    "have the class 'earn'": np.zeros(6),
    "only one of its class": np.arange(3),
}


@pytest.mark.parametrize(("message", "labels"), UNUSABLE.items(), ids=UNUSABLE)
def test_labels_that_cannot_be_judged_are_refused(
    tmp_path: Path, message: str, labels: np.ndarray
) -> None:
    """No label, one class, and classes of one row each are told in a sentence."""
    path = write(tmp_path / "c.zarr", clustered(len(labels), 0)[0], labels.astype(np.int32))
    with pytest.raises(DataError, match=message):
        audited(path, tmp_path)


def test_rows_alone_in_their_class_are_refused_before_a_feature_is_read(tmp_path: Path) -> None:
    """The refusal comes though the features are damaged, which an audit of others is told of."""
    damaged = {"alone": (0, 1, 2, 3), "two": (0, 0, 1, 1)}
    for name, labels in damaged.items():
        y = np.array(labels, dtype=np.int32)
        path = write(tmp_path / f"{name}.zarr", clustered(4, 0)[0], y, (*LABELS, "corn"))
        for chunk in path.glob("train/toy/mean/*/c.*"):
            chunk.write_bytes(b"")
    with pytest.raises(CacheCorruptError):
        audited(tmp_path / "two.zarr", tmp_path)
    with pytest.raises(DataError, match="each of the 4 rows is the only one of its class"):
        audited(tmp_path / "alone.zarr", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "cooc"}, "'cooc' with head 'auto' is trained by gradient"),
        ({"fusion": "mean", "head": "mlp"}, "trained by gradient"),
        ({"head": "linear"}, "with auto leave out --head"),
        ({"fusion": "meen"}, "did you mean 'mean'"),
        ({"split": "tets"}, "did you mean 'test'"),
        ({"layers": "7"}, "layer"),
        ({"folds": 500}, "can't be divided into 500 folds"),
    ],
)
def test_options_that_fit_nothing_are_refused(
    make_cache: MakeCache, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """What no folds are held out of, and unknown names, end in one sentence."""
    with pytest.raises(ConfigError, match=message):
        audited(make_cache(), tmp_path, **options)


def test_a_disk_that_refuses_is_told(make_cache: MakeCache, tmp_path: Path) -> None:
    """Where no folder can be made, one sentence names the place and the reason."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunStorageError, match=r"audit/.* could not be written: Not a directory"):
        audited(make_cache(), tmp_path / "file")


def test_help_needs_no_numbers() -> None:
    """The options of an audit are data: neither torch nor numpy is imported for them."""
    code = (
        "import sys\nfrom llmembed.train.cli.audit import audit_main\n"
        "audit_main.main(['--help'], standalone_mode=False)\n"
        "print(*{'numpy', 'torch'} & {*sys.modules}, end='', file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-Pc", code], check=False, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"--defuse-formulas" in result.stdout


def test_a_file_is_no_place_for_an_audit(make_cache: MakeCache, tmp_path: Path) -> None:
    """It is refused before anything is read, and stays as it is."""
    (tmp_path / "audit").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        audited(make_cache(), tmp_path)
    assert (tmp_path / "audit").read_text() == "mine"
