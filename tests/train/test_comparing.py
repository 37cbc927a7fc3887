"""`llmembed-fit --compare`: one reading, the runs of single fits, and their comparison."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clustered import HIDDEN_SIZE, LABELS, clustered, source_info, write_cache, write_split

from llmembed.cache_format import CacheWriter, DatasetInfo, Split
from llmembed.common.errors import ConfigError, LLMEmbedWarning, RunFormatError
from llmembed.train import FitConfig, compare_fusions, fit
from llmembed.train.cli.fit import fit_main
from llmembed.train.fusions import AUTO, FUSIONS, choices
from llmembed.train.inputs import load_data, load_each
from llmembed.train.reports.compare import compare_runs
from llmembed.train.verbs.comparing import _applicable

ALL = (*choices(FUSIONS), AUTO)
OPTIONS = {"cache": "tiny.zarr", "epochs": 2, "n_seeds": 1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache, in which runs have their usual places."""
    write_cache(tmp_path / "tiny.zarr")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Arrays that are read, by split and layer."""
    read: list[tuple[str, int]] = []
    features = Split.features

    def counted(self: Split, layer: int, *args: Any, **more: Any) -> Any:
        read.append((self.name, layer))
        return features(self, layer, *args, **more)

    monkeypatch.setattr(Split, "features", counted)
    return read


@pytest.mark.slow
def test_one_reading_gives_the_runs_of_single_fits(here: Path, read: list[tuple[str, int]]) -> None:
    """Every array is read once; records, weights and predictions are those of a fit alone."""
    document = compare_fusions(FitConfig(**OPTIONS, compare=True))
    assert sorted(read) == [("test", 1), ("test", 2), ("train", 1), ("train", 2)]
    paths = [Path(run["path"]) for run in document["runs"]]
    names = [name for name in ALL if name != "single"]
    assert [path.name for path in paths[:2]] == ["tiny-cooc-0", "tiny-mean-0"]
    assert {path.name for path in paths} == {f"tiny-{name}-0" for name in names}
    for fusion in ("mean", "cooc", "attention", "auto"):
        options = {} if fusion in {"mean", "auto"} else {"epochs": 2}
        alone = fit(
            FitConfig(cache="tiny.zarr", fusion=fusion, output=f"alone-{fusion}", **options)
        )
        beside = Path("runs") / f"tiny-{fusion}-0"
        for file in ("model.safetensors", "predictions.parquet"):
            assert (beside / file).read_bytes() == (alone.path / file).read_bytes()
        records = [json.loads((path / "config.json").read_text()) for path in (beside, alone.path)]
        records[1]["fit"]["output"] = None
        assert records[0] == records[1]


def test_the_command_prints_the_comparison_of_its_runs(here: Path) -> None:
    """The table and the document are those of llmembed-report on the runs, the page is there."""
    options = ["--cache", "tiny.zarr", "--compare", "--head", "ridge", "--fusion", "concat"]
    result = CliRunner().invoke(fit_main, [*options, "--json"], catch_exceptions=False)
    document = json.loads(result.stdout)
    page = Path(document.pop("page"))
    assert page == Path("runs/tiny-compare-0.html")
    assert "tiny-auto-0" in page.read_text("utf-8")
    paths = [Path(run["path"]) for run in document["runs"]]
    assert [path.name for path in paths] == [
        f"tiny-{name}-0" for name in ("concat", "mean", "max", "auto")
    ]
    assert document == json.loads(json.dumps(compare_runs(paths)))
    table = CliRunner().invoke(fit_main, options, catch_exceptions=False).stdout
    assert table.startswith("evaluated on test, 60 rows\n")
    assert table.endswith(f"page: {page}\n")


def test_what_may_not_be_replaced_is_told_before_any_work(here: Path) -> None:
    """One place that a fit may not replace refuses all, whichever it is, and nothing is written."""
    Path("runs/tiny-auto-0/mine").mkdir(parents=True)
    with pytest.raises(RunFormatError, match="auto-0 exists and is not a run"):
        compare_fusions(FitConfig(**OPTIONS, compare=True))
    assert [path.name for path in Path("runs").iterdir()] == ["tiny-auto-0"]


def test_fusions_that_do_not_take_the_features_are_left_out(here: Path) -> None:
    """Of two widths there is no mean; the fusion that is named must take them, or it is told."""
    dataset = DatasetInfo(name="tiny", labels=LABELS, provenance={})
    with CacheWriter(here / "tiny.zarr", dataset=dataset) as writer:
        writer.add_source(source_info("wide", 2 * HIDDEN_SIZE))
        for split, n, seed in (("train", 90, 0), ("test", 60, 1)):
            features, labels = clustered(n, seed)
            wide = np.concatenate([features, features], axis=2)[:1]
            write_split(writer, split, "wide", wide, labels)
    left = {"mean", "max", "single", "scalar-mix", "attention"}
    found = [one.fusion for one in _applicable(FitConfig(**OPTIONS, compare=True))]
    assert sorted(found) == sorted(name for name in ALL if name not in left)
    with pytest.raises(ConfigError, match="fusion 'mean' needs features of one width"):
        compare_fusions(FitConfig(**OPTIONS, compare=True, fusion="mean"))


@pytest.mark.parametrize("splits", [("train", "test", "validation"), ("train",)])
def test_each_reading_is_what_it_would_be_alone(
    tmp_path: Path, splits: tuple[str, ...], read: list[tuple[str, int]]
) -> None:
    """Each kind of fit has its data, of whatever splits, and every array is read once for both."""
    made = {name: clustered(90, seed) for seed, name in enumerate(splits)}
    cache = str(write_cache(tmp_path / "c.zarr", made))
    readings = [
        FitConfig(cache=cache, fusion=fusion).plan().reading for fusion in ("attention", "mean")
    ]
    together = [copy.deepcopy(data) for data in load_each(readings)]
    assert sorted(read) == sorted((name, layer) for name in splits for layer in (1, 2))
    for reading, data in zip(readings, together, strict=True):
        alone = load_data(reading)
        for name in ("x", "y", "x_eval", "y_eval"):
            assert torch.equal(getattr(data, name), getattr(alone, name)), name
        assert torch.equal(data.standardiser.scale, alone.standardiser.scale)
        for name, value in vars(alone.shares).items():
            np.testing.assert_array_equal(getattr(data.shares, name), value)


def test_shares_are_warned_of_once(tmp_path: Path) -> None:
    """Unlabelled rows are told once, however many readings there are."""
    features, labels = clustered(90, 0)
    labels[5] = -1
    cache = str(write_cache(tmp_path / "c.zarr", {"train": (features, labels)}))
    fusions = ("attention", "mean")
    readings = [FitConfig(cache=cache, fusion=fusion).plan().reading for fusion in fusions]
    with pytest.warns(LLMEmbedWarning) as told:
        assert len([*load_each(readings)]) == 2
    assert [str(one.message)[:46] for one in told] == [
        "split 'train': 1 of 90 rows have no label and "
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "runs/a"}, "--output runs/a contradicts --compare"),
        ({"preset": "paper"}, "--preset paper contradicts --compare"),
        ({"engine": "ray", "workers": 2}, "--engine ray contradicts --compare"),
        ({"fast_dev_run": True}, "--fast-dev-run True contradicts --compare"),
        ({"fusion": "cooc", "head": "lda"}, "head 'lda' is solved in closed form"),
        ({"fusion": "mean", "head": "lda", "epochs": 3}, "--epochs 3 would do nothing: with head"),
        ({"fusion": "mean", "head": "mlp", "folds": 3}, "--folds 3 would do nothing: with head"),
        ({"lr": 1e9}, "lr 1000000000.0 is out of range"),
    ],
)
def test_options_that_contradict_a_comparison(options: dict[str, Any], message: str) -> None:
    """What no fit of a comparison could use, or what names one run, is refused at once."""
    with pytest.raises(ConfigError, match=message):
        FitConfig(cache="a.zarr", compare=True, **options)


def test_options_go_to_the_fits_that_have_a_use_for_them() -> None:
    """Epochs reach fits by gradient, folds solved heads, and the seed all."""
    config = FitConfig(cache="a.zarr", compare=True, epochs=3, folds=4, seed=7, n_seeds=2)
    found = {one.fusion: one for one in config.of_fusions()}
    assert (*found,) == ("cooc", *(name for name in ALL if name != "cooc"))
    for one in found.values():
        assert (one.epochs, one.folds) == ((None, 4) if one.solved_heads else (3, 0))
        assert (one.seed, one.n_seeds, one.compare) == (7, 2, False)


def test_fit_gives_one_run() -> None:
    """In Python a comparison has a function of its own."""
    with pytest.raises(ConfigError, match=r"Call compare_fusions\(config\)"):
        fit(FitConfig(cache="a.zarr", compare=True))
