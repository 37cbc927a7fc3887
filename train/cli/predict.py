"""The command `llmembed-predict`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmembed.common.console import REPEATED, command, echo_json
from llmembed.common.errors import shown
from llmembed.train.cli import let_waiting_threads_sleep
from llmembed.train.runs.answers import Answers, check_output, write

if TYPE_CHECKING:
    from llmembed.train.runs.predict import Input

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Every option of a prediction; the docstring under a field is its `--help` text."""

    run: str
    """Folder of the run, or user/name[@revision] of one on the Hugging Face Hub."""
    text: tuple[str, ...] = field(default=(), metadata={REPEATED: "TEXT"})
    """Text to classify; repeatable."""
    input: str | None = None
    """File of texts: txt (one a line), csv, tsv, json, jsonl, parquet, arrow; - is stdin, a text a
    line."""
    text_column: str | None = None
    """Column of --input, or two for pairs: a,b; without it, the one that the cache was made from,
    else detected, and said."""
    delimiter: str | None = None
    """Between the fields of a csv or tsv --input; tab for a tab."""
    csv_escape: str | None = None
    """What makes the next character of it stand for itself."""
    csv_quote: str | None = None
    """Around its fields, or none."""
    output: str | None = None
    """File to write, csv, jsonl or parquet, by its suffix; the other columns of --input go
    along."""
    proba: bool = False
    """Give the probability of every class."""
    model: tuple[str, ...] = field(default=(), metadata={REPEATED: "[SOURCE=]PLACE"})
    """Where the backbone is now, if it is not where it was; its content must be the same. Of
    several sources, name the one that moved; repeatable."""
    trust_remote_code: bool = False
    """Run the model code that a Hub repository brings."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if bool(self.text) == (self.input is not None):
            raise click.UsageError("Pass either --text or --input.")
        if self.input in {None, STDIN} and any(self.csv.values()):
            raise click.UsageError(
                "--delimiter, --csv-escape and --csv-quote are for a file of --input."
            )
        if self.output is not None:
            check_output(Path(self.output))

    @property
    def csv(self) -> dict[str, str | None]:
        """How a delimited file is written, as an extraction takes it."""
        return {name: getattr(self, name) for name in ("delimiter", "csv_escape", "csv_quote")}

    def given(self, known_column: str | None) -> Input:
        """Read the texts; the run may know the column that its own came from."""
        from llmembed.train.runs.predict import Input, read_input, read_lines

        if self.input is None:
            return Input(texts=list(self.text))
        if self.input == STDIN:
            return read_lines(sys.stdin.buffer.read(), "stdin")
        return read_input(Path(self.input), self.text_column, known=known_column, csv=self.csv)


@command(PredictConfig)
def predict_main(config: PredictConfig, *, as_json: bool, quiet: bool) -> None:
    """Classify new texts with a run."""
    let_waiting_threads_sleep()
    from llmembed.train.runs.run import load_run

    run = load_run(config.run)
    given = config.given(run.text_column)
    proba = run.predict_proba(
        given.texts, config.device, model=config.model, trust_remote_code=config.trust_remote_code
    )
    answers = Answers(
        texts=given.texts,
        labels=run.labels,
        proba=proba,
        with_all=config.proba,
        beside=given.beside,
    )
    if config.output is not None:
        write(Path(config.output), answers)
    if as_json:
        echo_json([*answers.rows()])
    elif config.output is None:
        click.echo("\n".join(answers.lines()))
    elif not quiet:
        click.echo(shown(f"{len(given.texts)} predictions: {config.output}"))
