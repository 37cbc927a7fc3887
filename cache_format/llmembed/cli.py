"""The command `llmembed`: each of the commands by a shorter way, imported when it is asked for."""

from __future__ import annotations

import pkgutil

import click

from llmembed.common.console import Group, version_option

VERBS = {
    "extract": ("llmembed.extract.cli:main", "Texts through a frozen model into a cache."),
    "fit": ("llmembed.train.cli.fit:fit_main", "A classifier on the features of a cache."),
    "predict": ("llmembed.train.cli.predict:predict_main", "New texts through a run."),
    "sweep": ("llmembed.train.cli.sweep:sweep_main", "Which layer of a cache knows what."),
    "audit": ("llmembed.train.cli.audit:audit_main", "Which labels of a cache look wrong."),
    "report": ("llmembed.train.cli.report:report_main", "Compare runs, or look at a cache."),
    "serve": ("llmembed.train.cli.serve:serve_main", "Answer requests with a run."),
    "cache": ("llmembed.cache_format.cli:main", "Look at a cache, check it, move it about."),
}
"""Name -> where the command is, and what it does; `llmembed-<name>` is the same command."""


class _Verbs(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = VERBS.get(cmd_name)
        command: click.Command | None = found and pkgutil.resolve_name(found[0])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(cls=_Verbs)
@version_option
def main() -> None:
    """Text classification on the hidden states of a frozen language model.

    Each command is also there by itself: llmembed extract is llmembed-extract.
    """


main.examples = (
    "llmembed extract --model minilm --layers 2,4,6 --dataset r8",
    "llmembed fit --cache r8.zarr",
    "llmembed predict --run runs/r8-cooc-0 --text 'oil prices rose'",
)
