"""The command `llmembed-extract`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmembed.common.console import Command, answer, command
from llmembed.extract.config import ExtractConfig

if TYPE_CHECKING:
    from llmembed.extract.texts.corpora import Corpus


class ExtractCommand(Command):
    """An extraction that was interrupted goes on where it stopped."""

    resume_hint = "Committed blocks are safe; run the same command again to go on."


@command(ExtractConfig, ExtractCommand)
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
    """Find texts, labels and the model before torch is imported: what is wrong is told at once."""
    from llmembed.extract.backbones.models import find_model, refuse_unknown
    from llmembed.extract.texts.corpora import load_corpus

    refuse_unknown(config.model)
    corpus = load_corpus(config.dataset_options)
    find_model(config.model, config.revision)
    return corpus
