"""What `llmembed-audit` can be told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llmembed.common.console import COMPLETES, FOLDER, GROUP, TAKES, as_declared
from llmembed.common.errors import ConfigError
from llmembed.train.config.allowed import fusions
from llmembed.train.config.fit import FitConfig
from llmembed.train.fusions import AUTO


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Every option of an audit; the docstring under a field is its `--help` text.

    Raises:
        ConfigError: a name is unknown, a number is out of its range, or nothing is solved by folds.
    """

    cache: str = dataclasses.field(metadata={GROUP: "Features", COMPLETES: FOLDER})
    """Cache to read."""
    source: tuple[str, ...] = ()
    """Sources to use; without it, all of the cache."""
    layers: str | None = dataclasses.field(default=None, metadata={TAKES: (int, list)})
    """Layers to use of those in the cache, as in llmembed-fit; without it, all."""
    pooling: tuple[str, ...] = ()
    """Poolings to use; without it, all of the cache."""
    split: str = "train"
    """Split whose labelled rows are judged, by folds of its own."""
    fusion: str = dataclasses.field(
        default=AUTO, metadata={GROUP: "Judge", COMPLETES: lambda: fusions(learn=False)}
    )
    """Fusion that judges, as in llmembed-fit: auto, mean, max, concat, single; none that is trained
    by gradient, which no folds are held out of."""
    head: str = AUTO
    """Head that judges: ridge, lda, linear, or auto, as in llmembed-fit."""
    folds: int = 0
    """Stratified folds of the rows; 0 is as in llmembed-fit."""
    ignore_groups: bool = False
    """Divide rows as they come, although the cache says which belong together: without it no group
    is in two folds, and no row is judged by what its group has taught."""
    seed: int = 0
    """Seed of the folds."""
    output: str | None = dataclasses.field(
        default=None, metadata={GROUP: "Output", COMPLETES: FOLDER}
    )
    """Folder for audit.csv and audit.html; without it, runs/<cache>-audit-<seed>. They hold the
    texts of the rows that are told, where the texts are on this machine."""
    defuse_formulas: bool = False
    """Put an apostrophe before cells of audit.csv that a spreadsheet would run as a formula: names
    and texts that begin with =, +, -, @, a tab or a carriage return."""

    def __post_init__(self) -> None:
        """Check each name and number once, and refuse what is trained by gradient."""
        as_declared(self)
        solved = self.as_fit().solved_heads
        if not solved or (self.fusion == AUTO and solved == ("linear",)):
            raise ConfigError(
                f"fusion {self.fusion!r} with head {self.head!r} is trained by gradient, which no "
                f"folds are held out of. Pass one of {', '.join(fusions(learn=False))} to "
                "--fusion, and with auto leave out --head or pass ridge or lda."
            )

    def as_fit(self) -> FitConfig:
        """Give the options of the fit whose folds judge."""
        ours = {field.name for field in dataclasses.fields(self)}
        own = {"split", "output", "defuse_formulas"}
        return FitConfig(**{name: getattr(self, name) for name in ours - own})

    @property
    def output_path(self) -> Path:
        """Folder that the table and the page are written to.

        >>> AuditConfig(cache="data/sst2.zarr").output_path.as_posix()
        'runs/sst2-audit-0'
        """
        name = f"{Path(self.cache.rstrip('/')).stem}-audit-{self.seed}"
        return Path("runs") / name if self.output is None else Path(self.output)
