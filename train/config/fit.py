"""What `llmembed-fit` can be told, and the plan that it comes to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmembed.common.cluster import check_engine
from llmembed.common.console import COMPLETES, FOLDER, GROUP, REPEATED, TAKES, as_declared
from llmembed.common.errors import ConfigError
from llmembed.common.layers import check_layers
from llmembed.train.config.allowed import (
    CHOICES,
    DEVICE,
    FLOAT32,
    MAX_TIME,
    RANGES,
    ClassWeight,
    fusions,
    option,
    read_class_weight,
)
from llmembed.train.config.plan import (
    PRESETS,
    Method,
    Plan,
    Reading,
    Recipe,
    TrainerFlags,
    Training,
)
from llmembed.train.fusions import AUTO, FUSIONS, HEADS, choices

_NOT_COMPARED = ("preset", "sigma", "engine", "address", "workers", "fast_dev_run", "output")
_OF_GRADIENT = ("precision", "max_time", "fast_dev_run", "logger", "checkpoint_s")
_OF_TRAINING = tuple(field.name for field in dataclasses.fields(Training))
_Part = TypeVar("_Part", Reading, Method, TrainerFlags)


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Every option of a fit; the docstring under a field is its `--help` text.

    Numbers of numpy, paths, lists, ranges and arrays are taken, and held as plain numbers, texts
    and tuples; `layers` may be a number or several.

    >>> FitConfig(cache=Path("r8.zarr"), layers=[8, 16], pooling=["mean"]).layers
    '8,16'

    Raises:
        ConfigError: a name is unknown or a number is out of its range.
    """

    cache: str = dataclasses.field(metadata={GROUP: "Features", COMPLETES: FOLDER})
    """Cache to read: one data set's features of one or several sources."""
    source: tuple[str, ...] = ()
    """Sources to use; without it, all of the cache."""
    layers: str | None = dataclasses.field(default=None, metadata={TAKES: (int, list)})
    """Layers to use of those in the cache: 8,16,24; a range 8:25:8; last:2, the last two in the
    cache; -1, the model's last; without it, all of the cache."""
    pooling: tuple[str, ...] = ()
    """Poolings to use; without it, all of the cache."""
    fusion: str = dataclasses.field(
        default="cooc", metadata={GROUP: "Classifier", COMPLETES: lambda: (AUTO, *choices(FUSIONS))}
    )
    """How the features become one vector: cooc, cooc-cosine, cooc-sqrt (of the Gram matrix's
    entries the power normalisation, the cosines, the matrix square root), scalar-mix, attention,
    gated (which learn), mean, max, concat, single (one layer), or auto: a stack of single layers,
    their mean and concatenations of some, picked over folds of the training rows."""
    head: str = dataclasses.field(
        default="auto", metadata={COMPLETES: lambda: (AUTO, *choices(HEADS))}
    )
    """Classifier on the fused vector: linear (softmax), mlp, ridge, lda. auto is linear with a
    fusion that learns, lda beside some linear ones with auto, else the best of ridge, lda and
    linear over folds of the training rows."""
    preset: str = dataclasses.field(default="none", metadata={COMPLETES: lambda: PRESETS})
    """paper: the published recipe to the letter, defects included: the last five layers in the
    cache on their raw scales, cooc of width 1024, its MLP, a softmax before the cross-entropy, Adam
    with 1e-4, batches of 1024; or none."""
    sigma: float | None = None
    """Sigma of the power normalisation in --preset paper; without it 1, 0.1, 0.01 and 0.001 are
    tried, and the lowest validation loss decides."""
    eval_split: str | None = dataclasses.field(default=None, metadata={GROUP: "Rows"})
    """Split for the final figures: test, else validation, else 10 % of train held out, which of 5
    rows is none."""
    val_fraction: float | None = None
    """Share of the training rows that early stopping of a fit by gradient watches, stratified; 0
    trains all epochs. Without it the split validation, where test is evaluated, else 0.1, which of
    5 rows is none. Solved heads (ridge, lda; linear where the fusion does not learn) use folds."""
    folds: int = 0
    """Stratified folds of the training rows that choose the strength of a solved head; 0 is 5, of
    fewer than 2,048 rows 10, or one a row where there are fewer."""
    epochs: int | None = dataclasses.field(
        default=None, metadata={GROUP: "Training, repetition, calibration"}
    )
    """Most epochs of a fit by gradient; 60 without it."""
    batch_size: int | None = None
    """Examples in a training step; 128 without it."""
    lr: float | None = None
    """Learning rate of AdamW; 0.001 without it."""
    weight_decay: float | None = None
    """Weight decay of AdamW; 0.01 without it."""
    dropout: float | None = None
    """Share of the fused vector that is dropped while training; 0.5 without it."""
    patience: int | None = None
    """Epochs without a lower validation loss before the fit stops; 6 without it."""
    class_weight: ClassWeight = dataclasses.field(
        default="none", metadata={REPEATED: "none|balanced|CLASS=WEIGHT"}
    )
    """Weights of the classes: none, balanced (inverse to their counts), or CLASS=WEIGHT, which is
    repeatable, classes that are not named having 1; in Python a dict."""
    ignore_weights: bool = False
    """Count all rows alike, although the cache has weights of rows."""
    ignore_groups: bool = False
    """Divide rows as they come, although the cache says which belong together: without it no group
    is on two sides of a fold or share."""
    seed: int = 0
    """Seed of the shares, the first weights, the order of batches and dropout."""
    n_seeds: int = 1
    """Fits with the seeds seed, seed + 1, ...; the one with the lowest validation loss is kept.
    What cooc and auto choose by folds is chosen once, with the first seed."""
    calibrate: str = "temperature"
    """Scaling of the probabilities on rows not fitted to (folds, or the validation share):
    temperature, or none."""
    threshold: float | None = None
    """Where a text may have several labels: the probability from which on each is given, such as
    0.5. Without it, the one with the best F1 of each label on rows not fitted to (folds, or the
    validation share)."""
    accelerator: str = dataclasses.field(
        default="auto", metadata={GROUP: "Device, memory, and who computes"}
    )
    """Lightning's accelerator: auto, cpu, gpu, mps."""
    devices: str = dataclasses.field(default="1", metadata={TAKES: (int,)})
    """Lightning's devices: 1, or k, (with the comma) for device number k. A fit uses one."""
    precision: str = FLOAT32
    """Lightning's precision: 32-true, bf16-mixed, 16-mixed."""
    max_time: str | None = None
    """Longest time of one fit as DD:HH:MM:SS."""
    deterministic: bool = False
    """Allow only algorithms that are deterministic on the device."""
    fast_dev_run: bool = False
    """One batch of training and validation, to see that it works."""
    memory_gb: float | None = None
    """Most memory for the features of a split, as float32; beyond it they lie in a file in TMPDIR
    or /var/tmp. Without it, half of the machine's."""
    engine: str = "local"
    """Who sums the Gram matrices of solved heads: local (this process), or ray (workers on this
    machine or in a cluster, which read their share of the cache themselves)."""
    address: str | None = None
    """Ray cluster to join: auto, or host:port; without it Ray is started on this machine."""
    workers: int = 1
    """Workers of --engine ray, at most; each takes one CPU."""
    logger: str = dataclasses.field(default="csv", metadata={GROUP: "Output"})
    """Where a fit by gradient logs its losses, epoch by epoch: csv or tensorboard, in the run's
    folder logs, or wandb."""
    checkpoint_s: float = 10.0
    """Seconds between checkpoints of a fit by gradient, after whole epochs; the same command goes
    on from the last one if it was killed."""
    export: str | None = None
    """Also write the classifier in this format: onnx, as model.onnx in the run's folder."""
    baseline: str = "tfidf"
    """What the figures stand beside, besides the majority class: tfidf (logistic regression on
    words and pairs of words, where the texts are on this machine; once a data set), or none."""
    store_texts: bool = False
    """Store the evaluation texts in the run: in predictions.parquet and report.html. Without it a
    run holds no text."""
    output: str | None = dataclasses.field(default=None, metadata={COMPLETES: FOLDER})
    """Folder of the run; without it, runs/<cache>-<fusion>-<seed>. A run of the same fusion that is
    there is replaced; anything but a run is refused."""
    overwrite: bool = False
    """Replace a run of another fusion too."""
    compare: bool = False
    """Fit all fusions from one reading of the cache, each with the run that a fit of it alone would
    write, and compare them with --fusion on the same rows. Left out are single of several features,
    fusions that need one width where widths differ, and with a solved --head those that learn."""

    def __post_init__(self) -> None:
        """Check each name and number once."""
        as_declared(self)
        object.__setattr__(self, "class_weight", read_class_weight(self.class_weight))
        if self.layers is not None:
            check_layers(self.layers)
        self._check_values()
        if self.compare:
            self.of_fusions()
            return
        self._check_head()
        self._check_void()
        self._check_preset()
        check_engine(self, ("address", "workers"))
        sums_moments = self.solved_heads or self.operator == AUTO
        if self.engine == "ray" and not (sums_moments or FUSIONS[self.operator].completes_base):
            raise ConfigError(
                f"--engine ray would do nothing: fusion {self.operator!r} with head {self.head!r} "
                "is trained by gradient, in one process, and has no Gram matrix to sum. Leave it "
                "out, or pass --fusion auto, cooc, or mean with another --head than mlp."
            )

    @property
    def solved_heads(self) -> tuple[str, ...]:
        """Heads that folds choose among; none where the fit is by gradient.

        >>> FitConfig(cache="r8.zarr", fusion="mean").solved_heads
        ('ridge', 'lda', 'linear')
        """
        if self.operator != AUTO and FUSIONS[self.operator].learns:
            return ()
        asked = choices(HEADS) if self.head == AUTO else (self.head,)
        return tuple(name for name in asked if HEADS[name].is_solved)

    @property
    def operator(self) -> str:
        """Name of the fusion that is built: that of the preset, where there is one."""
        return self._recipe.fusion if self._recipe else self.fusion

    @property
    def training(self) -> Training:
        """Numbers of a fit by gradient: those given, and for the others those that were tuned.

        >>> FitConfig(cache="r8.zarr", epochs=3).training.epochs
        3
        >>> FitConfig(cache="r8.zarr", preset="paper").training.batch_size
        1024
        """
        tuned = self._recipe.training if self._recipe else Training()
        return dataclasses.replace(tuned, **self._given_training())

    @property
    def run_path(self) -> Path:
        """Folder that the run is written to.

        >>> FitConfig(cache="data/sst2.zarr").run_path.as_posix()
        'runs/sst2-cooc-0'
        """
        if self.output is not None:
            return Path(self.output)
        name = f"{Path(self.cache.rstrip('/')).stem}-{self.operator}-{self.seed}"
        return Path("runs") / (f"{name}-dev" if self.fast_dev_run else name)

    def plan(self) -> Plan:
        """Resolve the options."""
        recipe, training, solved = self._recipe, self.training, self.solved_heads
        sigmas = recipe.sigmas if recipe and self.sigma is None else (self.sigma,)
        return Plan(
            name=self.run_path.name,
            reading=self._part(
                Reading,
                choose=recipe and recipe.features,
                standardises=recipe is None,
                val_fraction=0.0 if solved else training.val_fraction,
                draws=self.val_fraction is not None,
                needs_share=bool(self.val_fraction) or len(sigmas) > 1,
                epochs=training.epochs,
            ),
            method=self._part(
                Method,
                fusion=self.operator,
                head=recipe.head if recipe else self.head,
                solved_heads=solved,
            ),
            training=training,
            trainer=self._part(TrainerFlags),
            sigmas=tuple(sigma for sigma in sigmas if sigma is not None),
            seeds=range(self.seed, self.seed + self.n_seeds),
            logger=self.logger,
            checkpoint_s=self.checkpoint_s,
        )

    def of_fusions(self) -> tuple[FitConfig, ...]:
        """Give the options of each fit that `compare` asks for, that of `fusion` first.

        An option that does nothing for a fusion is left out for it.

        Raises:
            ConfigError: an option contradicts `compare`, or does nothing for all of the fusions.
        """
        for name in _NOT_COMPARED:
            if self._differs(name):
                raise ConfigError(
                    f"{option(name)} {getattr(self, name)} contradicts --compare, which fits every"
                    " fusion in this process and puts each run at its usual place. Leave one of "
                    "the two out."
                )
        others = [name for name in (*choices(FUSIONS), AUTO) if name != self.fusion]
        if self.head != AUTO and not HEADS[self.head].is_trained:
            others = [name for name in others if name == AUTO or not FUSIONS[name].learns]
        found = tuple(self._of_fusion(name) for name in (self.fusion, *others))
        for name in (*_OF_TRAINING, *_OF_GRADIENT, "folds"):
            default = getattr(FitConfig, name)
            if self._differs(name) and all(getattr(one, name) == default for one in found):
                raise ConfigError(
                    f"{option(name)} {getattr(self, name)} would do nothing: with head "
                    f"{self.head!r} no fusion has a use for it. Leave it out."
                )
        return found

    def _of_fusion(self, fusion: str) -> FitConfig:
        plain = FitConfig(cache=self.cache, fusion=fusion, head=self.head)
        void = (*_OF_TRAINING, *_OF_GRADIENT) if plain.solved_heads else ("folds",)
        left = {name: getattr(FitConfig, name) for name in void}
        return FitConfig(**{**vars(self), **left, "fusion": fusion, "compare": False})

    @property
    def _recipe(self) -> Recipe | None:
        return PRESETS.get(self.preset)

    def _part(self, kind: type[_Part], **resolved: Any) -> _Part:
        """Make a part of the plan: of the options of its names, and what is resolved."""
        names = {field.name for field in dataclasses.fields(kind)} - resolved.keys()
        return kind(**{name: getattr(self, name) for name in names}, **resolved)

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(FitConfig, name))

    def _given_training(self) -> dict[str, Any]:
        given = {name: vars(self)[name] for name in _OF_TRAINING}
        return {name: value for name, value in given.items() if value is not None}

    def _check_values(self) -> None:
        kinds = {"fusion": (AUTO, *choices(FUSIONS)), "head": (AUTO, *choices(HEADS))}
        for name, allowed in {**kinds, "preset": ("none", *PRESETS), **CHOICES}.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError.unknown(name, value, allowed, f"Pass one to {option(name)}.")
        if not DEVICE.fullmatch(self.devices):
            raise ConfigError(
                f"devices {self.devices!r} is not one device; a fit uses one, since its steps are "
                "too short to be shared. Pass --devices 1, or 1, with the comma for number 1."
            )
        if self.max_time is not None and not MAX_TIME.fullmatch(self.max_time):
            raise ConfigError(
                f"max_time {self.max_time!r} is not DD:HH:MM:SS; pass --max-time 00:00:10:00 "
                "for ten minutes."
            )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(
                    f"{name} {value} is out of range: it must lie between {low} and {high}. "
                    f"Pass another {option(name)}."
                )

    def _check_head(self) -> None:
        if self.head != AUTO and not HEADS[self.head].is_trained and not self.solved_heads:
            raise ConfigError(
                f"head {self.head!r} is solved in closed form, which fusion {self.fusion!r} does "
                "not allow, since it learns weights of its own. Pass --head linear or mlp, or "
                f"one of these to --fusion: {', '.join(fusions(learn=False))}."
            )
        if self.folds and not self.solved_heads:
            raise ConfigError(
                f"--folds {self.folds} would do nothing: fusion {self.fusion!r} with head "
                f"{self.head!r} is trained by gradient and watches --val-fraction. Leave it out, or"
                f" pass --fusion {' or '.join(fusions(learn=False))} and another --head than mlp."
            )
        if self.folds == 1:
            raise ConfigError("--folds 1 leaves nothing to fit on. Pass 2 or more.")

    def _check_void(self) -> None:
        """Refuse what only a fit by gradient uses where the head is solved."""
        changed = (name for name in _OF_GRADIENT if self._differs(name))
        given = [*self._given_training(), *changed]
        if self.solved_heads and given:
            raise ConfigError(
                f"{' '.join(map(option, given))} would do nothing: fusion {self.fusion!r} with "
                f"head {self.head!r} is solved, not trained by gradient. Leave it out, or pass "
                f"--head mlp, or one of these to --fusion: {', '.join(fusions(learn=True))}."
            )
        if self.val_fraction == 0 and self.patience is not None:
            raise ConfigError(
                f"--patience {self.patience} would do nothing with --val-fraction 0, which leaves "
                "no rows to watch. Leave one of the two out."
            )

    def _check_preset(self) -> None:
        if self._recipe is None:
            if self.sigma is not None:
                raise ConfigError(
                    f"--sigma {self.sigma} would do nothing: cooc learns its own. Leave it out, or "
                    "pass --preset paper."
                )
            return
        for name in self._recipe.fixes:
            if self._differs(name):
                raise ConfigError(
                    f"{option(name)} {getattr(self, name)} contradicts --preset {self.preset}, "
                    "which fixes it. Leave one of the two out."
                )
        if self.sigma is None and self.val_fraction == 0:
            raise ConfigError(
                f"--val-fraction 0 leaves --preset {self.preset} nothing to choose sigma by. Pass "
                "--sigma, or leave it out."
            )
