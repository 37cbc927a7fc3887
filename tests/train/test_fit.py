from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clustered import LABELS, MakeCache, clustered, load, write_cache
from safetensors.torch import load_file, save_file

from llmembed.cache_format import open_cache
from llmembed.common.errors import (
    ConfigError,
    LLMEmbedWarning,
    RunFormatError,
    RunNotFoundError,
)
from llmembed.train import FitConfig, Run, fit, load_run
from llmembed.train.fusions import FUSIONS, choices
from llmembed.train.fusions.classifier import Architecture, Classifier
from llmembed.train.fusions.tricks import Dropout
from llmembed.train.inputs.data import read_features
from llmembed.train.verbs.fitting import train

QUICK: dict[str, Any] = {"epochs": 6, "batch_size": 32, "lr": 0.01, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("fitted")
    cache = write_cache(folder / "tiny.zarr")
    return fit(FitConfig(cache=str(cache), output=str(folder / "run"), **QUICK))


@pytest.fixture
def run(fitted: Run, tmp_path: Path) -> Run:
    return dataclasses.replace(fitted, path=shutil.copytree(fitted.path, tmp_path / "run"))


@pytest.mark.parametrize("fusion", choices(FUSIONS))
def test_every_fusion_learns(make_cache: MakeCache, tmp_path: Path, fusion: str) -> None:
    """Each fusion tells well-separated classes apart, on rows it has not seen."""
    layers = "2" if fusion == "single" else None
    quick = QUICK if FUSIONS[fusion].learns else {}
    config = FitConfig(
        cache=str(make_cache()), fusion=fusion, layers=layers, output=str(tmp_path / "r"), **quick
    )
    metrics = fit(config).metrics
    assert metrics["accuracy"] > 0.8
    low, high = metrics["accuracy_ci95"]
    assert low < metrics["accuracy"] <= high
    assert (metrics["eval_split"], metrics["n_eval"]) == ("test", 60)


@pytest.mark.parametrize("head", ["ridge", "lda", "linear", "auto"])
@pytest.mark.parametrize("fusion", ["mean", "max", "concat", "single"])
def test_heads_that_are_solved(
    make_cache: MakeCache, tmp_path: Path, fusion: str, head: str
) -> None:
    """Each fusion without weights takes a head that is solved, and the run loads and predicts."""
    layers = "2" if fusion == "single" else None
    config = FitConfig(
        cache=str(make_cache()), fusion=fusion, head=head, layers=layers, output=str(tmp_path / "r")
    )
    run = fit(config)
    assert run.metrics["accuracy"] > 0.8
    assert run.metrics["splits"]["validation"]["n"] == 0
    row = run.metrics["per_seed"][0]
    assert row["n_folds"] == 10  # of few rows
    assert load_run(run.path).classifier.architecture.head == row["head"]
    assert row["held_out_accuracy"] > 0.8
    x = torch.randn(5, sum(feature.hidden_size for feature in run.features))
    assert torch.equal(load_run(run.path).classifier(x), run.classifier(x))


@pytest.mark.parametrize("options", [{"head": "mlp", **QUICK}, {"head": "ridge"}])
def test_calibration_lowers_the_loss_and_changes_no_prediction(
    make_cache: MakeCache, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A temperature other than 1 is stored with the run; without it, accuracy is the same."""
    common = {"cache": str(make_cache()), "fusion": "concat", **options}
    runs = [
        fit(FitConfig(**common, calibrate=calibrate, output=str(tmp_path / calibrate)))
        for calibrate in ("temperature", "none")
    ]
    scaled, plain = (run.metrics for run in runs)
    assert scaled["accuracy"] == plain["accuracy"]
    assert plain["temperature"] == 1 != scaled["temperature"]
    assert scaled["nll_uncalibrated"] == pytest.approx(plain["nll"], rel=1e-5)
    assert scaled["per_seed"][0]["val_loss"] <= plain["per_seed"][0]["val_loss"] + 1e-6
    assert float(load_run(runs[0].path).classifier.temperature) == scaled["temperature"]


def test_a_head_in_closed_form_needs_no_lightning(make_cache: MakeCache, tmp_path: Path) -> None:
    """Ridge neither waits for Lightning's import nor uses it."""
    code = (
        "import sys; from llmembed.train import FitConfig, fit\n"
        f"fit(FitConfig(cache={str(make_cache())!r}, fusion='mean', head='ridge', "
        f"output={str(tmp_path / 'r')!r}))\n"
        "assert not {'lightning', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-Pc", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_fusion_is_chosen_on_the_training_rows(make_cache: MakeCache, tmp_path: Path) -> None:
    """`--fusion auto` takes the best subset, stores what it chose, and loads as that fusion."""
    features, labels = clustered(90, 0)
    features[0] = np.random.default_rng(5).normal(size=features[0].shape)  # layer 1 is noise
    cache = make_cache({"train": (features, labels), "test": clustered(60, 1)})
    run = fit(FitConfig(cache=str(cache), fusion="auto", output=str(tmp_path / "r")))
    chosen = run.metrics["chosen"]
    assert [feature["layer"] for feature in chosen["features"]][-1] == 2
    assert [feature._asdict() for feature in run.features] == chosen["features"]
    assert run.metrics["accuracy"] > 0.8
    loaded = load_run(run.path)
    assert loaded.config["fit"]["fusion"] == "auto"
    assert loaded.classifier.architecture.fusion == chosen["fusion"]
    split = open_cache(cache)["test"]
    logits = loaded.classifier(read_features(split, loaded.features))
    predicted = logits.argmax(dim=1).numpy()
    assert (predicted == split.labels).mean() == pytest.approx(run.metrics["accuracy"])


@pytest.mark.parametrize("fusion", ["concat", "auto"])
def test_rows_without_a_label_take_no_part(
    make_cache: MakeCache, tmp_path: Path, fusion: str
) -> None:
    """Solved heads leave unlabelled rows out: their features change no weight."""
    weights = []
    for scale in (1, 50):
        features, labels = clustered(90, 0)
        labels[:7] = -1
        features[:, :7] *= scale
        splits = {"train": (features, labels), "test": clustered(60, 1)}
        cache = make_cache(splits, name=f"{scale}.zarr")
        config = FitConfig(cache=str(cache), fusion=fusion, output=str(tmp_path / f"r{scale}"))
        with pytest.warns(LLMEmbedWarning, match="7 of 90 rows have no label"):
            weights.append(fit(config).classifier.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name])


def test_fewer_rows_than_folds(make_cache: MakeCache, tmp_path: Path) -> None:
    """Folds that would be empty are refused with both numbers."""
    cache = make_cache({"train": clustered(6, 0), "test": clustered(6, 1)})
    config = FitConfig(
        cache=str(cache), fusion="mean", head="lda", folds=9, output=str(tmp_path / "r")
    )
    with pytest.raises(ConfigError, match="6 training rows can't be divided into 9 folds"):
        fit(config)


def test_same_seed_same_predictions(make_cache: MakeCache, tmp_path: Path) -> None:
    """Two fits with one seed give the same probabilities; the caller's generator is untouched."""
    cache = str(make_cache())
    state = torch.random.get_rng_state()
    tables = []
    for name in ("a", "b"):
        path = fit(FitConfig(cache=cache, output=str(tmp_path / name), **QUICK)).path
        tables.append(pq.read_table(path / "predictions.parquet"))
    assert tables[0].equals(tables[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_folder_holds_what_the_figures_came_from(run: Run) -> None:
    """Predictions have one row an example, and their accuracy is the one in metrics.json."""
    table = pq.read_table(run.path / "predictions.parquet").to_pydict()
    hits = [a == b for a, b in zip(table["label"], table["predicted"], strict=True)]
    assert table["row"] == list(range(60))
    assert np.mean(hits) == pytest.approx(run.metrics["accuracy"])
    sums = sum(np.array(table[f"p_{name}"]) for name in LABELS)
    np.testing.assert_allclose(sums, 1)
    assert sorted(path.name for path in run.path.parent.glob(".*")) == []


def test_a_loaded_run_is_the_run(run: Run) -> None:
    """Loading gives back the figures, the record and the same logits."""
    loaded = load_run(run.path)
    assert loaded.metrics == json.loads(json.dumps(run.metrics))
    assert loaded.config["sources"]["tiny"]["recipe"] == {"model": "tiny"}
    assert loaded.config["sources"]["tiny"]["fingerprint"] == {"backbone": "tiny"}
    x = torch.randn(5, 32)
    assert torch.equal(loaded.classifier(x), run.classifier(x))


def test_the_kept_weights_are_those_of_the_lowest_loss(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """The weights of a run without a base give the validation loss that is recorded for it."""
    options = {"fusion": "attention", "output": str(tmp_path / "r"), **QUICK}
    config = FitConfig(cache=str(make_cache()), **options)
    run, data = fit(config), load(config)
    rows = torch.from_numpy(data.shares.validation)
    logits = run.classifier.logits(data.x[rows]) * run.classifier.temperature
    loss = torch.nn.functional.cross_entropy(logits, data.y[rows])
    assert loss.item() == pytest.approx(run.metrics["per_seed"][0]["val_loss"], rel=1e-5)


def test_several_seeds(make_cache: MakeCache, tmp_path: Path) -> None:
    """With two seeds there are two rows, their mean, and the kept one has the lowest loss."""
    config = FitConfig(cache=str(make_cache()), n_seeds=2, output=str(tmp_path / "r"), **QUICK)
    metrics = fit(config).metrics
    rows = metrics["per_seed"]
    assert [row["seed"] for row in rows] == [0, 1]
    kept = next(row for row in rows if row["kept"])
    assert kept["val_loss"] == min(row["val_loss"] for row in rows)
    mean = np.mean([row["accuracy"] for row in rows])
    assert metrics["over_seeds"]["accuracy"]["mean"] == pytest.approx(mean)
    assert metrics["accuracy"] == kept["accuracy"]


@pytest.mark.parametrize("fusion", ["cooc", "attention"])
def test_seeds_together_are_seeds_apart(
    make_cache: MakeCache, tmp_path: Path, fusion: str, two_threads: None
) -> None:
    """Seeds that follow each other come to what each comes to alone, bit for bit."""
    config = FitConfig(cache=str(make_cache()), fusion=fusion, val_fraction=0, **QUICK)
    data = load(config)
    together = train(dataclasses.replace(config, n_seeds=3).plan(), data).trained
    alone = train(config.plan(), data).trained[0]
    assert [one.seed for one in together] == [0, 1, 2]
    weights = [one.classifier.state_dict() for one in (alone, *together)]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight)
    assert not torch.equal(weights[2]["head.logits.weight"], weights[3]["head.logits.weight"])


def test_a_failed_fit_leaves_nothing(make_cache: MakeCache, tmp_path: Path) -> None:
    """A fit that diverges says so, and writes no folder."""
    config = FitConfig(
        cache=str(make_cache()), output=str(tmp_path / "r" / "x"), **{**QUICK, "lr": 1e2}
    )
    object.__setattr__(config, "lr", math.inf)
    with pytest.raises(ConfigError, match=r"the training diverged.*Pass a smaller --lr"):
        fit(config)
    assert not (tmp_path / "r").exists()


def test_without_a_validation_share_all_epochs_train(make_cache: MakeCache, tmp_path: Path) -> None:
    """A validation share of 0 trains on every row for all epochs."""
    config = FitConfig(cache=str(make_cache()), val_fraction=0, output=str(tmp_path / "r"), **QUICK)
    metrics = fit(config).metrics
    assert metrics["per_seed"][0]["n_epochs"] == 6
    assert metrics["splits"]["train"]["n"] == 90


def test_balanced_weights(make_cache: MakeCache) -> None:
    """Balanced weights are n / (C n_c), so a class half as frequent counts twice."""
    features, labels = clustered(90, 0)
    labels[labels == 2] = 0
    splits = {"train": (features, labels), "test": clustered(30, 1)}
    cache = str(make_cache(splits, labels=LABELS))
    config = FitConfig(cache=cache, class_weight="balanced", val_fraction=0)
    weights = load(config).class_weights()
    assert weights.tolist() == pytest.approx([90 / (2 * 60), 90 / (2 * 30), 0.0])


def test_a_development_run_is_one_batch(
    make_cache: MakeCache, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`fast_dev_run` trains one batch; Lightning prints nothing."""
    config = FitConfig(cache=str(make_cache()), fast_dev_run=True, output=str(tmp_path / "r"))
    assert fit(config).metrics["per_seed"][0]["n_epochs"] == 1
    assert capfd.readouterr() == ("", "")


def test_a_fit_cut_short_says_so(make_cache: MakeCache, tmp_path: Path) -> None:
    """`max_time` ends a fit between epochs or within one, and its best weights are kept."""
    config = FitConfig(
        cache=str(make_cache()),
        fusion="attention",
        epochs=10**6,
        patience=10**6,
        max_time="00:00:00:01",
        output=str(tmp_path / "r"),
    )
    with pytest.warns(
        LLMEmbedWarning, match="--max-time 00:00:00:01 ended the fit of seed 0 after"
    ):
        assert fit(config).metrics["accuracy"] > 0.5


@pytest.mark.filterwarnings("ignore::llmembed.common.errors.LLMEmbedWarning")
@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"epochs": 1},
            r"seed 3: 0 of 1 epochs\nseed 3: 1 of 1 epochs in .* validation loss \d\.\d+",
        ),
        ({"epochs": 1, "val_fraction": 0.0}, r"seed 3: 0 of 1 .*\nseed 3: 1 of 1 .* epochs/s"),
        ({"max_time": "00:00:00:00"}, ""),
    ],
)
def test_a_log_tells_the_seed_and_how_far_it_is(
    options: dict[str, Any],
    lines: str,
    make_cache: MakeCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first and the last state, with a validation loss where there is one; none of no epoch."""
    where = {"cache": str(make_cache()), "output": str(tmp_path / "r")}
    fit(FitConfig(**where, fusion="attention", seed=3, **options), show_progress=True)
    assert re.fullmatch(lines, capsys.readouterr().err.strip())


def test_the_head_gives_logits() -> None:
    """Logits of a trained-like head are no probabilities: they don't sum to 1."""
    architecture = Architecture(fusion="concat", head="mlp", widths=(4,), n_classes=3, dropout=0.0)
    logits = Classifier(architecture)(torch.randn(2, 4))
    assert not torch.allclose(logits.sum(dim=1), torch.ones(2))


def test_dropout_keeps_the_mean() -> None:
    """A quarter of the entries is dropped and the others scaled, so that the mean stays."""
    torch.manual_seed(0)
    dropped = Dropout(0.25)(torch.ones(1000, 33))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(Dropout(0.25).eval()(torch.ones(3)), torch.ones(3))


def test_no_run_there(tmp_path: Path) -> None:
    """A folder that does not exist is no run, and the error says what to pass."""
    with pytest.raises(RunNotFoundError, match="is not a folder, so there is no run"):
        load_run(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "metrics.json"])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04N.", b"[" * 100_000, b"\xff"])
def test_missing_and_damaged_files(run: Run, name: str, content: bytes | None) -> None:
    """A missing, emptied, pickled, deeply nested or undecodable file is refused by its name."""
    path = run.path / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunFormatError, match=name):
        load_run(run.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llmembed_run", 99),
        ("architecture", None),
        ("architecture", {"fusion": "cooc"}),
        ("features", []),
        ("labels", ["one"]),
        ("sources", {}),
    ],
)
def test_a_record_that_does_not_hold_together(run: Run, key: str, value: object) -> None:
    """A config.json with a foreign format or parts that disagree is refused."""
    path = run.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RunFormatError, match=r"config\.json"):
        load_run(run.path)


def test_weights_of_another_shape(run: Run) -> None:
    """Weights that don't fit the record are refused with both shapes."""
    path = run.path / "model.safetensors"
    weights = load_file(path)
    weights["head.logits.bias"] = torch.zeros(7)
    save_file(weights, path)
    with pytest.raises(
        RunFormatError, match=r"head\.logits\.bias has shape \(7,\).*asks for \(3,\)"
    ):
        load_run(run.path)


def test_a_pickle_is_never_read(run: Run) -> None:
    """A pickled model in place of ours is refused, with the reason."""
    (run.path / "model.safetensors").rename(run.path / "model.pt")
    with pytest.raises(RunFormatError, match=r"model\.pt may be a pickle.*never read"):
        load_run(run.path)
