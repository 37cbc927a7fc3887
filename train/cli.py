"""`llmembed-fit` and `llmembed-predict`: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from llmembed.cache_format.console import Command, common_options, config_options
from llmembed.cache_format.errors import ConfigError
from llmembed.train.config import FitConfig
from llmembed.train.sweep_config import SweepConfig

_MAX_CLASSES_SHOWN = 20


@click.command(cls=Command)
@config_options(FitConfig)
@common_options
def fit_main(*, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Fit a classifier on the features of a cache and write its run."""
    del debug
    config = FitConfig(**options)
    _let_waiting_threads_sleep()
    from llmembed.train import fit

    run = fit(config, show_progress=not quiet)
    if as_json:
        click.echo(json.dumps({"path": str(run.path), **run.metrics}, ensure_ascii=False))
    elif not quiet:
        click.echo(metrics_table(run.metrics))
        click.echo(f"run: {run.path}")


@click.command(cls=Command)
@config_options(SweepConfig)
@common_options
def sweep_main(*, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Judge every layer, their mean and the best subsets, by folds of the training split alone."""
    del debug
    config = SweepConfig(**options)
    _let_waiting_threads_sleep()
    from llmembed.train.sweeping import run_sweep, table_of

    result = run_sweep(config)
    if as_json:
        click.echo(json.dumps(result))
    elif not quiet:
        click.echo(table_of(result))
        click.echo(f"table and plot: {config.output_path}")


@click.command(cls=Command)
@click.option("--run", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--text", "texts", multiple=True, help="Text to classify; repeatable.")
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    help="File of texts: txt (one a line), csv, tsv, json, jsonl, parquet, arrow.",
)
@click.option(
    "--text-column",
    help="Column of --input, or two for pairs: a,b; without it, text or the only column.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="File to write, csv or jsonl, by its suffix."
)
@click.option("--proba", is_flag=True, help="Give the probability of every class.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the model code that a Hub repository brings."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@common_options
def predict_main(
    *,
    run: Path,
    texts: tuple[str, ...],
    input_path: Path | None,
    text_column: str | None,
    output: Path | None,
    proba: bool,
    trust_remote_code: bool,
    device: str,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Classify new texts with a run."""
    del debug
    if bool(texts) == (input_path is not None):
        raise click.UsageError("Pass either --text or --input.")
    _check_output(output)
    _let_waiting_threads_sleep()
    from llmembed.train.predict import read_texts
    from llmembed.train.run import load_run

    loaded = load_run(run)
    given = list(texts) if input_path is None else read_texts(input_path, text_column)
    probabilities = loaded.predict_proba(given, device, trust_remote_code=trust_remote_code)
    rows = _rows(given, loaded.labels, probabilities, proba=proba)
    if output is not None:
        _write(output, rows)
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False))
    elif output is None:
        click.echo("\n".join(_line(row) for row in rows))
    elif not quiet:
        click.echo(f"{len(rows)} predictions: {output}")


def _let_waiting_threads_sleep() -> None:
    """Set OpenMP's policy before torch reads it, unless the user has.

    Threads that spin while they wait made a step thirty times slower as soon as another process
    wanted one of two cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Lay out the figures of a run for reading."""
    low, high = metrics["accuracy_ci95"]
    lines = [
        f"head             {_describe_head(metrics)}",
        f"evaluated on     {metrics['eval_split']}, {metrics['n_eval']} examples",
        f"accuracy         {metrics['accuracy']:.4f}  (95 % interval {low:.4f}-{high:.4f})",
        f"macro F1         {metrics['macro_f1']:.4f}",
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
    width = max(len("class"), *(len(name) for name in per_class))
    lines = ["", f"{'class':<{width}}  precision  recall     F1      n"]
    for name, row in list(per_class.items())[:_MAX_CLASSES_SHOWN]:
        lines.append(
            f"{name:<{width}}  {row['precision']:9.4f}  {row['recall']:6.4f} {row['f1']:6.4f} "
            f"{row['n']:6d}"
        )
    n_hidden = len(per_class) - _MAX_CLASSES_SHOWN
    return [*lines, f"and {n_hidden} more, in metrics.json"] if n_hidden > 0 else lines


def _rows(
    texts: Sequence[str], labels: Sequence[str], probabilities: Any, *, proba: bool
) -> list[dict[str, Any]]:
    rows = []
    for text, values in zip(texts, probabilities, strict=True):
        best = int(values.argmax())
        row: dict[str, Any] = {
            "text": text,
            "label": labels[best],
            "probability": round(float(values[best]), 6),
        }
        if proba:
            row["probabilities"] = {
                name: round(float(value), 6) for name, value in zip(labels, values, strict=True)
            }
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    others = "".join(
        f"\n  {name}\t{value:.4f}" for name, value in row.get("probabilities", {}).items()
    )
    return f"{row['label']}\t{row['probability']:.4f}\t{row['text']}{others}"


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix.lower() not in {".csv", ".jsonl"}:
        raise ConfigError(
            f"--output {output} is neither .csv nor .jsonl. Give it one of these suffixes."
        )
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.parent} does not exist. Make it.")


def _write(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write beside the place, then rename, so that nothing half-written is left."""
    content = _csv(rows) if output.suffix.lower() == ".csv" else _jsonl(rows)
    partial = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        partial.write_text(content, encoding="utf-8", newline="")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    flat = [
        {key: value for key, value in row.items() if key != "probabilities"}
        | {f"p_{name}": value for name, value in row.get("probabilities", {}).items()}
        for row in rows
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(flat[0]) if flat else ["text", "label"])
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
