"""The verb of `llmembed-fit --compare`: all fusions from one reading of a cache, and their page."""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path
from typing import Any

from llmembed.cache_format import open_cache
from llmembed.common.errors import ConfigError
from llmembed.common.replace import write_files
from llmembed.common.splits import TRAIN
from llmembed.train.config import FitConfig, Reading
from llmembed.train.fusions import AUTO
from llmembed.train.fusions.classifier import check_fusion
from llmembed.train.inputs import load_each
from llmembed.train.inputs.select import select_features
from llmembed.train.reports.compare import compare_runs, comparison_page
from llmembed.train.verbs.fitting import check_fit, fit_on

_log = logging.getLogger(__name__)


def compare_fusions(config: FitConfig, *, show_progress: bool = False) -> dict[str, Any]:
    """Fit each fusion that takes the features, write all runs, and compare them.

    A run is that of a fit of its fusion alone. Fits that watch a validation share come before those
    that train on all rows; each of the two kinds standardises a copy of what was read.

    Returns:
        The comparison (`llmembed.train.reports.compare.compare_runs`), and the `page` it is on.

    Raises:
        As `fit` does; ConfigError where `config.fusion` does not take the features.
    """
    configs = _applicable(config)
    for one in configs:
        check_fit(one)

    def reading_of(one: FitConfig) -> Reading:
        return one.plan().reading

    ordered = sorted(configs, key=lambda one: -reading_of(one).val_fraction)
    groups = [(reading, [*of]) for reading, of in itertools.groupby(ordered, reading_of)]
    each = load_each([reading for reading, _ in groups])
    read_s, n_fitted = 0.0, 0
    for _, members in groups:
        started = time.perf_counter()
        data = next(each)
        read_s += time.perf_counter() - started
        for one in members:
            n_fitted += 1
            _log.info("fusion %s, %d of %d", one.fusion, n_fitted, len(configs))
            fit_on(data, one, read_s=read_s, show_progress=show_progress)
    page = (
        config.run_path.parent / f"{Path(config.cache.rstrip('/')).stem}-compare-{config.seed}.html"
    )
    document = compare_runs([one.run_path for one in configs])
    write_files({page: comparison_page(document)})
    return {**document, "page": str(page)}


def _applicable(config: FitConfig) -> list[FitConfig]:
    """List the fits whose fusions take the features, that of `config.fusion` first."""
    cache = open_cache(config.cache)
    found = config.of_fusions()
    features = select_features(cache, cache[TRAIN], found[0].plan().reading)
    widths = [feature.hidden_size for feature in features]
    taken = []
    for one in found:
        try:
            if one.fusion != AUTO:
                check_fusion(one.fusion, widths)
        except ConfigError as error:
            if one.fusion == config.fusion:
                raise
            _log.info("left out: %s", str(error).partition(". ")[0])
        else:
            taken.append(one)
    return taken
