"""`llmembed-fit` and `llmembed-predict`: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from llmembed.train.config import FitConfig
from llmembed.train.runs.answers import Answers, check_output, write
from llmembed.train.runs.report import note_of_absent
from llmembed.train.sweep_config import SweepConfig

if TYPE_CHECKING:
    from llmembed.train.runs.predict import Input
    from llmembed.train.runs.run import Run

STDIN = "-"
_MAX_CLASSES_SHOWN = 20


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


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Lay out the figures of a run for reading."""
    head = f"head             {_describe_head(metrics)}"
    if not metrics["n_eval"]:
        return f"{head}\nevaluated on     nothing, since all rows train"
    low, high = metrics["accuracy_ci95"]
    absent = note_of_absent(metrics)
    lines = [
        head,
        *_validated_on(metrics["splits"]),
        f"evaluated on     {metrics['eval_split']}, {metrics['n_eval']} examples",
        f"accuracy         {metrics['accuracy']:.4f}  (95 % interval {low:.4f}-{high:.4f})",
        f"macro F1         {metrics['macro_f1']:.4f}" + (f"  ({absent})" if absent else ""),
        f"NLL              {metrics['nll']:.4f}",
        f"ECE              {metrics['ece']:.4f}  (uncalibrated {metrics['ece_uncalibrated']:.4f})",
        f"parameters       {metrics['n_parameters']:,}",
        f"seconds          {metrics['seconds']['total']:.1f}",
    ]
    if len(metrics["per_seed"]) > 1:
        spread = metrics["over_seeds"]["accuracy"]
        lines.append(
            f"over {len(metrics['per_seed'])} seeds     accuracy {spread['mean']:.4f} "
            f"(standard deviation {spread['std']:.4f})"
        )
    return "\n".join(lines + _class_lines(metrics["per_class"]))


def _validated_on(splits: Mapping[str, Any]) -> list[str]:
    """Say which split stopped the training early, where that is not the training split."""
    share = splits["validation"]
    if share["split"] == splits["train"]["split"]:
        return []
    return [f"early stopping   {share['split']}, {share['n']} examples"]


def _describe_head(metrics: Mapping[str, Any]) -> str:
    kept = next(row for row in metrics["per_seed"] if row["kept"])
    if "n_epochs" in kept:
        return f"{kept['head']}, {kept['n_epochs']} epochs"
    chosen = f", {metrics['chosen']['fusion']}" if "chosen" in metrics else ""
    how = (
        f"mean of {kept['n_members']}"
        if "n_members" in kept
        else f"strength {kept['strength']:.3g}"
    )
    accuracy = kept["held_out_accuracy"]
    if accuracy is None:
        return f"{kept['head']}{chosen}, {how}, no row held out"
    return f"{kept['head']}{chosen}, {how}, accuracy {accuracy:.4f} on the rows that chose it"


def _class_lines(per_class: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = [shown(name) for name in per_class]
    width = max(len("class"), *map(len, names))
    lines = ["", f"{'class':<{width}}  precision  recall     F1      n"]
    for name, row in [*zip(names, per_class.values(), strict=True)][:_MAX_CLASSES_SHOWN]:
        lines.append(
            f"{name:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f} {row['f1']:6.4f} "
            f"{row['n']:6d}"
        )
    n_hidden = len(per_class) - _MAX_CLASSES_SHOWN
    return [*lines, f"and {n_hidden} more, in metrics.json"] if n_hidden > 0 else lines
