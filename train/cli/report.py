"""The command `llmembed-report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from llmembed.common.console import ARGUMENT, answer, command
from llmembed.common.errors import ConfigError
from llmembed.common.replace import check_file, write_files
from llmembed.train.cli import let_waiting_threads_sleep

_GENERATOR = b'<meta name="generator" content="llmembed">'
_HEAD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Every option of a report; the docstring under a field is its `--help` text."""

    runs: tuple[str, ...] = field(default=(), metadata={ARGUMENT: "[RUN]..."})
    cache: str | None = None
    """Cache to look at, in place of runs: norms, outlier dimensions and separation of classes per
    layer, repeated texts, tokens."""
    split: str | None = None
    """Split of --cache whose layers are read; without it train, or the only one."""
    source: tuple[str, ...] = ()
    """Sources of --cache to look at; without it, all."""
    pooling: tuple[str, ...] = ()
    """Poolings of --cache to look at; without it, all."""
    output: str | None = None
    """Page to write, in place of what is there; without it, NAME-report.html in this folder, NAME
    being that of the run or the cache, and compare.html for several runs, where no file of another
    kind has that name."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if not self.runs and self.cache is None:
            raise click.UsageError("Missing argument 'RUN' or option '--cache'.")
        if self.runs and self.cache is not None:
            raise click.UsageError("Pass either runs or --cache.")
        if self.runs and (self.split or self.source or self.pooling):
            raise click.UsageError("--split, --source and --pooling are for --cache.")

    @property
    def page(self) -> Path:
        """File that the page is written to.

        >>> ReportConfig(cache="s3://bucket/r8.zarr").page.as_posix()
        'r8-report.html'
        """
        if self.output is not None:
            return Path(self.output)
        if len(self.runs) > 1:
            return Path("compare.html")
        one = Path(self.cache.rstrip("/")).stem if self.cache else Path(self.runs[0]).resolve().name
        return Path(f"{one}-report.html")


EXAMPLES = (
    "llmembed-report runs/r8-cooc-0 runs/r8-mean-0",
    "llmembed-report --cache r8.zarr",
)


@command(ReportConfig, examples=EXAMPLES)
def report_main(config: ReportConfig, *, as_json: bool, quiet: bool) -> None:
    """Compare runs on the same rows, the first with each other one; or look at a cache.

    Runs are compared by accuracy, macro F1, NLL and ECE with 95 % intervals and paired tests. Of
    one run the page is its report.html, with the texts where these are on this machine.
    """
    let_waiting_threads_sleep()
    check_file(config.page)
    if config.output is None:
        _check_ours(config.page)
    of_runs = _of_runs if len(config.runs) > 1 else _of_run
    document, table, page = _of_cache(config) if config.cache else of_runs(config)
    write_files({config.page: page})
    table = f"{table}\npage: {config.page}"
    answer({**document, "page": str(config.page)}, table, as_json=as_json, quiet=quiet)


def _check_ours(page: Path) -> None:
    """Refuse to replace a file that nobody named, and that is no page of a report."""
    if not page.is_file():
        return
    with page.open("rb") as file:
        if _GENERATOR not in file.read(_HEAD_BYTES):
            raise ConfigError(
                f"{page} exists and is not a page of llmembed-report, so it is not replaced. Pass "
                f"--output {page} to replace it, or another place."
            )


def _of_run(config: ReportConfig) -> tuple[dict[str, Any], str, str]:
    from llmembed.common.errors import warn
    from llmembed.train.reports.compare import folder_of
    from llmembed.train.reports.report import metrics_table
    from llmembed.train.reports.run_page import parts_of, report_page
    from llmembed.train.reports.texts import TextsNotFoundError, evaluated_texts
    from llmembed.train.runs.record import damage_told

    folder = folder_of(Path(config.runs[0]))
    with damage_told(folder):
        parts = parts_of(folder)
        texts = None
        if parts.predictions.texts is None:
            try:
                texts = evaluated_texts(parts.config, parts.metrics)
            except TextsNotFoundError as error:
                warn(f"the page of {config.runs[0]} shows rows without texts, since {error}.")
        document = {"path": config.runs[0], **parts.metrics}
        return document, metrics_table(parts.metrics), report_page(parts, texts)


def _of_runs(config: ReportConfig) -> tuple[dict[str, Any], str, str]:
    from llmembed.train.reports.compare import compare_runs, comparison_page, comparison_table
    from llmembed.train.runs.record import damage_told

    document = compare_runs([Path(run) for run in config.runs])
    with damage_told(Path(config.runs[0])):  # its baselines are shown
        return document, comparison_table(document), comparison_page(document)


def _of_cache(config: ReportConfig) -> tuple[dict[str, Any], str, str]:
    from llmembed.train.reports.cache_report import cache_page, cache_table, describe_cache

    document = describe_cache(
        str(config.cache), split=config.split, source=config.source, pooling=config.pooling
    )
    return document, cache_table(document), cache_page(document)
