from __future__ import annotations

import dataclasses
from typing import Any

import pytest

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
