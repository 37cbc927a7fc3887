"""What `llmembed-fit` can be told: one frozen dataclass that holds every default.

The defaults of heads and gradient fits were chosen by cross-validation on training splits of real
features; while the stack under `auto` and `cooc` was designed, test figures stood beside the
held-out ones (benchmarks/LOG.md). Names are checked here, once, before anything is read; whether
the cache has the layers, poolings and sources asked for is known only to the cache, and checked
there.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmembed.common.cluster import check_engine
from llmembed.common.errors import ConfigError

COMPLETING_FUSIONS = ("cooc", "cooc-cosine", "cooc-sqrt")  # they complete a solved classifier
LEARNED_FUSIONS = (*COMPLETING_FUSIONS, "scalar-mix", "attention", "gated")
FIXED_FUSIONS = ("mean", "max", "concat", "single", "auto")  # without weights of their own
FUSIONS = (*FIXED_FUSIONS, *LEARNED_FUSIONS)
SOLVED_HEADS = ("ridge", "lda", "linear")  # on a fusion without weights
STACKED_HEADS = ("auto", "ridge", "lda")  # of fusion auto; its auto is lda
HEADS = ("auto", "linear", "mlp", "ridge", "lda")
CALIBRATIONS = ("temperature", "none")
DEFAULT_FOLDS, MIN_FOLDS = 5, 2
PRESETS = ("none", "paper")
CLASS_WEIGHTS = ("none", "balanced")
ACCELERATORS = ("auto", "cpu", "gpu", "mps")
LOGGERS = ("csv", "tensorboard", "wandb")
EXPORTS = ("onnx",)
FLOAT32 = "32-true"
PRECISIONS = (FLOAT32, "bf16-mixed", "16-mixed")
_DEVICE = re.compile(r"1|\d+,")
_MAX_TIME = re.compile(r"\d{2}:\d{2}:\d{2}:\d{2}")  # Lightning's DD:HH:MM:SS


@dataclass(frozen=True, kw_only=True)
class Training:
    """Numbers of a fit by gradient, where the options leave them open."""

    val_fraction: float = 0.1
    """Share of the training rows that early stopping watches."""
    epochs: int = 60
    """Most epochs."""
    batch_size: int = 128
    """Examples in a step."""
    lr: float = 1e-3
    """Learning rate."""
    weight_decay: float = 0.01
    """Weight decay."""
    dropout: float = 0.5
    """Share of the fused vector that is dropped."""
    patience: int = 6
    """Epochs without a lower validation loss."""


TRAINING = {
    "none": Training(),
    "paper": Training(batch_size=1024, lr=1e-4, weight_decay=0.0, patience=10),
}
_FIXED_BY_PAPER = ("head", "layers", "batch_size", "lr", "weight_decay", "dropout", "class_weight")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Every option of a fit; the docstring under a field is its `--help` text.

    Raises:
        ConfigError: a name is unknown or a number is out of its range.
    """

    cache: str
    """Cache to read: one data set's features of one or several sources."""
    source: tuple[str, ...] = ()
    """Sources to use; without it, all of the cache."""
    layers: str | None = None
    """Layers to use of those in the cache: 8,16,24; a range 8:25:8; last:2, the last two in the
    cache; -1, the model's last; without it, all of the cache."""
    pooling: tuple[str, ...] = ()
    """Poolings to use; without it, all of the cache."""
    fusion: str = "cooc"
    """How the features become one vector: cooc, cooc-cosine, cooc-sqrt (of the Gram matrix's
    entries the power normalisation, the cosines, the matrix square root), scalar-mix, attention,
    gated (which learn), mean, max, concat, single (one layer), or auto: a stack of single layers,
    their mean and concatenations of some, picked over folds of the training rows."""
    head: str = "auto"
    """Classifier on the fused vector: linear (softmax), mlp, ridge, lda. auto is linear with a
    fusion that learns, lda with auto, else the best of ridge, lda and linear over folds of the
    training rows."""
    preset: str = "none"
    """paper: the published recipe to the letter, defects included: the last five layers in the
    cache on their raw scales, cooc of width 1024, its MLP, a softmax before the cross-entropy, Adam
    with 1e-4, batches of 1024; or none."""
    sigma: float | None = None
    """Sigma of the power normalisation in --preset paper; without it 1, 0.1, 0.01 and 0.001 are
    tried, and the lowest validation loss decides."""
    eval_split: str | None = None
    """Split for the final figures: test, else validation, else 10 % of train held out, which of 5
    rows is none."""
    val_fraction: float | None = None
    """Share of the training rows that early stopping of a fit by gradient watches, stratified; 0
    trains all epochs. Without it the split validation, where test is evaluated, else 0.1, which of
    5 rows is none. Solved heads (ridge, lda; linear where the fusion does not learn) use folds."""
    folds: int = 0
    """Stratified folds of the training rows that choose the strength of a solved head; 0 is 5, or
    one a row where there are fewer rows."""
    epochs: int | None = None
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
    class_weight: str = "none"
    """Weights of the classes in the loss: none, or balanced (inverse to their counts)."""
    seed: int = 0
    """Seed of the shares, the first weights, the order of batches and dropout."""
    n_seeds: int = 1
    """Fits with the seeds seed, seed + 1, ...; the one with the lowest validation loss is kept.
    What cooc and auto choose by folds is chosen once, with the first seed."""
    calibrate: str = "temperature"
    """Scaling of the probabilities on rows not fitted to (folds, or the validation share):
    temperature, or none."""
    accelerator: str = "auto"
    """Lightning's accelerator: auto, cpu, gpu, mps."""
    devices: str = "1"
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
    logger: str = "csv"
    """Where a fit by gradient logs its losses, epoch by epoch: csv or tensorboard, in the run's
    folder logs, or wandb."""
    checkpoint_s: float = 10.0
    """Seconds between checkpoints of a fit by gradient, after whole epochs; the same command goes
    on from the last one if it was killed."""
    export: str | None = None
    """Also write the classifier in this format: onnx, as model.onnx in the run's folder."""
    output: str | None = None
    """Folder of the run; without it, runs/<cache>-<fusion>-<seed>. A run of the same fusion that is
    there is replaced; anything but a run is refused."""
    overwrite: bool = False
    """Replace a run of another fusion too."""

    def __post_init__(self) -> None:
        """Check each name and number once."""
        self._check_names()
        self._check_numbers()
        self._check_head()
        self._check_void()
        self._check_preset()
        self._check_engine()
        if not _DEVICE.fullmatch(self.devices):
            raise ConfigError(
                f"devices {self.devices!r} is not one device; a fit uses one, since its steps are "
                "too short to be shared. Pass --devices 1, or 1, with the comma for number 1."
            )
        if self.max_time is not None and not _MAX_TIME.fullmatch(self.max_time):
            raise ConfigError(
                f"max_time {self.max_time!r} is not DD:HH:MM:SS; pass --max-time 00:00:10:00 "
                "for ten minutes."
            )

    @property
    def solved_heads(self) -> tuple[str, ...]:
        """Heads that folds choose among; none where the fit is by gradient.

        >>> FitConfig(cache="r8.zarr", fusion="mean").solved_heads
        ('ridge', 'lda', 'linear')
        """
        if self.fusion not in FIXED_FUSIONS:
            return ()
        return SOLVED_HEADS if self.head == "auto" else tuple({self.head} & set(SOLVED_HEADS))

    @property
    def is_solved(self) -> bool:
        """Whether the head is solved, and folds take the place of a validation share."""
        return bool(self.solved_heads)

    @property
    def sums_moments(self) -> bool:
        """Whether something is solved from moments: the head, the choice of auto, cooc's base.

        >>> FitConfig(cache="r8.zarr", fusion="cooc").sums_moments
        True
        >>> FitConfig(cache="r8.zarr", fusion="gated").sums_moments
        False
        """
        solves = self.is_solved or self.fusion == "auto" or self.fusion in COMPLETING_FUSIONS
        return solves and self.preset == "none"

    @property
    def gradient_head(self) -> str:
        """Name of the head of a fit by gradient."""
        if self.preset != "none":
            return self.preset
        return "linear" if self.head == "auto" else self.head

    @property
    def operator(self) -> str:
        """Name of the fusion that is built: that of the preset, where there is one."""
        return self.fusion if self.preset == "none" else self.preset

    @property
    def training(self) -> Training:
        """Numbers of a fit by gradient: those given, and for the others those that were tuned.

        >>> FitConfig(cache="r8.zarr", epochs=3).training.epochs
        3
        >>> FitConfig(cache="r8.zarr", preset="paper").training.batch_size
        1024
        """
        return dataclasses.replace(TRAINING[self.preset], **self._given_training())

    @property
    def needs_validation(self) -> bool:
        """Whether a fit by gradient can't do without a validation share: one is asked for.

        >>> FitConfig(cache="r8.zarr").needs_validation
        False
        """
        chooses_sigma = self.preset == "paper" and self.sigma is None
        return chooses_sigma or bool(self.val_fraction)

    @property
    def device_index(self) -> int:
        """Number of the device among those of the accelerator.

        >>> FitConfig(cache="r8.zarr", devices="3,").device_index
        3
        """
        return int(self.devices.rstrip(",")) if self.devices.endswith(",") else 0

    @property
    def n_folds(self) -> int:
        """Number of folds, 0 resolved."""
        return self.folds or DEFAULT_FOLDS

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

    def _given_training(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Training)}
        return {name: value for name, value in given.items() if value is not None}

    def _check_names(self) -> None:
        for name, allowed in (
            ("fusion", FUSIONS),
            ("head", HEADS),
            ("preset", PRESETS),
            ("class_weight", CLASS_WEIGHTS),
            ("calibrate", CALIBRATIONS),
            ("accelerator", ACCELERATORS),
            ("precision", PRECISIONS),
            ("logger", LOGGERS),
            ("export", EXPORTS),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError.unknown(name, value, allowed, f"Pass one to {_option(name)}.")

    def _check_head(self) -> None:
        if self.head in {"ridge", "lda"} and not self.is_solved:
            raise ConfigError(
                f"head {self.head!r} is solved in closed form, which fusion {self.fusion!r} does "
                "not allow, since it learns weights of its own. Pass --head linear or mlp, or "
                f"one of these to --fusion: {', '.join(FIXED_FUSIONS)}."
            )
        if self.folds and not self.is_solved:
            raise ConfigError(
                f"--folds {self.folds} would do nothing: fusion {self.fusion!r} with head "
                f"{self.head!r} is trained by gradient and watches --val-fraction. Leave it out, "
                f"or pass --fusion {' or '.join(FIXED_FUSIONS)} and another --head than mlp."
            )
        if self.folds == 1:
            raise ConfigError("--folds 1 leaves nothing to fit on. Pass 2 or more.")

    def _check_void(self) -> None:
        """Refuse what only a fit by gradient uses where the head is solved."""
        given = self._given_training() | {
            name: getattr(self, name)
            for name, default in (
                ("precision", FLOAT32),
                ("max_time", None),
                ("fast_dev_run", False),
                ("logger", "csv"),
                ("checkpoint_s", 10.0),
            )
            if getattr(self, name) != default
        }
        if self.is_solved and given:
            raise ConfigError(
                f"{' '.join(map(_option, given))} would do nothing: fusion {self.fusion!r} with "
                f"head {self.head!r} is solved, not trained by gradient. Leave it out, or pass "
                f"--head mlp, or one of these to --fusion: {', '.join(LEARNED_FUSIONS)}."
            )

        if self.val_fraction == 0 and self.patience is not None:
            raise ConfigError(
                f"--patience {self.patience} would do nothing with --val-fraction 0, which leaves "
                "no rows to watch. Leave one of the two out."
            )

    def _check_preset(self) -> None:
        if self.preset == "none":
            if self.sigma is not None:
                raise ConfigError(
                    f"--sigma {self.sigma} would do nothing: cooc learns its own. Leave it out, or "
                    "pass --preset paper."
                )
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("fusion", *_FIXED_BY_PAPER):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{_option(name)} {getattr(self, name)} contradicts --preset paper, which "
                    "fixes it. Leave one of the two out."
                )
        if self.sigma is None and self.val_fraction == 0:
            raise ConfigError(
                "--val-fraction 0 leaves --preset paper nothing to choose sigma by. Pass --sigma, "
                "or leave it out."
            )

    def _check_engine(self) -> None:
        check_engine(self, ("address", "workers"))
        if self.engine == "ray" and not self.sums_moments:
            raise ConfigError(
                f"--engine ray would do nothing: fusion {self.operator!r} with head {self.head!r} "
                "is trained by gradient, in one process, and has no Gram matrix to sum. Leave it "
                "out, or pass --fusion auto, cooc, or mean with another --head than mlp."
            )

    def _check_numbers(self) -> None:
        for name, value, low, high in (
            ("val_fraction", self.val_fraction, 0, 0.9),
            ("folds", self.folds, 0, 1_000),
            ("epochs", self.epochs, 1, 1_000_000),
            ("batch_size", self.batch_size, 1, 1 << 30),
            ("lr", self.lr, 1e-9, 100),
            ("weight_decay", self.weight_decay, 0, 1e6),
            ("dropout", self.dropout, 0, 0.99),
            ("patience", self.patience, 1, 1_000_000),
            ("sigma", self.sigma, 1e-9, 1e9),
            ("memory_gb", self.memory_gb, 0, 1e9),
            ("checkpoint_s", self.checkpoint_s, 0, 1e6),
            ("seed", self.seed, 0, 2**32 - 1),
            ("n_seeds", self.n_seeds, 1, 1_000),
            ("workers", self.workers, 1, 100_000),
        ):
            if value is not None and not low <= value <= high:
                raise ConfigError(
                    f"{name} {value} is out of range: it must lie between {low} and {high}. "
                    f"Pass another {_option(name)}."
                )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
