"""Everything `llmembed-extract` can be told, with its defaults: one frozen record, checked once."""

from __future__ import annotations

import dataclasses

from llmembed.common.cluster import check_engine
from llmembed.common.console import (
    COMPLETES,
    FOLDER,
    GROUP,
    OR_PLACE,
    REPEATED,
    TAKES,
    as_declared,
)
from llmembed.common.errors import ConfigError
from llmembed.common.layers import check_layers
from llmembed.extract.backbones.models import MODELS
from llmembed.extract.backbones.recipe import check_options
from llmembed.extract.engines import ENGINES
from llmembed.extract.features.poolings import POOLINGS
from llmembed.extract.texts import DATASETS, DatasetOptions, Dialect
from llmembed.extract.texts.prompts import AUTO, PRESETS, check_prompts
from llmembed.extract.texts.templates import is_unicode


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of one extraction; the field docstrings are the command's help texts.

    Values are taken as `FitConfig` takes them. `layers`, and the columns, may be a list.

    Raises:
        ConfigError: a value is not among those allowed.
        MissingPackageError: weights are to be quantised, and bitsandbytes is not installed.
    """

    model: str = dataclasses.field(
        metadata={GROUP: "Model and features", COMPLETES: lambda: MODELS, OR_PLACE: True}
    )
    """Backbone: an alias (llama2-7b, smollm2-135m, ...), a Hub id, or a local folder or
    GGUF file."""
    revision: str | None = None
    """Commit, branch or tag of a Hub model."""
    trust_remote_code: bool = False
    """Run the model code that a Hub repository brings. Never without this flag."""
    layers: str = dataclasses.field(metadata={TAKES: (int, list)})
    """Layers to store: 8,16,24,32; a range 1:33:4 with Python's meaning; all; last:5; -1 is the
    last, 0 the embeddings."""
    pooling: tuple[str, ...] = dataclasses.field(
        default=("mean", "last"), metadata={COMPLETES: lambda: POOLINGS}
    )
    """Poolings over tokens, all in one pass: mean, last, first, max, weighted (position-weighted
    mean), mean_padded (pads to --max-length and counts them, as the paper did), pooler (BERT)."""
    prompts: tuple[str, ...] = dataclasses.field(
        default=(), metadata={REPEATED: "SET or TEXT", COMPLETES: lambda: [*PRESETS, AUTO]}
    )
    """Prompts behind each text, whose last tokens are features of their own beside --pooling; may
    be repeated. A set (sentiment, topic, intent, general, eol, meta-eol, or auto: of the names
    of the classes), or the words themselves. A causal model reads the text once for all of them."""
    max_length: int = 512
    """Tokens kept of each text."""
    template: str | None = None
    """Text around each text, with {text} in its place; around a pair, {text_a} and {text_b}. A
    brace that is text is written twice: {{."""
    compute_dtype: str = "auto"
    """Arithmetic of the backbone: auto (what the cache has; else bfloat16 where the device is fast
    at it, float16 on other CUDA GPUs, else float32), bfloat16 (a CPU slow at it widens each block
    as it runs), float16, float32."""
    quantize: str | None = None
    """Weights of the backbone: nf4 or int8 by bitsandbytes (the extra quantize), or fp8, whose
    products are of 8 bits on Ada and Hopper GPUs; a CPU rounds alike, no faster."""
    dtype: str = "float16"
    """Stored features: float16 or float32."""
    dataset: str = dataclasses.field(
        default="sst2", metadata={GROUP: "Texts", COMPLETES: lambda: DATASETS, OR_PLACE: True}
    )
    """Texts: an alias (sst2, mr, agnews, r8, r52, 20newsgroups), a Hub id, or a path to csv, tsv,
    json, jsonl, parquet, arrow, feather (text files also as .gz, .bz2, .zst), a folder with one
    file a split, or a save_to_disk folder."""
    config: str | None = None
    """Configuration name of a Hub data set."""
    split: tuple[str, ...] = ()
    """Splits to extract; without it all labelled ones."""
    text_column: str | None = dataclasses.field(default=None, metadata={TAKES: (list,)})
    """Column that holds the text, or two for pairs of texts: a,b; without it detected, and said."""
    label_column: str | None = dataclasses.field(default=None, metadata={TAKES: (list,)})
    """Column that holds the label, or a list of labels; without it detected, and said. Several
    columns a,b,c are one label each, 0 or 1."""
    label_separator: str | None = None
    """What parts the labels of a text that has several, such as a semicolon."""
    weight_column: str | None = None
    """Column that says how much each example counts: numbers from 0 on."""
    group_column: str | None = None
    """Column that says which examples belong together, such as an author; the cache holds a hash of
    each value."""
    unlabelled: str | None = dataclasses.field(default=None, metadata={TAKES: (int,)})
    """What stands in the label column where there is no label: -1, ?, or '' for empty cells, which
    are refused without it."""
    delimiter: str | None = None
    """Character between the fields of csv and tsv files, or tab; without it the suffix says it."""
    csv_escape: str | None = None
    """Character that makes the next one stand for itself in csv and tsv files, such as a backslash;
    without it a quote inside quotes is doubled."""
    csv_quote: str | None = None
    """Character around fields of csv and tsv files, or none; without it the double quote."""
    limit: int | None = None
    """Examples a split, stratified by label."""
    seed: int = 0
    """Seed of the choice that --limit makes."""
    cache: str | None = dataclasses.field(
        default=None, metadata={GROUP: "Cache", COMPLETES: FOLDER}
    )
    """Where the cache lies; without it <dataset>.zarr in this folder."""
    source: str | None = None
    """Name of this backbone inside the cache; without it the model's short name."""
    dry_run: bool = False
    """Print the plan and write nothing."""
    overwrite: bool = False
    """Replace the cache, if there is one."""
    device: str = dataclasses.field(default="auto", metadata={GROUP: "Devices, and who computes"})
    """Device: auto, cuda, cuda:1, cpu, mps."""
    token_budget: int | None = None
    """Tokens a batch, pads included; without it chosen for the device, on a GPU by its free memory.
    Halved, with a warning, where memory runs out."""
    devices: str | None = dataclasses.field(default=None, metadata={TAKES: (int,)})
    """GPUs of this machine that share the work, a process each: a number, or all. With --device
    cpu so many processes share its cores."""
    gpus_per_worker: float | None = None
    """GPUs of each process of --devices or worker of --engine ray; 2 or more share one model, which
    is too large for one. Without it 1 where there are any, else 0; Ray also takes shares of a GPU,
    such as 0.5."""
    rank: int | None = None
    """Which share of the work this process does, from 0 to --world - 1; when all ranks have ended,
    llmembed-cache finalize closes the cache."""
    world: int | None = None
    """How many processes share the work, each with its own --rank: SLURM arrays, Kubernetes jobs,
    torchrun, cron. They see the same cache, and need nothing else of each other."""
    engine: str = dataclasses.field(default="local", metadata={COMPLETES: lambda: ENGINES})
    """Who computes: local (this process), or ray (workers on this machine or in a cluster)."""
    workers: int = 1
    """Workers of --engine ray, at most; each loads the backbone and takes one CPU."""
    address: str | None = None
    """Ray cluster to join: auto, or host:port; without it Ray is started on this machine."""

    def __post_init__(self) -> None:
        """Check every value that needs no data set and no model to be checked."""
        as_declared(self)
        check_layers(self.layers)
        for pooling in self.pooling:
            _ = POOLINGS[pooling]  # refuses what does not exist
        check_prompts(self.prompts)
        if not (self.pooling or self.prompts):
            raise ConfigError(
                "pooling is empty, so that no feature would be made of a text. Pass names, such as "
                "mean,last, or leave it out."
            )
        check_options(vars(self))
        if self.cache is not None and self.cache.startswith("hf://"):
            from llmembed.cache_format.stores import refuse_pieces

            refuse_pieces(self.cache)
        for name in ("limit", "token_budget", "world", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = name.replace("_", "-")
                raise ConfigError(
                    f"--{option} is {value}; it counts from 1. Pass a positive number."
                )
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it counts from 0. Pass 0 or more.")
        Dialect.of(vars(self))
        separator = self.label_separator
        if separator is not None and not (separator.strip() and is_unicode(separator)):
            raise ConfigError(
                f"--label-separator is {separator!r}; it parts the labels of a text. "
                "Pass what stands between them, such as ';'."
            )
        self._check_rank()
        self._check_engine()

    @property
    def dataset_options(self) -> DatasetOptions:
        """Which texts and labels are meant."""
        names = {field.name for field in dataclasses.fields(DatasetOptions)}
        same = {name: value for name, value in vars(self).items() if name in names}
        return DatasetOptions(**same, splits=self.split, dialect=Dialect.of(vars(self)))

    def _check_rank(self) -> None:
        if (self.rank is None) != (self.world is None):
            raise ConfigError("--rank and --world belong together. Pass both, or neither.")
        if self.rank is None or self.world is None:
            return
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                f"--rank is {self.rank} of --world {self.world}; ranks count from 0. Pass 0 to "
                f"{self.world - 1}."
            )
        if self.overwrite:
            raise ConfigError(
                "--overwrite with --rank would let each rank delete what the others wrote. Delete "
                "the cache first, or choose another --cache."
            )

    def _check_engine(self) -> None:
        check_engine(self, ("address", "workers"), ENGINES)
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ConfigError(f"--gpus-per-worker is {self.gpus_per_worker}; pass 0 or more.")
        if self.engine == "local":
            self._check_devices()
        elif self.devices is not None:
            raise ConfigError(
                "--devices shares the work on this machine without Ray. Pass either it or --engine "
                "ray, with --workers."
            )
        if self.engine == "ray" and self.world is not None:
            raise ConfigError(
                "--engine ray shares the work by itself. Pass either it or --rank and --world."
            )

    def _check_devices(self) -> None:
        devices, n_gpus = self.devices, self.gpus_per_worker
        if devices not in {None, "all"} and not (str(devices).isdecimal() and int(devices or 0)):
            raise ConfigError(f"--devices is {devices!r}. Pass a number from 1 on, or all.")
        if n_gpus is not None and (n_gpus < 1 or n_gpus % 1):
            raise ConfigError(
                f"--gpus-per-worker is {n_gpus:g}; without --engine ray it is a whole number. Pass "
                "1 or more."
            )
        for option, value in (("devices", devices), ("gpus-per-worker", n_gpus)):
            if value is not None and self.world is not None:
                raise ConfigError(
                    f"--{option} shares out the devices of this machine, and --rank the work of "
                    "many. Pass one of them; a rank takes its GPU by --device or "
                    "CUDA_VISIBLE_DEVICES."
                )
