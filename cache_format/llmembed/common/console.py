"""What every command shares: options read off a config dataclass, exit codes, one-line errors.

A field of the config is the single place where an option's name, type, default and help text
stand: `command` makes the click option from it. Names are checked by the config itself, so that
the Python API and the command line answer with the same sentence.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import dataclasses
import functools
import gc
import inspect
import io
import itertools
import json
import logging
import numbers
import os
import signal
import sys
import textwrap
import threading
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import click
from click.shell_completion import CompletionItem

from llmembed.common.errors import (
    ConfigError,
    LLMEmbedError,
    LLMEmbedWarning,
    RowError,
    hidden,
    shown,
)
from llmembed.common.progress import showing_phases

# Metadata of a config's field.
REPEATED = "repeated"  # what `--help` shows for a value that may hold commas
ARGUMENT = "argument"  # no option: what `--help` shows for its values
GROUP = "group"  # heading in `--help` of this option and of those after it
COMPLETES = "completes"  # what a shell completes: a function that gives names, or FILE or FOLDER
OR_PLACE = "or_place"  # what no name fits is the path of a file or folder
TAKES = "takes"  # what in Python stands for a text, too: an int; a list, for texts with commas
FILE, FOLDER = "file", "dir"
EXIT_KNOWN_ERROR = 1
EXIT_ROWS_LEFT = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL of <sysexits.h>
EXIT_INTERRUPTED = 130
_OF_SIGNALS = {"SIGINT": EXIT_INTERRUPTED, "SIGTERM": EXIT_STOPPED, "SIGUSR1": EXIT_STOPPED}
_RARELY = (100_000, 20, 20)
"""When garbage is collected: importing torch and transformers makes nothing but what lasts, and
searching it as often as Python does by itself is a sixth of the start."""
_ALLOWED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list of such",
}
_EXIT_CODES = {
    "0": "done, or nothing to do",
    "1": "an error, told in one sentence",
    "2": "bad usage",
    "4": "done but for rows that have no feature to store",
    str(EXIT_STOPPED): "stopped by SIGTERM or SIGUSR1; the same command goes on",
    str(EXIT_INTERRUPTED): "interrupted",
}


class _Program(click.Command):
    """What every command does as a program: it names its exit codes, and any console shows it."""

    examples: tuple[str, ...] = ()  # lines for `--help`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"help_option_names": ["-h", "--help"]}
        super().__init__(*args, **{"context_settings": settings, **kwargs})

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the exit codes."""
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.examples))
        with formatter.section("Exit codes"):
            formatter.write_dl([*_EXIT_CODES.items()])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; what the console's encoding lacks is shown escaped: cp1252 lacks most letters."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not _was_printing(error):
                raise
            sys.stdout = io.StringIO()  # what it still holds is not tried again at the end
            click.echo(
                f"error: standard output cannot be written: {error.strerror}. Make room there, or "
                "send it elsewhere.",
                err=True,
            )
            sys.exit(EXIT_KNOWN_ERROR)


def _was_printing(error: OSError) -> bool:
    """Tell whether an error is of what click prints, and of no file."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == "click.utils"


class Command(_Program):
    """A click command that ends a known error in one line on stderr, without a traceback."""

    resume_hint = "Nothing was left half-written; run the same command again."  # after Ctrl-C
    headings: Mapping[str, str] = {}  # name of a parameter -> heading in `--help`

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the line; of an option that is given twice click would take the last in silence."""
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args([*args])
            for parameter in (one for one in self.params if isinstance(one, click.Option)):
                if given.count(parameter) > 1 and not (parameter.multiple or parameter.is_flag):
                    option = parameter.opts[0]
                    times = given.count(parameter)
                    raise click.UsageError(
                        f"{option} is given {times} times, and takes one value. Pass it once.", ctx
                    )
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, those of every command last."""
        by_heading: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            heading = self.headings.get(
                parameter.name or "", "Command" if self.headings else "Options"
            )
            if (record := parameter.get_help_record(ctx)) is not None:
                by_heading.setdefault(heading, []).append(record)
        for heading, records in by_heading.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit 1 on a known error, 4 if only rows are left, 130 on Ctrl-C."""
        # At its end the interpreter would search the million objects of torch and Lightning for
        # cycles, for half a second to a second, to free what the process gives back anyway.
        atexit.register(gc.freeze)
        gc.set_threshold(*_RARELY)
        with _stopping() as exit_code:
            return self._invoke(ctx, exit_code)

    def _invoke(self, ctx: click.Context, exit_code: Callable[[], int]) -> Any:
        is_debugged, is_quiet = ctx.params.pop("debug", False), ctx.params.get("quiet", False)
        try:
            with warnings.catch_warnings(), showing_phases(shown=not is_quiet):
                warnings.simplefilter("ignore")  # what libraries tell their developers
                warnings.simplefilter("always", LLMEmbedWarning)
                warnings.showwarning = _show_warning
                if not is_quiet:
                    _show_log()
                if is_quiet or not sys.stderr.isatty():  # a log is no place for bars
                    for library in ("HUB", "DATASETS"):
                        os.environ.setdefault(f"HF_{library}_DISABLE_PROGRESS_BARS", "1")
                return super().invoke(ctx)
        except LLMEmbedError as error:
            if is_debugged:
                click.echo(shown(hidden(traceback.format_exc()), keep="\n"), err=True)
            click.echo(f"error: {error}", err=True)
            sys.exit(EXIT_ROWS_LEFT if isinstance(error, RowError) else EXIT_KNOWN_ERROR)
        except KeyboardInterrupt:
            click.echo(f"\ninterrupted. {self.resume_hint}", err=True)
            sys.exit(exit_code())


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], int]]:
    """Let Ctrl-C, SIGTERM and SIGUSR1 end what is done; the result tells the exit code.

    The first raises KeyboardInterrupt, so that locks are given back. A second Ctrl-C ends the
    process at once, as SIGKILL would, which nothing that was committed minds; schedulers send
    their signals several times, to a process and its group, and these do no more. What is ignored,
    as in the background of a shell, or handled by another one, stays so.
    """
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
        for number in filter(None, (getattr(signal, name, None) for name in _OF_SIGNALS)):
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield lambda: _OF_SIGNALS[signal.Signals(received[0]).name if received else "SIGINT"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Group(_Program, click.Group):
    """A command of commands: without one it says so, in one sentence and with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # click's own way prints the help, before 8.2 with exit code 0.
        super().__init__(*args, no_args_is_help=False, **kwargs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is named first; of an unknown one say which there are."""
        known = self.list_commands(ctx)
        if not (ctx.resilient_parsing or args[0] in known or args[0].startswith("-")):
            remedy = "Pass one of them."
            raise click.UsageError(str(ConfigError.unknown("command", args[0], known, remedy)), ctx)
        return super().resolve_command(ctx, args)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"warning: {message}", err=True)


class _EchoHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(shown(hidden(self.format(record)), keep="\n"), err=True)


def _show_log() -> None:
    logger = logging.getLogger("llmembed")
    if not logger.handlers:
        logger.addHandler(_EchoHandler())
        logger.setLevel(logging.INFO)


def answer(
    document: Any, text: str, *, as_json: bool, quiet: bool, indent: int | None = None
) -> None:
    """Print a result on stdout, as `--json` and `--quiet` ask for."""
    if as_json:
        echo_json(document, indent=indent)
    elif not quiet:
        click.echo(shown(text, keep="\n"))


def echo_json(document: Any, *, indent: int | None = None) -> None:
    """Print a JSON document on stdout: escaped is what its encoding lacks or a terminal obeys."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(document, ensure_ascii=not is_utf8, indent=indent, default=str)
    obeyed = (c for c in text if not c.isprintable() and c != "\n")
    click.echo(text.translate({ord(c): json.dumps(c)[1:-1] for c in obeyed}))


def command(
    config: type, kind: type[Command] = Command, *, examples: tuple[str, ...] = ()
) -> Callable[..., Command]:
    """Make a command, whose options are the config's fields, of a function that takes a config."""

    def decorate(function: Callable[..., None]) -> Command:
        @functools.wraps(function)
        def run(*, as_json: bool, quiet: bool, **options: Any) -> None:
            function(config(**options), as_json=as_json, quiet=quiet)

        made: Callable[..., Any] = run
        for add in (version_option, common_options, *_options_of(config)[::-1]):
            made = add(made)
        program = click.command(cls=kind)(made)
        program.headings, program.examples = _headings_of(config), examples
        return program

    return decorate


def _headings_of(config: Any) -> dict[str, str]:
    headings, heading = {}, ""
    for field in dataclasses.fields(config):
        heading = headings[field.name] = field.metadata.get(GROUP, heading)
    return headings if heading else {}


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`, `--quiet` and `--debug`, which mean the same in every command."""
    for name, parameter, text in (
        ("--debug", "debug", "Show the traceback of a known error."),
        ("--quiet", "quiet", "No progress and no summary, errors only."),
        ("--json", "as_json", "Print the result as one JSON document on stdout."),
    ):
        function = click.option(name, parameter, is_flag=True, help=text)(function)
    return function


def version_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--version`."""
    return click.version_option(package_name="llmembed-cache")(function)


def field_docs(config: type) -> dict[str, str]:
    """Read the docstring under each field of a dataclass, as one line each."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config)))
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


def as_declared(config: Any) -> None:
    """Make each field of a frozen config what its type says, of what Python passes for that.

    Numbers of numpy, paths, lists, ranges and arrays become plain numbers, texts and tuples, as a
    command gives them and a record in JSON holds them. In Python a lone text is one too many
    characters: `pooling="mean"` is `pooling=("mean",)`, and with commas it is what a command takes
    it for.

    Raises:
        ConfigError: a value is of another type.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        hint, value = hints[field.name], _plain(getattr(config, field.name))
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [member for member in members if member is not types.NoneType]
        is_optional = len(kinds) < len(members)
        if len(kinds) > 1 or (value is None and is_optional):
            continue
        takes = field.metadata.get(TAKES, ())
        if typing.get_origin(kinds[0]) is not tuple:
            texts = _texts_of(value, takes) if list in takes else None
            taken = _scalar_of(kinds[0], value, takes) if texts is None else ",".join(texts)
            allowed = [_ALLOWED[kind] for kind in (kinds[0], *takes)] + ["None"] * is_optional
        elif isinstance(value, str) and REPEATED not in field.metadata:
            taken = tuple(part.strip() for part in value.split(",") if part.strip())
        else:  # of a lone text blanks of a prompt, and commas of a text, stay
            texts = _texts_of([value] if isinstance(value, str) else value)
            taken = None if texts is None else tuple(texts)
            allowed = ["texts: a tuple or list of texts, or one text"]
            if REPEATED not in field.metadata:
                allowed = ["names: a tuple or list of texts, or one text with commas"]
        if taken is None:
            given = repr(value)
            raise ConfigError(
                f"{field.name} is {given[:60]}{'...' if given[60:] else ''}, of type "
                f"{type(value).__name__}. Pass {_either(allowed)}."
            )
        object.__setattr__(config, field.name, taken)


def _plain(value: Any) -> Any:
    """Give the text of a path, and Python's own value of a scalar of numpy or torch."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _scalar_of(kind: type, value: Any, takes: Collection[type] = ()) -> Any:
    """Read a value of a kind; None is one that it is not."""
    value = _plain(value)
    if kind is bool or isinstance(value, bool):
        return value if kind is type(value) else None
    if kind is str and int in takes and isinstance(value, numbers.Integral):
        return str(int(value))
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            return float(value)
    return None


def _texts_of(value: Any, takes: Collection[type] = ()) -> list[str] | None:
    """List the texts of a list, range, array or set, a set in one order; None is something else."""
    is_flat = isinstance(value, Iterable) and getattr(value, "ndim", 1) == 1
    if not is_flat or isinstance(value, str | bytes | Mapping):
        return None
    texts = [_scalar_of(str, part, takes) for part in value]
    if None in texts:
        return None
    return sorted(texts) if isinstance(value, Set) else texts


def _either(words: Sequence[str]) -> str:
    """Write alternatives.

    >>> _either(["a text"]), _either(["a text", "None"]), _either(["1", "2", "3"])
    ('a text', 'a text or None', '1, 2, or 3')
    """
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])}, or {words[-1]}"


def _options_of(config: Any) -> list[Callable[..., Any]]:
    """Make a click option, or argument, of each field."""
    docs, hints = field_docs(config), typing.get_type_hints(config)
    return [
        click.argument(
            field.name,
            nargs=1 if hints[field.name] is str else -1,
            metavar=field.metadata[ARGUMENT],
            shell_complete=functools.partial(_complete, FOLDER),
        )
        if ARGUMENT in field.metadata
        else click.option(
            f"--{field.name.replace('_', '-')}",
            field.name,
            help=docs[field.name] + _shown_default(field.default),
            shell_complete=functools.partial(
                _complete, field.metadata.get(COMPLETES), or_place=OR_PLACE in field.metadata
            ),
            **_attributes(hints[field.name], field),
        )
        for field in dataclasses.fields(config)
    ]


def _complete(
    known: Callable[[], Iterable[str]] | str | None,
    _ctx: click.Context,
    _param: click.Parameter,
    incomplete: str,
    *,
    or_place: bool = False,
) -> list[CompletionItem]:
    """Complete a name, of several with commas the last; or leave it to the shell to find files."""
    if known is None or isinstance(known, str):
        return [CompletionItem(incomplete, type=known)] if known else []
    before, comma, begun = incomplete.rpartition(",")
    names = (name for name in known() if name.startswith(begun))
    found = [CompletionItem(f"{before}{comma}{name}") for name in names]
    return found or [CompletionItem(incomplete, type=FILE)] * or_place


def _attributes(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    if hint is bool:
        return {"is_flag": True, "default": field.default}
    if REPEATED in field.metadata:
        return {"multiple": True, "metavar": field.metadata[REPEATED]}
    if typing.get_origin(hint) is tuple:
        return {
            "multiple": True,
            "metavar": "NAME[,NAME...]",
            "default": (),
            "callback": functools.partial(_split_commas, default=field.default),
        }
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    scalar = next(member for member in members if member is not types.NoneType)
    if field.default is dataclasses.MISSING:  # to click from 8.3 on, None would be a value
        return {"type": scalar, "required": True}
    return {"type": scalar, "default": field.default, "show_default": field.default is not None}


def _shown_default(default: Any) -> str:
    is_shown = isinstance(default, tuple) and default
    return f"  [default: {','.join(default)}]" if is_shown else ""


def _split_commas(
    _ctx: click.Context, _param: click.Parameter, value: tuple[str, ...], *, default: Any
) -> tuple[str, ...]:
    names = (part.strip() for parts in value for part in parts.split(","))
    return tuple(name for name in names if name) or default
