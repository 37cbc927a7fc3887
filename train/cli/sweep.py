"""The command `llmembed-sweep`."""

from __future__ import annotations

from llmembed.common.console import answer, command
from llmembed.train.cli import let_waiting_threads_sleep
from llmembed.train.config import SweepConfig

EXAMPLES = (
    "llmembed-sweep --cache r8.zarr",
    "llmembed-sweep --cache r8.zarr --layers 8,16,24 --head ridge --folds 10",
)


@command(SweepConfig, examples=EXAMPLES)
def sweep_main(config: SweepConfig, *, as_json: bool, quiet: bool) -> None:
    """Judge every layer, their mean and the best subsets, by folds of the training split alone."""
    let_waiting_threads_sleep()
    from llmembed.train.verbs.sweeping import run_sweep, table_of

    result = run_sweep(config)
    table = f"{table_of(result)}\ntable and plot: {config.output_path}"
    answer(result, table, as_json=as_json, quiet=quiet)
