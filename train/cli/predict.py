"""The command `llmembed-predict`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmembed.common.console import COMPLETES, FILE, FOLDER, GROUP, REPEATED, command, echo_json
from llmembed.common.errors import ConfigError, shown
from llmembed.train.cli import let_waiting_threads_sleep
from llmembed.train.config.allowed import CONFORMAL_BY, check_conformal_by
from llmembed.train.runs.answers import Answers, check_output, write

if TYPE_CHECKING:
    from llmembed.train.runs.predict import Input
    from llmembed.train.runs.run import Run

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Every option of a prediction; the docstring under a field is its `--help` text."""

    run: str = field(metadata={GROUP: "Run", COMPLETES: FOLDER})
    """Folder of the run, or user/name[@revision] of one on the Hugging Face Hub."""
    model: tuple[str, ...] = field(default=(), metadata={REPEATED: "[SOURCE=]PLACE"})
    """Where the backbone is now, if it is not where it was; its content must be the same. Of
    several sources, name the one that moved; repeatable."""
    trust_remote_code: bool = False
    """Run the model code that a Hub repository brings."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    text: tuple[str, ...] = field(default=(), metadata={GROUP: "Texts", REPEATED: "TEXT"})
    """Text to classify; repeatable."""
    input: str | None = field(default=None, metadata={COMPLETES: FILE})
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
    output: str | None = field(default=None, metadata={GROUP: "Answers", COMPLETES: FILE})
    """File to write, csv, jsonl or parquet, by its suffix; the other columns of --input go
    along."""
    proba: bool = False
    """Give the probability of every class."""
    top_k: int | None = None
    """Give this many of the likeliest classes, with their probabilities."""
    defuse_formulas: bool = False
    """Put an apostrophe before cells of a csv --output that a spreadsheet would run as a formula:
    texts that begin with =, +, -, @, a tab or a carriage return. Numbers stay as they are."""
    abstain: float | None = field(default=None, metadata={GROUP: "Doubt"})
    """Answer only so many texts that this share of the answers is right, such as 0.95; told by rows
    held out of the training. It holds for texts like those."""
    unknown: str | None = None
    """Label of texts that --abstain leaves without an answer; without it, an empty one."""
    conformal: float | None = None
    """Give each text the set of labels that holds the right one with this share, such as 0.9; told
    by rows held out of the training. It may be empty: nothing known is like the text."""
    conformal_by: str = field(default="all", metadata={COMPLETES: lambda: CONFORMAL_BY})
    """Keep the share over all texts, or over the texts of each class: all, class."""
    ood: bool = False
    """Give the share of training rows at least as far from the others as each text (0.01 or less:
    likely of another domain), and note which texts are empty or were cut."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if bool(self.text) == (self.input is not None):
            raise click.UsageError("Pass either --text or --input.")
        if self.input in {None, STDIN} and any(self.csv.values()):
            raise click.UsageError(
                "--delimiter, --csv-escape and --csv-quote are for a file of --input."
            )
        if self.proba and self.top_k is not None:
            raise click.UsageError("Pass either --proba or --top-k.")
        if self.defuse_formulas and not str(self.output).lower().endswith(".csv"):
            raise click.UsageError("--defuse-formulas is for a csv of --output.")
        if self.unknown is not None and self.abstain is None:
            raise click.UsageError(
                "--unknown is for texts that --abstain leaves without an answer."
            )
        check_conformal_by(self.conformal_by, self.conformal)
        if self.output is not None:
            check_output(Path(self.output))
            if self.input is not None and Path(self.output).resolve() == Path(self.input).resolve():
                raise ConfigError(
                    f"--output {self.output} is the file of --input, which it would replace. Name "
                    "another file."
                )

    @property
    def csv(self) -> dict[str, str | None]:
        """How a delimited file is written, as an extraction takes it."""
        return {name: getattr(self, name) for name in ("delimiter", "csv_escape", "csv_quote")}

    def checked_top_k(self, run: Run) -> int:
        """Check --top-k by the classes of the run; 0 where it was not given."""
        n_classes, top_k = len(run.labels), self.top_k
        if top_k is not None and not 1 <= top_k <= n_classes:
            raise ConfigError(
                f"--top-k is {top_k}, and the run {run.path} has {n_classes} classes. Pass 1 to "
                f"{n_classes}."
            )
        return top_k or 0

    def given(self, known_column: str | None) -> Input:
        """Read the texts; the run may know the column that its own came from."""
        from llmembed.train.runs.predict import Input, read_input, read_lines

        if self.input is None:
            return Input(texts=list(self.text))
        if self.input == STDIN:
            return read_lines(sys.stdin.buffer.read(), "stdin")
        return read_input(Path(self.input), self.text_column, known=known_column, csv=self.csv)


EXAMPLES = (
    "llmembed-predict --run runs/r8-cooc-0 --text 'oil prices rose' --top-k 3",
    "llmembed-predict --run runs/r8-cooc-0 --input new.csv --output answers.csv --proba",
    "llmembed-predict --run runs/r8-cooc-0 --input new.csv --abstain 0.95 --unknown other",
    "sort new.txt | llmembed-predict --run runs/r8-cooc-0 --input - --json",
)


@command(PredictConfig, examples=EXAMPLES)
def predict_main(config: PredictConfig, *, as_json: bool, quiet: bool) -> None:
    """Classify new texts with a run."""
    let_waiting_threads_sleep()
    from llmembed.train.measures.doubt import answered
    from llmembed.train.runs.folder import load_run
    from llmembed.train.runs.predict import warn_of_empty

    run = load_run(config.run)
    top_k, given = config.checked_top_k(run), config.given(run.text_column)
    below = None if config.abstain is None else run.abstain_below(config.abstain)
    by_class = config.conformal_by == "class"
    if config.conformal is not None:
        run.check_sets(config.conformal, by_class=by_class)
    proba, far = run.judge(
        given.texts,
        config.device,
        run.require_domain() if config.ood else None,
        model=config.model,
        trust_remote_code=config.trust_remote_code,
    )
    warn_of_empty(given.texts)
    doubts: dict[str, list[Any]] = {}
    if config.conformal is not None:
        doubts["label_set"] = run.label_sets(proba, config.conformal, by_class=by_class)
    if config.ood:
        doubts["out_of_domain"] = far.round(6).tolist()
        doubts["note"] = run.notes(given.texts)
    answers = Answers(
        texts=given.texts,
        labels=run.labels,
        proba=proba,
        thresholds=run.thresholds,
        with_all=config.proba,
        top_k=top_k,
        beside=given.beside,
        refused=None if below is None else ~answered(proba, below),
        unknown=config.unknown or "",
        doubts=doubts,
    )
    if config.output is not None:
        write(Path(config.output), answers, defuses_formulas=config.defuse_formulas)
    if as_json:
        echo_json([*answers.rows()])
    elif config.output is None:
        click.echo("\n".join(answers.lines()))
    elif not quiet:
        click.echo(shown(f"{len(given.texts)} predictions: {config.output}"))
