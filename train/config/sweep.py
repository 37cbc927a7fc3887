"""What `llmembed-sweep` can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llmembed.common.console import COMPLETES, FOLDER, GROUP, REPEATED, TAKES, as_declared
from llmembed.common.errors import ConfigError
from llmembed.train.config.allowed import ClassWeight
from llmembed.train.config.fit import FitConfig
from llmembed.train.fusions import AUTO


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every option of a sweep; the docstring under a field is its `--help` text.

    Raises:
        ConfigError: a name is unknown or a number is out of its range.
    """

    cache: str = dataclasses.field(metadata={GROUP: "Features", COMPLETES: FOLDER})
    """Cache to read; of its splits, the training split alone."""
    source: tuple[str, ...] = ()
    """Sources to use; without it, all of the cache."""
    layers: str | None = dataclasses.field(default=None, metadata={TAKES: (int, list)})
    """Layers to use of those in the cache, as in llmembed-fit; without it, all."""
    pooling: tuple[str, ...] = ()
    """Poolings to use; without it, all of the cache."""
    head: str = dataclasses.field(default=AUTO, metadata={GROUP: "Judge"})
    """Head that judges: lda, ridge, or auto, which is lda, and ridge where a text may have several
    labels."""
    folds: int = 0
    """Stratified folds of the training rows; 0 is as in llmembed-fit."""
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
    """Seed of the folds."""
    engine: str = dataclasses.field(default="local", metadata={GROUP: "Who computes"})
    """Who sums the Gram matrices: local (this process), or ray (workers on this machine or in a
    cluster, which read their share of the cache themselves)."""
    address: str | None = None
    """Ray cluster to join: auto, or host:port; without it Ray is started on this machine."""
    workers: int = 1
    """Workers of --engine ray, at most; each takes one CPU."""
    output: str | None = dataclasses.field(
        default=None, metadata={GROUP: "Output", COMPLETES: FOLDER}
    )
    """Folder for sweep.json and sweep.svg; without it, runs/<cache>-sweep-<seed>."""

    def __post_init__(self) -> None:
        """Check each name and number once."""
        as_declared(self)
        if self.head not in {AUTO, "lda", "ridge"}:
            allowed = (AUTO, "lda", "ridge")
            raise ConfigError.unknown("head", self.head, allowed, "Pass one to --head.")
        self.as_fit()

    def as_fit(self) -> FitConfig:
        """Give the options of the fit that would choose its fusion by this sweep."""
        return FitConfig(**{**vars(self), "output": None}, fusion=AUTO)

    @property
    def output_path(self) -> Path:
        """Folder that the table and the plot are written to.

        >>> SweepConfig(cache="data/sst2.zarr").output_path.as_posix()
        'runs/sst2-sweep-0'
        """
        name = f"{Path(self.cache.rstrip('/')).stem}-sweep-{self.seed}"
        return Path("runs") / name if self.output is None else Path(self.output)
