"""What a classifier cannot learn from, and what it can though it looks as if not."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clustered import (
    HIDDEN_SIZE,
    clustered,
    of_sets,
    source_info,
    text_hash,
    write_cache,
    write_split,
)
from little_memory import MIB, only

from llmembed.cache_format import CacheWriter, DatasetInfo, open_cache
from llmembed.common.errors import DataError, LLMEmbedError, LLMEmbedWarning, RunFormatError
from llmembed.train import FitConfig, Run, fit, load_run
from llmembed.train.config import AuditConfig
from llmembed.train.reports.report import metrics_table
from llmembed.train.verbs.auditing import run_audit

N_MANY = 10_000  # classes


def fitted(folder: Path, splits: Any, *, labels: Any = None, **options: Any) -> Run:
    """Fit on a cache of these splits, and load what was written."""
    extra = {} if labels is None else {"labels": labels}
    cache = write_cache(folder / "tiny.zarr", splits, **extra)
    settings = {"cache": str(cache), "fusion": "concat", "output": str(folder / "run"), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMEmbedWarning)
        return load_run(fit(FitConfig(**settings)).path)


def proba(run: Run, n_layers: int = 2) -> torch.Tensor:
    """Probabilities of some rows, which are finite and sum to 1."""
    rows = torch.from_numpy(clustered(5, 3, n_layers=n_layers)[0]).float()
    with torch.inference_mode():
        found = run.classifier(rows.transpose(0, 1).flatten(1)).softmax(dim=1)
    assert found.isfinite().all()
    return found


@pytest.mark.fault("62")
@pytest.mark.parametrize("n", [0, 1, 2, 3, 65])
def test_any_number_of_rows_is_fitted_or_refused(tmp_path: Path, n: int) -> None:
    """None and one are refused in a sentence; from two classes on there is a classifier."""
    splits = {"train": clustered(n, 0), "test": clustered(max(1, n - 1), 1)}
    if n < 2:
        with pytest.raises(DataError, match=r"none of the 0 rows|have the class 'earn'"):
            fitted(tmp_path, splits)
        assert not (tmp_path / "run").exists()
    else:
        proba(fitted(tmp_path, splits))


@pytest.mark.fault("72")
@pytest.mark.parametrize("head", ["ridge", "lda", "linear", "auto"])
def test_a_class_of_one_row_is_learned(tmp_path: Path, head: str) -> None:
    """Its only row is given to it; a class that stands alone is refused by its name."""
    x, labels = clustered(61, 0, n_classes=2)
    labels = labels.copy()
    x = x.copy()
    labels[60], x[:, 60] = 2, 8.0
    run = fitted(tmp_path, {"train": (x, labels), "test": clustered(20, 1)}, head=head)
    proba(run)
    assert run.metrics["n_eval"] == 20
    with pytest.raises(DataError, match="have the class 'grain'"):
        fitted(tmp_path / "one", {"train": (x, np.full(61, 1, np.int32))}, head=head)


@pytest.mark.fault("75")
@pytest.mark.parametrize("head", ["ridge", "lda", "auto"])
def test_one_row_of_ten_thousand_is_fitted_and_said(tmp_path: Path, head: str) -> None:
    """The figures tell each class apart, so that an accuracy of 0.99 cannot hide the rare one."""
    splits = {name: clustered(n, n, n_classes=1) for name, n in (("train", 10_000), ("test", 100))}
    for _, labels in splits.values():
        labels[len(labels) // 3] = 1
    run = fitted(tmp_path, splits, head=head)
    proba(run)
    assert run.metrics["per_class"]["grain"]["n"] == 1
    assert run.metrics["classes_without_rows"] == ["trade"]
    assert run.metrics["macro_f1"] < 0.9 <= run.metrics["accuracy"]
    table = metrics_table(run.metrics)
    assert "grain" in table
    assert "macro F1" in table


@pytest.mark.fault("74")
@pytest.mark.slow
@pytest.mark.parametrize("head", ["ridge", "lda"])
def test_ten_thousand_classes_are_fitted_in_bounded_memory(tmp_path: Path, head: str) -> None:
    """Two rows a class: a matrix of rows by classes takes 0.8 GB, and no strength keeps one.

    Nor is there one of classes by classes in the run: it would take a gigabyte.
    """
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2, N_MANY, HIDDEN_SIZE))
    labels = np.repeat(np.arange(N_MANY), 2).astype(np.int32)
    x = (centres[:, labels] + 0.01 * generator.normal(size=(2, 2 * N_MANY, HIDDEN_SIZE))).astype(
        np.float16
    )
    splits = {"train": (x, labels), "test": (x[:, :50], labels[:50])}
    names = [f"class {n}" for n in range(N_MANY)]
    cache = write_cache(tmp_path / "tiny.zarr", splits, labels=names)
    config = FitConfig(cache=str(cache), fusion="concat", head=head, output=str(tmp_path / "run"))
    with only(12 * 1024 * MIB), warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMEmbedWarning)
        run = fit(config)
    assert len(run.labels) == N_MANY
    assert run.metrics["n_eval"] == 50
    assert run.metrics["confusion"] is None
    assert sum(file.stat().st_size for file in (tmp_path / "run").iterdir()) < 100 * MIB


@pytest.mark.fault("77")
def test_a_text_of_both_splits_is_counted_and_said(tmp_path: Path) -> None:
    """The warning says how many evaluation rows were trained on; the record counts them."""
    cache = write_cache(tmp_path / "tiny.zarr", {"train": clustered(90, 0)})
    with CacheWriter(cache, dataset=open_cache(cache).dataset) as writer:
        writer.add_source(source_info("tiny", HIDDEN_SIZE))
        hashes = np.concatenate([text_hash("train", 7), text_hash("test", 23)])
        write_split(writer, "test", "tiny", *clustered(30, 1), hashes=hashes)
    config = FitConfig(cache=str(cache), fusion="concat", output=str(tmp_path / "run"))
    with pytest.warns(LLMEmbedWarning, match="7 of 30 evaluation rows have a text that also"):
        fit(config)


class _Marks:
    """Unpickling it makes a folder: what an attacker's code would do."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._place),))


@pytest.mark.fault("61")
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.pt", "config.json", "held_out.safetensors", "model.ckpt"]
)
def test_no_pickle_of_a_run_is_read(
    tmp_path: Path, name: str, tries: Callable[[int], None]
) -> None:
    """Whatever file it calls itself, it is refused or left alone; what it would do is not done."""
    run = fitted(tmp_path, None)
    (run.path / "model.safetensors").rename(tmp_path / "sound")
    writers = (pickle.dumps, _as_torch)
    for write in writers:
        (run.path / name).write_bytes(write(_Marks(tmp_path / "ran")))
        with pytest.raises(RunFormatError, match=r"damaged|may be a pickle|does not exist"):
            load_run(run.path)
    assert not (tmp_path / "ran").exists()
    tries(len(writers))


def _as_torch(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def several(folder: Path, *, turned: bool = False, **columns: Any) -> Path:
    """A cache of several labels a text; those of every third row may be turned round."""
    dataset = DatasetInfo(name="tiny", labels=("a", "b", "c"), provenance={})
    with CacheWriter(folder / "several.zarr", dataset=dataset) as writer:
        writer.add_source(source_info("tiny", HIDDEN_SIZE))
        for split, n, seed in (("train", 120, 0), ("test", 60, 1)):
            x, sets = of_sets(n, seed)
            if turned and split == "train":
                sets[::3] = 1 - sets[::3]
            given = {name: make(n) for name, make in columns.items()}
            writer.add_split(
                split,
                labels=np.full(n, -1, np.int32),
                text_hash=text_hash(split, n),
                label_sets=sets,
                **given,
            )
            plan = writer.plan(split, "tiny", arrays=[("mean", 1), ("mean", 2)])
            for block in plan.blocks:
                rows = slice(block.compute_from, block.stop)
                arrays = {("mean", 1 + k): x[k, rows] for k in range(2)}
                n_tokens = np.full(block.stop - block.compute_from, 3, np.int32)
                writer.write(plan, block, n_tokens=n_tokens, features=arrays)
            writer.finish(split, "tiny")
    return folder / "several.zarr"


def _weights(n: int) -> np.ndarray:
    return (np.arange(n) % 4).astype(np.float32)


def _groups(n: int) -> np.ndarray:
    return (np.arange(n) // 4 + 1000 * n).astype(np.uint64)  # those of no other split


WAYS = [
    {"head": "ridge"},
    {"head": "auto"},
    {"head": "linear"},
    pytest.param({"head": "mlp", "epochs": 20}, marks=pytest.mark.slow),
    {"head": "auto", "fusion": "auto"},
]


@pytest.mark.parametrize("way", WAYS, ids=["ridge", "auto", "linear", "mlp", "fusions"])
@pytest.mark.parametrize("columns", [("weights",), ("groups",), ("weights", "groups")])
def test_several_labels_go_with_weights_and_groups(
    tmp_path: Path, way: dict[str, Any], columns: tuple[str, ...]
) -> None:
    """What is fitted has a probability for each label, and its folds part no group."""
    makers = {"weights": _weights, "groups": _groups}
    cache = several(tmp_path, **{name: makers[name] for name in columns})
    settings = {"fusion": "concat", **way, "cache": str(cache), "output": str(tmp_path / "run")}
    run = fit(FitConfig(**settings))
    assert run.metrics["n_eval"] == 60
    rows = torch.from_numpy(of_sets(60, 1)[0]).float()
    again = load_run(run.path)
    layers = [feature["layer"] - 1 for feature in again.config["features"]]
    with torch.inference_mode():
        found = again.classifier(rows[layers].transpose(0, 1).flatten(1)).sigmoid()
    assert found.shape == (60, 3)
    assert found.isfinite().all()
    right = ((found > 0.5).numpy() == (of_sets(60, 1)[1] == 1)).mean()
    assert right > 0.75


def test_rows_of_no_weight_teach_nothing_of_several_labels(tmp_path: Path) -> None:
    """Labels of rows that weigh nothing may be anything: what is learned is the same."""
    rows = torch.from_numpy(of_sets(60, 1)[0]).float().transpose(0, 1).flatten(1)
    found = []
    for turned in (False, True):
        folder = tmp_path / str(turned)
        folder.mkdir()
        cache = several(
            folder, turned=turned, weights=lambda n: (np.arange(n) % 3 > 0).astype("f4")
        )
        settings = {"cache": str(cache), "fusion": "concat", "head": "ridge"}
        run = fit(FitConfig(**settings, output=str(folder / "run")))
        with torch.inference_mode():
            found.append(run.classifier(rows).sigmoid())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("columns", [(), ("weights",), ("groups",), ("weights", "groups")])
def test_an_audit_of_several_labels_is_one_sentence(
    tmp_path: Path, columns: tuple[str, ...]
) -> None:
    """With weights and groups as without: it is for one label a text."""
    makers = {"weights": _weights, "groups": _groups}
    cache = several(tmp_path, **{name: makers[name] for name in columns})
    with pytest.raises(LLMEmbedError, match="has several labels a text, and an audit"):
        run_audit(AuditConfig(cache=str(cache), output=str(tmp_path / "audit")))
