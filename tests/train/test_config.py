from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from llmembed.common.console import field_docs
from llmembed.common.errors import ConfigError
from llmembed.extract import ExtractConfig
from llmembed.train.config import AuditConfig, FitConfig, SweepConfig, Training


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("fusion", "cooq", "fusion 'cooq' does not exist; did you mean 'cooc'?"),
        ("head", "linea", "head 'linea' does not exist; did you mean 'linear'?"),
        (
            "class_weight",
            "equal",
            "Known: none, balanced. Pass one to --class-weight, or CLASS",
        ),
        ("accelerator", "tpuu", "accelerator 'tpuu' does not exist"),
        ("precision", "8", "Known: 32-true, bf16-mixed, 16-mixed"),
        ("epochs", 0, "epochs 0 is out of range: it must lie between 1 and 1000000"),
        ("val_fraction", 1.0, "it must lie between 0 and 0.9. Pass another --val-fraction."),
        ("lr", float("nan"), "lr nan is out of range"),
        ("max_time", "10m", "max_time '10m' is not DD:HH:MM:SS; pass --max-time 00:00:10:00"),
    ],
)
def test_values_that_are_not_allowed(option: str, value: Any, message: str) -> None:
    """A value that is not allowed is refused with what was given and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        FitConfig(cache="a.zarr", **{option: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "ridge"}, "head 'ridge' is solved in closed form, which fusion 'cooc' does not"),
        ({"folds": 5}, "--folds 5 would do nothing: fusion 'cooc' with head 'auto' is trained"),
        ({"fusion": "mean", "head": "lda", "folds": 1}, "--folds 1 leaves nothing to fit on"),
        ({"fusion": "mean", "lr": 0.1}, "--lr would do nothing: fusion 'mean' with head 'auto' is"),
        ({"fusion": "auto", "epochs": 9, "dropout": 0.1}, "--epochs --dropout would do nothing"),
        ({"fusion": "max", "val_fraction": 0.2}, "--val-fraction would do nothing"),
        ({"fusion": "concat", "fast_dev_run": True}, "--fast-dev-run would do nothing"),
        ({"patience": 3, "val_fraction": 0}, "--patience 3 would do nothing with --val-fraction 0"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    """An option that the others make void is refused, not ignored."""
    with pytest.raises(ConfigError, match=message):
        FitConfig(cache="a.zarr", **options)


def test_the_default_place_of_a_run() -> None:
    """A run lies in runs/<cache>-<fusion>-<seed>; a development run never takes that place."""
    config = FitConfig(cache="s3://bucket/r8.zarr/", fusion="mean", seed=3)
    assert config.run_path.as_posix() == "runs/r8-mean-3"
    assert FitConfig(cache="r8.zarr", fast_dev_run=True).run_path.name == "r8-cooc-0-dev"


@pytest.mark.parametrize("field", dataclasses.fields(Training), ids=lambda field: field.name)
def test_the_help_names_the_tuned_number(field: dataclasses.Field[float]) -> None:
    """The help text of an option that is left open tells the number that it has then."""
    assert f"{field.default:g}" in field_docs(FitConfig)[field.name]
    assert getattr(FitConfig(cache="a.zarr").training, field.name) == field.default


@pytest.mark.parametrize("given", ["mean,last", " mean, last", ["mean", "last"], ("mean", "last")])
def test_one_text_or_a_list_stands_for_names(given: Any) -> None:
    """What a command splits at commas a text in Python is, too, and never letters."""
    assert FitConfig(cache="c.zarr", pooling=given).pooling == ("mean", "last")
    assert SweepConfig(cache="c.zarr", pooling=given).pooling == ("mean", "last")
    assert AuditConfig(cache="c.zarr", pooling=given).pooling == ("mean", "last")
    assert ExtractConfig(model="minilm", layers="1", pooling=given).pooling == ("mean", "last")
    prompted = ExtractConfig(model="minilm", layers="1", prompts="Good, or bad?")  # type: ignore[arg-type]
    assert prompted.prompts == ("Good, or bad?",)
    with pytest.raises(ConfigError, match=r"pooling is 3, of type int. Pass names: a tuple or"):
        FitConfig(cache="c.zarr", pooling=3)  # type: ignore[arg-type]


def made(config: type, **options: Any) -> Any:
    needed = {"model": "minilm", "layers": "1"} if config is ExtractConfig else {"cache": "c.zarr"}
    return config(**{**needed, **options})


@pytest.mark.parametrize(
    ("config", "option", "given", "taken"),
    [
        (FitConfig, "seed", np.int64(3), 3),
        (FitConfig, "epochs", np.array(4), 4),
        (FitConfig, "epochs", torch.tensor(4), 4),
        (FitConfig, "lr", np.float32(0.25), 0.25),
        (FitConfig, "lr", np.longdouble(0.25), 0.25),
        (FitConfig, "val_fraction", 0, 0.0),
        (FitConfig, "deterministic", np.True_, True),
        (FitConfig, "cache", Path("a/b.zarr"), str(Path("a/b.zarr"))),
        (FitConfig, "output", Path("run"), "run"),
        (FitConfig, "fusion", np.str_("mean"), "mean"),
        (FitConfig, "devices", 1, "1"),
        (FitConfig, "layers", 8, "8"),
        (FitConfig, "layers", [8, "last:2"], "8,last:2"),
        (FitConfig, "source", np.array(["a", "b"]), ("a", "b")),
        (FitConfig, "pooling", pd.Series(["mean"]), ("mean",)),
        (FitConfig, "pooling", {"mean", "last"}, ("last", "mean")),
        (FitConfig, "class_weight", {np.str_("a"): np.float32(2)}, {"a": 2.0}),
        (SweepConfig, "folds", np.int8(5), 5),
        (SweepConfig, "layers", range(2, 5), "2,3,4"),
        (SweepConfig, "output", Path("sweep"), "sweep"),
        (AuditConfig, "seed", np.uint16(3), 3),
        (AuditConfig, "cache", Path("c.zarr"), "c.zarr"),
        (AuditConfig, "defuse_formulas", np.False_, False),
        (ExtractConfig, "layers", np.arange(1, 4), "1,2,3"),
        (ExtractConfig, "layers", np.int64(-1), "-1"),
        (ExtractConfig, "limit", np.int64(7), 7),
        (ExtractConfig, "cache", Path("c.zarr"), "c.zarr"),
        (ExtractConfig, "dataset", Path("texts.csv"), "texts.csv"),
        (ExtractConfig, "model", Path("minilm"), "minilm"),
        (ExtractConfig, "devices", np.int64(2), "2"),
        (ExtractConfig, "gpus_per_worker", 2, 2.0),
        (ExtractConfig, "unlabelled", -1, "-1"),
        (ExtractConfig, "label_column", ["a", "b"], "a,b"),
        (ExtractConfig, "text_column", ("title", "body"), "title,body"),
        (ExtractConfig, "prompts", np.array(["Good, or bad?"]), ("Good, or bad?",)),
    ],
)
def test_values_of_other_packages_are_plain_in_a_record(
    config: type, option: str, given: Any, taken: Any
) -> None:
    """Numbers of numpy and torch, paths, lists and arrays are taken, and recorded as plain JSON."""
    found = getattr(made(config, **{option: given}), option)
    assert (found, type(found)) == (taken, type(taken))
    record = dataclasses.asdict(made(config, **{option: given}))
    assert json.loads(json.dumps(record))[option] == (
        list(taken) if isinstance(taken, tuple) else taken
    )


@pytest.mark.parametrize(
    ("config", "option", "given", "message"),
    [
        (FitConfig, "seed", 1.5, "seed is 1.5, of type float. Pass a whole number."),
        (FitConfig, "seed", None, "seed is None, of type NoneType. Pass a whole number."),
        (FitConfig, "epochs", True, "epochs is True, of type bool. Pass a whole number or None."),
        (FitConfig, "lr", "0.1", "lr is '0.1', of type str. Pass a number or None."),
        (FitConfig, "lr", 10**400, "of type int. Pass a number or None."),
        (FitConfig, "deterministic", 1, "deterministic is 1, of type int. Pass True or False."),
        (FitConfig, "overwrite", "no", "overwrite is 'no', of type str. Pass True or False."),
        (FitConfig, "cache", None, "cache is None, of type NoneType. Pass a text."),
        (FitConfig, "cache", b"c.zarr", "cache is b'c.zarr', of type bytes. Pass a text."),
        (FitConfig, "fusion", ["mean"], "fusion is ['mean'], of type list. Pass a text."),
        (FitConfig, "layers", "x", "--layers has 'x', which is no layer. Write numbers (8,16)"),
        (FitConfig, "layers", [], "--layers '' names no layer"),
        (
            FitConfig,
            "layers",
            [1.5],
            "layers is [1.5], of type list. Pass a text, a whole number, a list of such, or None.",
        ),
        (FitConfig, "devices", [1], "devices is [1], of type list. Pass a text or a whole number."),
        (FitConfig, "max_time", 600, "max_time is 600, of type int. Pass a text or None."),
        (FitConfig, "class_weight", 3, "class_weight is 3, of type int. Pass none, balanced, or"),
        (FitConfig, "class_weight", None, "class_weight is None, of type NoneType. Pass none, bal"),
        (FitConfig, "class_weight", [2.0], "class_weight is [2.0], of type list. Pass none, balan"),
        (SweepConfig, "head", ["lda"], "head is ['lda'], of type list. Pass a text."),
        (SweepConfig, "layers", "1-3", "--layers has '1-3', which is no layer."),
        (AuditConfig, "split", 3, "split is 3, of type int. Pass a text."),
        (ExtractConfig, "limit", True, "limit is True, of type bool. Pass a whole number or None."),
        (ExtractConfig, "layers", True, "layers is True, of type bool. Pass a text, a whole numbe"),
        (
            ExtractConfig,
            "prompts",
            [3],
            "prompts is [3], of type list. Pass texts: a tuple or list",
        ),
        (ExtractConfig, "pooling", {"mean": 1}, "pooling is {'mean': 1}, of type dict. Pass names"),
        (ExtractConfig, "pooling", pd.DataFrame({"mean": ["last"]}), "of type DataFrame. Pass na"),
        (
            ExtractConfig,
            "compute_dtype",
            torch.float16,
            "compute_dtype is torch.float16, of type dtype. Pass a text.",
        ),
        (
            ExtractConfig,
            "text_column",
            2,
            "text_column is 2, of type int. Pass a text, a list of such, or None.",
        ),
    ],
)
def test_values_of_another_type_are_refused(
    config: type, option: str, given: Any, message: str
) -> None:
    """With the value, its type, and what the option takes."""
    with pytest.raises(ConfigError) as caught:
        made(config, **{option: given})
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [FitConfig, SweepConfig, AuditConfig, ExtractConfig])
def test_what_is_taken_is_taken_again(config: type) -> None:
    """A config made of the fields of another is equal to it."""
    first = made(config, layers=np.arange(1, 4), pooling=["mean"], seed=np.int64(5))
    assert config(**vars(first)) == first
    assert dataclasses.replace(first) == first
