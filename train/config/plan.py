"""What a fit does, every option resolved: all that the rooms below see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Training:
    """Numbers of a fit by gradient, where the options of these names leave them open."""

    val_fraction: float = 0.1
    epochs: int = 60
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    dropout: float = 0.5
    patience: int = 6


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a preset fixes, and what it leaves to its own tuning."""

    fusion: str
    head: str
    fixes: tuple[str, ...]  # options that can't be given beside it
    training: Training  # numbers that were tuned, where the options leave them open
    features: str  # function that chooses among them, as module:name
    sigmas: tuple[float, ...]  # of the power normalisation; the lowest validation loss decides


PRESETS = {
    "paper": Recipe(
        fusion="paper",
        head="paper",
        fixes=(
            *("fusion", "head", "layers", "batch_size", "lr", "weight_decay", "dropout"),
            "class_weight",
        ),
        training=Training(batch_size=1024, lr=1e-4, weight_decay=0.0, patience=10),
        features="llmembed.train.fusions.paper:paper_features",
        sigmas=(1.0, 0.1, 0.01, 0.001),
    )
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which features of a cache are read, and which of its rows train, are watched, evaluated.

    A field without a comment is the option of its name.
    """

    cache: str
    source: tuple[str, ...]
    layers: str | None
    pooling: tuple[str, ...]
    memory_gb: float | None
    eval_split: str | None
    class_weight: str | Mapping[str, float]
    ignore_weights: bool
    ignore_groups: bool
    seed: int
    choose: str | None  # `Recipe.features`
    standardises: bool  # whether features get mean 0 and deviation 1, or keep their raw scales
    val_fraction: float  # share of the training rows that early stopping watches; 0 if solved
    draws: bool  # whether an option names it, so that it is drawn although there is a split for it
    needs_share: bool  # whether a fit can't do without it
    epochs: int  # how long all rows train where they are too few for a share


@dataclass(frozen=True, kw_only=True)
class Method:
    """Which classifier, and how what can be solved of it is solved; fields as in `Reading`."""

    cache: str
    memory_gb: float | None
    folds: int
    val_fraction: float | None
    calibrate: str
    threshold: float | None
    accelerator: str
    devices: str
    engine: str
    address: str | None
    workers: int
    seed: int
    fusion: str  # that of the preset, where there is one
    head: str  # or auto
    solved_heads: tuple[str, ...]  # that folds choose among; none where the fit is by gradient


@dataclass(frozen=True, kw_only=True)
class TrainerFlags:
    """Flags of Lightning's trainer, as it names and reads them."""

    accelerator: str
    devices: str
    precision: str
    max_time: str | None
    deterministic: bool
    fast_dev_run: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fit does: every option resolved."""

    name: str  # of the run
    reading: Reading
    method: Method
    training: Training
    trainer: TrainerFlags
    sigmas: tuple[float, ...]  # a fit of each seed with each; none where there is none to choose
    seeds: range
    logger: str
    checkpoint_s: float
