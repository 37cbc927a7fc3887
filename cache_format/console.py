"""What every command shares: options read off a config dataclass, exit codes, one-line errors.

A field of the config is the single place where an option's name, type, default and help text
stand: `config_options` makes the click option from it. Names are checked by the config itself,
so that the Python API and the command line answer with the same sentence.
"""

from __future__ import annotations

import ast
import atexit
import dataclasses
import functools
import gc
import inspect
import itertools
import logging
import sys
import textwrap
import traceback
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

import click

from llmembed.cache_format.errors import LLMEmbedError, LLMEmbedWarning, RowError

EXIT_KNOWN_ERROR = 1
EXIT_ROWS_LEFT = 4
EXIT_INTERRUPTED = 130


class Command(click.Command):
    """A click command that ends a known error in one line on stderr, without a traceback.

    Attributes:
        resume_hint: what to do after Ctrl-C; a command that can resume overrides it.
    """

    resume_hint = "Nothing was left half-written; run the same command again."

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit 1 on a known error, 4 if only rows are left, 130 on Ctrl-C.

        At its end the interpreter would search the million objects of torch and Lightning for
        cycles, for half a second to a second, to free what the process gives back anyway.
        """
        atexit.register(gc.freeze)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what libraries tell their developers
                warnings.simplefilter("always", LLMEmbedWarning)
                warnings.showwarning = _show_warning
                if not ctx.params.get("quiet"):
                    _show_log()
                return super().invoke(ctx)
        except LLMEmbedError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            sys.exit(EXIT_ROWS_LEFT if isinstance(error, RowError) else EXIT_KNOWN_ERROR)
        except KeyboardInterrupt:
            click.echo(f"\ninterrupted. {self.resume_hint}", err=True)
            sys.exit(EXIT_INTERRUPTED)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"warning: {message}", err=True)


class _EchoHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


def _show_log() -> None:
    logger = logging.getLogger("llmembed")
    if not logger.handlers:
        logger.addHandler(_EchoHandler())
        logger.setLevel(logging.INFO)


def field_docs(config_class: type) -> dict[str, str]:
    """Read the docstring under each field of a dataclass, as one line each."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    body = typing.cast("ast.ClassDef", tree.body[0]).body
    docs: dict[str, str] = {}
    for field, doc in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


def config_options(config_class: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a click function with one option for each field of a config dataclass."""
    docs = field_docs(config_class)
    hints = typing.get_type_hints(config_class)
    options = [
        _option(field, hints[field.name], docs[field.name])
        for field in dataclasses.fields(config_class)
    ]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda f, option: option(f), reversed(options), function)

    return decorate


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`, `--quiet` and `--debug`, which mean the same in every command."""
    for name, text in (
        ("--debug", "Show the traceback of a known error."),
        ("--quiet", "No progress and no summary, errors only."),
        ("--json", "Print the result as one JSON document on stdout."),
    ):
        parameter = "as_json" if name == "--json" else name.removeprefix("--")
        function = click.option(name, parameter, is_flag=True, help=text)(function)
    return function


def _option(
    field: dataclasses.Field[Any], hint: Any, text: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    name = f"--{field.name.replace('_', '-')}"
    required = field.default is dataclasses.MISSING
    default: Any = None if required else field.default
    if hint is bool:
        return click.option(name, field.name, is_flag=True, default=default, help=text)
    if typing.get_origin(hint) is tuple:
        return click.option(
            name,
            field.name,
            multiple=True,
            metavar="NAME[,NAME...]",
            default=(),
            callback=functools.partial(_split_commas, default=default),
            help=text + (f"  [default: {','.join(default)}]" if default else ""),
        )
    return click.option(
        name,
        field.name,
        type=_scalar(hint),
        default=default,
        required=required,
        show_default=default is not None,
        help=text,
    )


def _split_commas(
    ctx: click.Context,
    param: click.Parameter,
    value: tuple[str, ...],
    *,
    default: tuple[str, ...],
) -> tuple[str, ...]:
    del ctx, param
    names = (part.strip() for parts in value for part in parts.split(","))
    return tuple(name for name in names if name) or default


def _scalar(hint: Any) -> type:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return typing.cast("type", next(member for member in members if member is not types.NoneType))
