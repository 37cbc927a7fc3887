"""What `llmembed-sweep` can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llmembed.common.errors import ConfigError
from llmembed.train.config import DEFAULT_FOLDS, MIN_FOLDS, FitConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every option of a sweep; the docstring under a field is its `--help` text.

    Raises:
        ConfigError: a name is unknown or a number is out of its range.
    """

    cache: str
    """Cache to read; of its splits, the training split alone."""
    source: tuple[str, ...] = ()
    """Sources to use; without it, all of the cache."""
    layers: str | None = None
    """Layers to use of those in the cache, as in llmembed-fit; without it, all."""
    pooling: tuple[str, ...] = ()
    """Poolings to use; without it, all of the cache."""
    head: str = "lda"
    """Head that judges: lda or ridge."""
    folds: int = DEFAULT_FOLDS
    """Stratified folds of the training rows."""
    class_weight: str = "none"
    """Weights of the classes: none, or balanced (inverse to their counts)."""
    seed: int = 0
    """Seed of the folds."""
    engine: str = "local"
    """Who sums the Gram matrices: local (this process), or ray (workers on this machine or in a
    cluster, which read their share of the cache themselves)."""
    address: str | None = None
    """Ray cluster to join: auto, or host:port; without it Ray is started on this machine."""
    workers: int = 1
    """Workers of --engine ray, at most; each takes one CPU."""
    output: str | None = None
    """Folder for sweep.json and sweep.svg; without it, runs/<cache>-sweep-<seed>."""

    def __post_init__(self) -> None:
        """Check each name and number once."""
        if self.head not in {"lda", "ridge"}:
            raise ConfigError.unknown("head", self.head, ("lda", "ridge"), "Pass one to --head.")
        if self.folds < MIN_FOLDS:
            raise ConfigError(f"--folds {self.folds} leaves nothing to fit on. Pass 2 or more.")
        self.as_fit()

    def as_fit(self) -> FitConfig:
        """Give the options of the fit that would choose its fusion by this sweep."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return FitConfig(**{**shared, "output": None}, fusion="auto")

    @property
    def output_path(self) -> Path:
        """Folder that the table and the plot are written to.

        >>> SweepConfig(cache="data/sst2.zarr").output_path.as_posix()
        'runs/sst2-sweep-0'
        """
        name = f"{Path(self.cache.rstrip('/')).stem}-sweep-{self.seed}"
        return Path("runs") / name if self.output is None else Path(self.output)
