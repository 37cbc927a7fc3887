"""Suites: which data sets, backbones, fusions, heads and seeds a benchmark runs, as data.

A suite is one TOML file. It names the caches that it needs, each by the fingerprint of its texts,
labels and sources, so that features extracted elsewhere are recognised and others refused; and the
fits, whose options are those of `FitConfig`. A case is one fit on one cache.

    about = "what it is for"

    [sources.smollm2-135m]                  # the same in every cache of the suite
    layers = "8,16,24"

    [caches.mr]
    dataset = "mr"
    splits = { train = 512, test = 640 }    # examples, stratified; 0 is all
    fingerprint = "6f0c..."

    [fits.cooc]
    fusion = "cooc"
    seeds = [0, 1]
    at_least = { mr = 0.7 }                 # expected: holds whatever the baseline says

    [fits.single]                           # single-08 and single-16
    fusion = "single"
    each_layer = [8, 16]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llmembed.common.errors import ConfigError
from llmembed.train.config import FitConfig

FOLDER = Path(__file__).parent / "suites"
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """One backbone and what is taken from it, in the words of `llmembed-extract`."""

    name: str
    layers: str
    pooling: tuple[str, ...] = ("mean",)
    max_length: int = 128
    compute_dtype: str = "float32"
    """It is part of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The cache that some cases read."""

    name: str
    """Short name of the data set in tables."""
    dataset: str
    """What to extract from where no cache is found: alias, Hub id or path."""
    splits: Mapping[str, int]
    """Split -> examples, stratified; 0 is all of them."""
    fingerprint: str
    """Of these splits and sources; see `Cache.fingerprint_of`."""
    sources: tuple[SourcePlan, ...]

    @property
    def eval_split(self) -> str:
        """The split that is not trained on."""
        return next(name for name in self.splits if name != "train")


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """One way to fit a classifier, on several caches."""

    name: str
    options: Mapping[str, Any]
    """Fields of `FitConfig`."""
    seeds: tuple[int, ...] = (0,)
    """One fit each."""
    caches: tuple[str, ...] = ()
    """Names of the caches; none means all of the suite."""
    at_least: Mapping[str, float] = field(default_factory=dict)
    """Cache -> lowest accuracy that is accepted whatever the baseline says, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What one run of the benchmark does."""

    name: str
    """Name of its file."""
    about: str
    """What it is for, one sentence."""
    caches: Mapping[str, CachePlan]
    fits: Mapping[str, FitPlan]
    alpha: float = 0.01
    """Chance of a false alarm over all comparisons of the suite (Holm)."""
    slower: float = 2.0
    """Factor on the baseline's time, in yardsticks, that counts as slower."""
    left_out: frozenset[str] = frozenset()
    """Caches that this run was told to leave out."""

    def only(self, names: str) -> Suite:
        """Keep some caches, separated by commas; the empty string is all.

        Raises:
            ConfigError: there is no such cache.
        """
        kept = names.split(",") if names else list(self.caches)
        for name in kept:
            if name not in self.caches:
                raise ConfigError.unknown("data set", name, self.caches, "Pass some to --only.")
        caches = {name: self.caches[name] for name in kept}
        return dataclasses.replace(self, caches=caches, left_out=frozenset(self.caches) - {*kept})

    def lowest(self, case: str) -> float:
        """Look up the lowest accuracy that is accepted of a case."""
        cache, _, fit = case.partition("/")
        return self.fits[fit].at_least.get(cache, 0.0)

    @property
    def features_key(self) -> str:
        """Name of its features where they are stored: fingerprints, splits, layers and poolings."""
        plans = [dataclasses.asdict(plan) for plan in self.caches.values()]
        return hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def cases(self) -> Iterator[tuple[CachePlan, FitPlan]]:
        """Every fit on every cache it is meant for, cache by cache."""
        for cache in self.caches.values():
            for fit in self.fits.values():
                if not fit.caches or cache.name in fit.caches:
                    yield cache, fit


def named(pairs: Iterable[str]) -> dict[str, str]:
    """Read NAME=PATH of --data; a name alone is an alias, too.

    >>> named(["mr=texts/mr", "r8"])
    {'mr': 'texts/mr', 'r8': 'r8'}
    """
    parted = (pair.partition("=") for pair in pairs)
    return {name: path or name for name, _, path in parted}


def load_suite(name: str) -> Suite:
    """Read a suite by name, or by the path of its file.

    Raises:
        ConfigError: there is no such suite, or it holds what a suite does not have.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = sorted(path.stem for path in FOLDER.glob("*.toml"))
        raise ConfigError.unknown("suite", name, known, f"{FOLDER} holds these; or pass a file.")
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    sources = tuple(
        _make(SourcePlan, {"name": key, **row}, f"{path}: sources.{key}")
        for key, row in content.pop("sources").items()
    )
    caches = {
        key: _make(CachePlan, {"name": key, "sources": sources, **row}, f"{path}: caches.{key}")
        for key, row in content.pop("caches").items()
    }
    fits = {
        name: _fit_plan(name, row, path)
        for key, given in content.pop("fits").items()
        for name, row in _each_layer(key, given).items()
    }
    for fit in fits.values():
        for cache in (*fit.caches, *fit.at_least):
            if cache not in caches:
                where = f"{path}: fits.{fit.name} names it."
                raise ConfigError.unknown("cache", cache, caches, where)
    return _make(Suite, {"name": path.stem, **content, "caches": caches, "fits": fits}, str(path))


def _each_layer(name: str, row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Make one fit a layer where a row lists `each_layer`.

    >>> _each_layer("single", {"fusion": "single", "each_layer": [8]})
    {'single-08': {'fusion': 'single', 'layers': '8'}}
    """
    if "each_layer" not in row:
        return {name: row}
    rest = {key: value for key, value in row.items() if key != "each_layer"}
    return {f"{name}-{k:02d}": {**rest, "layers": str(k)} for k in row["each_layer"]}


def _fit_plan(name: str, row: Mapping[str, Any], path: Path) -> FitPlan:
    own = {key: row[key] for key in ("seeds", "caches", "at_least") if key in row}
    options = {key: value for key, value in row.items() if key not in own}
    where = f"{path}: fits.{name}"
    plan = _make(FitPlan, {"name": name, "options": _tuples(options), **own}, where)
    _make(FitConfig, {"cache": "", **plan.options}, where)
    return plan


def _make(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
    """Make a dataclass, and name the key that it does not have."""
    known = [one.name for one in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError.unknown("key", key, known, f"{where} has it; correct the suite.")
    return kind(**_tuples(values))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
