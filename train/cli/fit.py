"""The command `llmembed-fit`."""

from __future__ import annotations

from llmembed.common.console import answer, command
from llmembed.train.cli import let_waiting_threads_sleep
from llmembed.train.config import FitConfig
from llmembed.train.reports.report import metrics_table

EXAMPLES = (
    "llmembed-fit --cache r8.zarr",
    "llmembed-fit --cache r8.zarr --fusion mean --layers 16,24 --head lda",
    "llmembed-fit --cache r8.zarr --fusion attention --n-seeds 3 --class-weight balanced",
)


@command(FitConfig, examples=EXAMPLES)
def fit_main(config: FitConfig, *, as_json: bool, quiet: bool) -> None:
    """Fit a classifier on the features of a cache and write its run."""
    let_waiting_threads_sleep()
    if config.compare:
        from llmembed.train.reports.compare import comparison_table
        from llmembed.train.verbs.comparing import compare_fusions

        compared = compare_fusions(config, show_progress=not quiet)
        table = f"{comparison_table(compared)}\npage: {compared['page']}"
        answer(compared, table, as_json=as_json, quiet=quiet)
        return
    from llmembed.train import fit
    from llmembed.train.verbs.fitting import REPORT_FILE

    run = fit(config, show_progress=not quiet)
    document = {"path": str(run.path), **run.metrics}
    table = f"{metrics_table(run.metrics)}\nrun: {run.path}\npage: {run.path / REPORT_FILE}"
    answer(document, table, as_json=as_json, quiet=quiet)
