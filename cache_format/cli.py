"""`llmembed-cache`: look at a cache, check it, and move it about."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from llmembed.common.console import (
    EXIT_KNOWN_ERROR,
    Command,
    Group,
    common_options,
    echo_json,
    version_option,
)
from llmembed.common.errors import shown


class _CopyCommand(Command):
    resume_hint = "Run the same command again to go on where it stopped."


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def main() -> None:
    """Look at a cache of features, check it, and move it about."""


def _command(name: str, kind: type[Command] = Command) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> click.Command:
        return main.command(name, cls=kind)(common_options(function))

    return decorate


@_command("info")
@click.argument("cache")
def info(cache: str, *, as_json: bool, quiet: bool) -> None:
    """Print what CACHE holds: splits, sources, layers, sizes, completeness, provenance."""
    from llmembed.cache_format.reader import open_cache
    from llmembed.cache_format.tools.describe import describe, tree

    description = describe(open_cache(cache))
    _print(tree(description), description, as_json=as_json, quiet=quiet)


@_command("verify")
@click.argument("cache")
@click.option("--model", help="Also extract random rows again with this model, and compare.")
@click.option("--dataset", help="Where their texts are; default: where the cache says.")
@click.option("--rows", default=16, show_default=True, help="How many of them a split.")
def verify(cache: str, *, as_json: bool, quiet: bool, **again: Any) -> None:
    """Re-hash all of CACHE and name every damaged, missing or truncated file; exit 1 if any."""
    from llmembed.cache_format.stores.base import open_store
    from llmembed.cache_format.tools.verify import summary
    from llmembed.cache_format.tools.verify import verify as verify_store

    result = verify_store(open_store(cache))
    document = {**vars(result), "damage": [vars(damage) for damage in result.damage]}
    lines, bad = [*summary(result, cache)], bool(result.damage)
    if again["model"] and not bad:
        from llmembed.extract.features.recheck import recheck

        found = recheck(cache, model=again["model"], dataset=again["dataset"], n_rows=again["rows"])
        document["again"] = found.document
        lines, bad = [*lines, *found.summary()], bool(found.differences)
    _print(lines, document, as_json=as_json, quiet=quiet and not bad)
    if bad:
        sys.exit(EXIT_KNOWN_ERROR)


@_command("finalize", _CopyCommand)
@click.argument("cache")
def finalize(cache: str, *, as_json: bool, quiet: bool) -> None:
    """Close CACHE after the last of several ranks: re-hash all of it, write its indexes."""
    from llmembed.cache_format.tools.finalize import finalize as finalize_cache

    result = finalize_cache(cache)
    lines = [f"{cache}: {result.n_chunks} chunks, every hash holds; the cache is closed"]
    _print(lines, vars(result), as_json=as_json, quiet=quiet)


@_command("copy", _CopyCommand)
@click.argument("cache")
@click.argument("target")
def copy(cache: str, target: str, *, as_json: bool, quiet: bool) -> None:
    """Copy CACHE to TARGET, each a folder or a URL such as s3://bucket/r8.zarr, and verify it."""
    from llmembed.cache_format.tools.maintenance import copy as copy_cache

    n_files = copy_cache(cache, target)
    lines = [f"{n_files} files copied to {target}, every hash holds"]
    _print(lines, {"target": target, "n_files": n_files}, as_json=as_json, quiet=quiet)


@_command("merge", _CopyCommand)
@click.argument("target")
@click.argument("caches", nargs=-1, required=True)
def merge(target: str, caches: tuple[str, ...], *, as_json: bool, quiet: bool) -> None:
    """Add to TARGET (made if need be) what other CACHES of the same data set hold."""
    from llmembed.cache_format.tools.maintenance import merge as merge_caches

    n_blocks = merge_caches(target, caches)
    lines = [f"{n} blocks added from {path}" for path, n in n_blocks.items()]
    _print(lines, {"target": target, "n_blocks": n_blocks}, as_json=as_json, quiet=quiet)


@_command("remove")
@click.argument("cache")
@click.option("--split", help="Of this split only.")
@click.option("--source", help="Of this source only.")
@click.option("--pooling", help="Of this pooling only.")
@click.option("--layers", default="", help="Of these layers only, such as 8,16.")
def remove(cache: str, *, as_json: bool, quiet: bool, **chosen: str) -> None:
    """Remove what fits all the options from CACHE: arrays, or whole splits and sources."""
    from llmembed.cache_format.tools.maintenance import parse_layers
    from llmembed.cache_format.tools.maintenance import remove as remove_from

    layers = parse_layers(chosen.pop("layers"))
    removed = remove_from(cache, layers=layers, **chosen)
    _print(
        [f"removed {name}" for name in removed], {"removed": removed}, as_json=as_json, quiet=quiet
    )


@_command("convert", _CopyCommand)
@click.argument("cache")
@click.argument("target")
@click.option("--archive", is_flag=True, help="Sharded and compressed Zarr, to be read only.")
def convert(cache: str, target: str, *, archive: bool, as_json: bool, quiet: bool) -> None:
    """Write CACHE as HDF5 (TARGET ends in .h5) or as an archive, or read an .h5 file back."""
    from llmembed.cache_format.tools.convert import convert as convert_cache

    form = convert_cache(cache, target, archive=archive)
    lines = [f"{target} written as {form}, every hash holds"]
    _print(lines, {"target": target, "form": form}, as_json=as_json, quiet=quiet)


def _print(lines: Iterable[str], document: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    if as_json:
        echo_json(document, indent=1)
    elif not quiet:
        for line in lines:
            click.echo(shown(line))
