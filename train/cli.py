"""`llmembed-fit` and `llmembed-predict`: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmembed.common.console import (
    Command,
    answer,
    command,
    common_options,
    echo_json,
    version_option,
)
from llmembed.common.errors import shown
from llmembed.train.config import FitConfig, SweepConfig
from llmembed.train.runs.answers import Answers, check_output, write
from llmembed.train.runs.report import metrics_table

if TYPE_CHECKING:
    from llmembed.train.runs.predict import Input
    from llmembed.train.runs.run import Run

STDIN = "-"


@command(FitConfig)
def fit_main(config: FitConfig, *, as_json: bool, quiet: bool) -> None:
    """Fit a classifier on the features of a cache and write its run."""
    _let_waiting_threads_sleep()
    from llmembed.train import fit

    run = fit(config, show_progress=not quiet)
    document = {"path": str(run.path), **run.metrics}
    table = f"{metrics_table(run.metrics)}\nrun: {run.path}"
    answer(document, table, as_json=as_json, quiet=quiet)


@command(SweepConfig)
def sweep_main(config: SweepConfig, *, as_json: bool, quiet: bool) -> None:
    """Judge every layer, their mean and the best subsets, by folds of the training split alone."""
    _let_waiting_threads_sleep()
    from llmembed.train.sweeping import run_sweep, table_of

    result = run_sweep(config)
    table = f"{table_of(result)}\ntable and plot: {config.output_path}"
    answer(result, table, as_json=as_json, quiet=quiet)


@click.command(cls=Command)
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--text", "texts", multiple=True, help="Text to classify; repeatable.")
@click.option(
    "--input",
    "input_path",
    help="File of texts: txt (one a line), csv, tsv, json, jsonl, parquet, arrow; - is stdin, a "
    "text a line.",
)
@click.option(
    "--text-column",
    help="Column of --input, or two for pairs: a,b; without it, the one that the cache was made "
    "from, else detected, and said.",
)
@click.option("--delimiter", help="Between the fields of a csv or tsv --input; tab for a tab.")
@click.option("--csv-escape", help="What makes the next character of it stand for itself.")
@click.option("--csv-quote", help="Around its fields, or none.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write, csv, jsonl or parquet, by its suffix; the other columns of --input go "
    "along.",
)
@click.option("--proba", is_flag=True, help="Give the probability of every class.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[SOURCE=]PLACE",
    help="Where the backbone is now, if it is not where it was; its content must be the same. Of "
    "several sources, name the one that moved; repeatable.",
)
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the model code that a Hub repository brings."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@common_options
@version_option
def predict_main(
    *,
    run: Path,
    texts: tuple[str, ...],
    input_path: str | None,
    text_column: str | None,
    output: Path | None,
    proba: bool,
    models: tuple[str, ...],
    trust_remote_code: bool,
    device: str,
    as_json: bool,
    quiet: bool,
    **csv: str | None,
) -> None:
    """Classify new texts with a run."""
    if bool(texts) == (input_path is not None):
        raise click.UsageError("Pass either --text or --input.")
    if input_path in (None, STDIN) and any(csv.values()):
        raise click.UsageError(
            "--delimiter, --csv-escape and --csv-quote are for a file of --input."
        )
    if output is not None:
        check_output(output)
    _let_waiting_threads_sleep()
    from llmembed.train.runs.run import load_run

    loaded = load_run(run)
    given = _input(loaded, texts, input_path, text_column, csv)
    probabilities = loaded.predict_proba(
        given.texts, device, model=models, trust_remote_code=trust_remote_code
    )
    answers = Answers(
        texts=given.texts,
        labels=loaded.labels,
        proba=probabilities,
        with_all=proba,
        beside=given.beside,
    )
    if output is not None:
        write(output, answers)
    if as_json:
        echo_json([*answers.rows()])
    elif output is None:
        click.echo("\n".join(answers.lines()))
    elif not quiet:
        click.echo(shown(f"{len(given.texts)} predictions: {output}"))


def _input(
    run: Run,
    texts: Sequence[str],
    path: str | None,
    column: str | None,
    csv: Mapping[str, str | None],
) -> Input:
    from llmembed.train.runs.predict import Input, read_input, read_lines

    if path is None:
        return Input(texts=list(texts))
    if path == STDIN:
        return read_lines(sys.stdin.buffer.read(), "stdin")
    return read_input(Path(path), column, known=run.text_column, csv=csv)


def _let_waiting_threads_sleep() -> None:
    """Set OpenMP's policy before torch reads it, unless the user has.

    Threads that spin while they wait made a step thirty times slower as soon as another process
    wanted one of two cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
