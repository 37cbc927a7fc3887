"""What values options may have, and how those with several forms are read."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import click

from llmembed.common.errors import ConfigError
from llmembed.train.fusions import AUTO, FUSIONS, choices

FLOAT32 = "32-true"
CLASS_WEIGHTS = ("none", "balanced")
ClassWeight: TypeAlias = str | Mapping[str, float] | tuple[str, ...]
"""none or balanced; a weight of each class named; or, as the commands take them, NAME=WEIGHT."""
CHOICES = {
    "calibrate": ("temperature", "none"),
    "accelerator": ("auto", "cpu", "gpu", "mps"),
    "precision": (FLOAT32, "bf16-mixed", "16-mixed"),
    "logger": ("csv", "tensorboard", "wandb"),
    "export": ("onnx",),
    "baseline": ("tfidf", "none"),
}
RANGES = {
    "val_fraction": (0, 0.9),
    "folds": (0, 1_000),
    "epochs": (1, 1_000_000),
    "batch_size": (1, 1 << 30),
    "lr": (1e-9, 100),
    "weight_decay": (0, 1e6),
    "dropout": (0, 0.99),
    "patience": (1, 1_000_000),
    "sigma": (1e-9, 1e9),
    "threshold": (0, 1),
    "memory_gb": (0, 1e9),
    "checkpoint_s": (0, 1e6),
    "seed": (0, 2**32 - 1),
    "n_seeds": (1, 1_000),
    "workers": (1, 100_000),
}
CONFORMAL_BY = ("all", "class")
DEVICE = re.compile(r"1|\d+,")
MAX_TIME = re.compile(r"\d{2}:\d{2}:\d{2}:\d{2}")  # Lightning's DD:HH:MM:SS


def check_conformal_by(by: str, conformal: float | None) -> None:
    """Refuse sets of labels by what there is not, or without the share that they are to keep.

    Raises:
        click.UsageError: they are such.
    """
    if by not in CONFORMAL_BY:
        raise click.UsageError(f"--conformal-by is {by!r}. Pass {' or '.join(CONFORMAL_BY)}.")
    if by != "all" and conformal is None:
        raise click.UsageError("--conformal-by is for the sets of --conformal.")


def read_class_weight(given: ClassWeight) -> str | dict[str, float]:
    """Read weights of classes in any of their forms.

    >>> read_class_weight(("earn=2.5", "a=b=1"))
    {'earn': 2.5, 'a=b': 1.0}
    >>> read_class_weight(("balanced",)), read_class_weight(())
    ('balanced', 'none')
    """
    if isinstance(given, str):
        given = (given,)
    if not isinstance(given, Mapping):
        if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
            raise ConfigError(
                f"class_weight is {given!r}, of type {type(given).__name__}. Pass none, balanced, "
                "or a dict with a weight for each class."
            )
        if len(given) <= 1 and "".join(given) in {"", *CLASS_WEIGHTS}:
            return "".join(given) or "none"
        given = _named_weights(given)
    for name, weight in given.items():
        if not isinstance(weight, numbers.Real) or not 0 < float(weight) < math.inf:
            raise ConfigError(
                f"the class weight of {name!r} is {weight!r}, and a weight is a finite number above"
                " 0. Pass one to --class-weight, or leave the class out, for 1."
            )
    return {str(name): float(weight) for name, weight in given.items()}


def _named_weights(given: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in given:
        name, equals, weight = one.rpartition("=")
        if not equals:
            remedy = "Pass one to --class-weight, or CLASS=WEIGHT for each class, without these."
            raise ConfigError.unknown("class_weight", one, CLASS_WEIGHTS, remedy)
        if name in found:
            raise ConfigError(
                f"--class-weight gives class {name!r} two weights, {found[name]} and {weight}. "
                "Leave one of them out."
            )
        try:
            found[name] = float(weight)
        except ValueError:
            found[name] = weight
    return found


def fusions(*, learn: bool) -> tuple[str, ...]:
    """List fusions that learn weights of their own, or those that don't; no package is imported."""
    known = (name for name in choices(FUSIONS) if not FUSIONS.brought_by(name))
    found = tuple(name for name in known if FUSIONS[name].learns == learn)
    return found if learn else (*found, AUTO)


def option(name: str) -> str:
    """Give the option of a field, as the commands spell it."""
    return f"--{name.replace('_', '-')}"
