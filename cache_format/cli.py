"""`llmembed-cache`: look at a cache, check it, and move it about."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import click

from llmembed.common.console import (
    EXIT_KNOWN_ERROR,
    Command,
    Group,
    answer,
    common_options,
    version_option,
)
from llmembed.common.errors import shown


class _CopyCommand(Command):
    resume_hint = "Run the same command again to go on where it stopped."


@click.group(cls=Group)
@version_option
def main() -> None:
    """Look at a cache of features, check it, and move it about."""


def _command(kind: type[Command] = Command) -> Callable[..., Any]:
    """Make a command of a function that gives lines of text, and the same as a document.

    A third result tells that what was asked for is not well: it is printed even with `--quiet`.
    """

    def decorate(function: Callable[..., tuple[Any, ...]]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, quiet: bool, **options: Any) -> None:
            lines, document, *bad = function(**options)
            text = "\n".join(map(shown, lines))
            answer(document, text, as_json=as_json, quiet=quiet and not any(bad), indent=1)
            if any(bad):
                sys.exit(EXIT_KNOWN_ERROR)

        return main.command(cls=kind)(version_option(common_options(run)))

    return decorate


@_command()
@click.argument("cache", type=click.Path())
def info(cache: str) -> tuple[Any, ...]:
    """Print what CACHE holds: splits, sources, layers, sizes, completeness, provenance."""
    from llmembed.cache_format.reader import open_cache
    from llmembed.cache_format.tools import describe, tree

    description = describe(open_cache(cache))
    return tree(description), description


@_command()
@click.argument("cache", type=click.Path())
@click.option("--model", help="Also extract random rows again with this model, and compare.")
@click.option("--dataset", help="Where their texts are; default: where the cache says.")
@click.option("--rows", default=16, show_default=True, help="How many of them a split.")
def verify(cache: str, model: str | None, dataset: str | None, rows: int) -> tuple[Any, ...]:
    """Re-hash all of CACHE and name every damaged, missing or truncated file; exit 1 if any."""
    from llmembed.cache_format.stores import open_store
    from llmembed.cache_format.tools import summary
    from llmembed.cache_format.tools import verify as verify_store

    result = verify_store(open_store(cache))
    document = {**vars(result), "damage": [vars(damage) for damage in result.damage]}
    lines, bad = [*summary(result, cache)], bool(result.damage)
    if model and not bad:
        from llmembed.extract.features.recheck import recheck

        found = recheck(cache, model=model, dataset=dataset, n_rows=rows)
        document["again"] = found.document
        lines, bad = [*lines, *found.summary()], bool(found.differences)
    return lines, document, bad


@_command(_CopyCommand)
@click.argument("cache", type=click.Path())
def finalize(cache: str) -> tuple[Any, ...]:
    """Close CACHE after the last of several ranks: re-hash all of it, write its indexes."""
    from llmembed.cache_format.tools import finalize as finalize_cache

    n_chunks = finalize_cache(cache)
    line = f"{cache}: {n_chunks} chunks, every hash holds; the cache is closed"
    return [line], {"path": cache, "n_chunks": n_chunks}


@_command(_CopyCommand)
@click.argument("cache", type=click.Path())
@click.argument("target", type=click.Path())
def copy(cache: str, target: str) -> tuple[Any, ...]:
    """Copy CACHE to TARGET, each a folder or a URL, and verify it.

    URLs are such as s3://bucket/r8.zarr, or hf://datasets/user/name/r8.zarr for a data set on the
    Hugging Face Hub, which is made, a private one, if need be.
    """
    from llmembed.cache_format.tools import copy as copy_cache

    n_files = copy_cache(cache, target)
    line = f"{n_files} files copied to {target}, every hash holds"
    return [line], {"target": target, "n_files": n_files}


@_command(_CopyCommand)
@click.argument("target", type=click.Path())
@click.argument("caches", nargs=-1, required=True, type=click.Path())
def merge(target: str, caches: tuple[str, ...]) -> tuple[Any, ...]:
    """Add to TARGET (made if need be) what other CACHES of the same data set hold."""
    from llmembed.cache_format.tools import merge as merge_caches

    n_blocks = merge_caches(target, caches)
    lines = [f"{n} blocks added from {path}" for path, n in n_blocks.items()]
    return lines, {"target": target, "n_blocks": n_blocks}


@_command()
@click.argument("cache", type=click.Path())
@click.option("--split", help="Of this split only.")
@click.option("--source", help="Of this source only.")
@click.option("--pooling", help="Of this pooling only.")
@click.option("--layers", default="", help="Of these layers only, such as 8,16.")
def remove(cache: str, layers: str, **chosen: str | None) -> tuple[Any, ...]:
    """Remove what fits all the options from CACHE: arrays, or whole splits and sources."""
    from llmembed.cache_format.tools import parse_layers
    from llmembed.cache_format.tools import remove as remove_from

    removed = remove_from(cache, layers=parse_layers(layers), **chosen)
    return [f"removed {name}" for name in removed], {"removed": removed}


@_command(_CopyCommand)
@click.argument("cache", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--archive", is_flag=True, help="Sharded and compressed Zarr, to be read only.")
def convert(cache: str, target: str, *, archive: bool) -> tuple[Any, ...]:
    """Write CACHE as HDF5 (TARGET ends in .h5) or as an archive, or read an .h5 file back."""
    from llmembed.cache_format.tools import convert as convert_cache

    form = convert_cache(cache, target, archive=archive)
    return [f"{target} written as {form}, every hash holds"], {"target": target, "form": form}
