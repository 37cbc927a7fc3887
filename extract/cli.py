"""The command `llmembed-extract`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from llmembed.common.console import Command, answer, command
from llmembed.extract.config import ExtractConfig

if TYPE_CHECKING:
    from llmembed.extract.texts.corpora import Corpus


class ExtractCommand(Command):
    """An extraction that was interrupted goes on where it stopped."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the line; what lists must know of --json before anything else is looked at."""
        ctx.obj = "--json" in args
        return super().parse_args(ctx, args)

    resume_hint = "Committed blocks are safe; run the same command again to go on."


def _lists(name: str, text: str) -> Callable[[Any], Any]:
    """Make an option that prints a list of `llmembed.extract.listing`, and nothing else is done."""

    def show(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            from llmembed.extract import listing

            rows = getattr(listing, name)()
            answer(rows, listing.table(rows), as_json=ctx.obj, quiet=False, indent=1)
            ctx.exit()

    option: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False}
    return click.option(f"--list-{name}", callback=show, help=text, **option)


EXAMPLES = (
    "llmembed-extract --model minilm --layers 2,4,6 --dataset r8",
    "llmembed-extract --model smollm2-135m --layers 8:25:8 --dataset mine.csv --dry-run",
    "llmembed-extract --model llama2-7b --layers last:5 --pooling mean,last --devices all",
)


@_lists("datasets", "List the aliases of --dataset, and which are on this machine.")
@_lists("models", "List the aliases of --model, and which are on this machine.")
@command(ExtractConfig, ExtractCommand, examples=EXAMPLES)
def main(config: ExtractConfig, *, as_json: bool, quiet: bool) -> None:
    """Stream texts through a frozen model into a cache of pooled hidden states.

    Running the same command again resumes what was interrupted, adds what is missing (layers,
    poolings, splits), and does nothing where all is there.
    """
    corpus = _read_inputs(config)
    result: Any
    if config.dry_run:
        from llmembed.extract.dry_run import plan_extraction

        result = plan_extraction(config, corpus=corpus)
    else:
        from llmembed.extract.pipeline import extract

        result = extract(config, corpus=corpus, show_progress=not quiet)
    answer(dataclasses.asdict(result), result.describe(), as_json=as_json, quiet=quiet)


def _read_inputs(config: ExtractConfig) -> Corpus:
    """Find texts, cache and model before torch is imported: what is wrong is told at once."""
    from llmembed.extract.backbones.models import called, find_model
    from llmembed.extract.engines.early import refuse_cache
    from llmembed.extract.texts.corpora import load_corpus

    called(config.model)  # refuses what no look at the Hub could find
    corpus = load_corpus(config.dataset_options)
    refuse_cache(config, corpus, writes=not config.dry_run)
    find_model(config.model, config.revision)
    return corpus
