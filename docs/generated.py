"""Pages of the site that are made from what stands elsewhere, so that nothing is written twice.

MkDocs calls `on_files` and `on_page_markdown` (`hooks` in mkdocs.yml). Links in every page are
written as they hold in the repository; here they become links of the site.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llmembed.common.console import field_docs

ROOT = Path(__file__).parents[1]
SHOWN = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "figures.md": "benchmarks/README.md",
    "format.md": "cache_format/FORMAT.md",
    "index.md": "README.md",
    "security.md": "SECURITY.md",
    "tour.md": "docs/tour.ipynb",
}
"""Pages that are files of the repository, and which."""
_PAGE_OF = {path: page for page, path in SHOWN.items()}
_PICTURES = "benchmarks/results/studies/*.svg"
_PACKAGES = ("llmembed.extract", "llmembed.train", "llmembed.cache_format")
_SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the pictures they show."""
    made = {page: _shown(ROOT / path) for page, path in SHOWN.items()}
    made |= {"commands.md": "\n".join(_commands()), "python.md": "\n".join(_python())}
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    for picture in sorted(ROOT.glob(_PICTURES)):
        place = f"pictures/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Turn links of the repository into links of the site."""
    name = page.file.src_uri
    folder = (ROOT / SHOWN.get(name, f"docs/{name}")).parent

    def place(match: re.Match[str]) -> str:
        bang, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (folder / target).resolve()
        if not target or ":" in target or not path.exists():
            return match[0]
        inside = path.relative_to(ROOT).as_posix()
        if bang:
            return f"![{text}](pictures/{path.name})"
        if inside in _PAGE_OF:
            return f"[{text}]({_PAGE_OF[inside]}{anchor})"
        if inside.startswith("docs/"):
            return f"[{text}]({inside.removeprefix('docs/')}{anchor})"
        return text if inside.endswith(text.strip("`")) else f"{text} (`{inside}`)"

    rows_kept = re.sub(
        r"(?m)^\|.*$", lambda row: _escaped(row[0]), markdown
    )  # list<item> is no tag
    return _LINK.sub(place, rows_kept)


def _shown(path: Path) -> str:
    """Read a page's text; a notebook's cells become one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join(map(_cell, json.loads(text)["cells"]))


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    return source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"


def _commands() -> Iterator[str]:
    """Tell every command's `--help`, a section each."""
    yield "# Commands\n\nWhat `--help` says of each.\n"
    for name, place in _SCRIPTS.items():
        module, _, attribute = place.partition(":")
        yield from _help(name, getattr(importlib.import_module(module), attribute))


def _help(name: str, command: click.Command, depth: int = 2) -> Iterator[str]:
    context = click.Context(command, info_name=name, terminal_width=88, max_content_width=88)
    yield f"{'#' * depth} {name}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for part in command.list_commands(context):
            found = command.get_command(context, part)
            if found is not None and f"{name}-{part}" not in _SCRIPTS:
                yield from _help(f"{name} {part}", found, depth + 1)


def _python() -> Iterator[str]:
    """Tell the names that packages are used by, with their docstrings."""
    top = importlib.import_module("llmembed")
    yield f"# Python\n\n{_prose(top.__doc__ or '')}\n"
    for package in _PACKAGES:
        module = importlib.import_module(package)
        yield f"## {package}\n\n{_prose(module.__doc__ or '')}\n"
        for name in module.__all__:
            yield from _entry(name, getattr(module, name))


def _entry(name: str, thing: Any) -> Iterator[str]:
    doc = _prose(inspect.getdoc(thing) or "")
    yield f"### {name}\n"
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        yield f"{doc}\n"
        docs = field_docs(thing)
        for field in dataclasses.fields(thing):
            given = field.default is not dataclasses.MISSING
            default = f" = {field.default!r}" if given else ""
            yield f"- `{field.name}: {field.type}{default}` {_escaped(docs.get(field.name, ''))}"
        yield ""
    else:
        yield f"{_signature(name, thing)}\n{doc}\n"
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        what = getattr(value, "__func__", value)  # of a classmethod
        is_property = isinstance(value, property | functools.cached_property)
        if member.startswith("_") or not (is_property or inspect.isfunction(what)):
            continue
        signature = "" if is_property else _signature(member, what)
        yield f"#### {name}.{member}\n\n{signature}\n{_prose(inspect.getdoc(what) or '')}\n"


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(str(parameter))
    if parts[:1] == ["self"]:
        del parts[0]
    returned = signature.return_annotation
    ending = "" if returned in (signature.empty, "None") else f" -> {returned}"
    line = f"{name}({', '.join(parts)}){ending}"
    if len(line) > 88:
        line = f"{name}(\n    " + ",\n    ".join(parts) + f",\n){ending}"
    line = re.sub(r"(: |-> )'([^']*)'", r"\1\2", line)  # annotations are kept as strings
    return f"```python\n{line}\n```\n"


def _prose(doc: str) -> str:
    r"""Turn a docstring in Google's style into Markdown.

    >>> print(_prose("Read.\n\nArgs:\n    n: how\n        many."))
    Read.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - `n`: how many.
    """
    parts: list[str] = []
    for block in doc.strip().split("\n\n"):
        head, _, rest = block.partition("\n")
        if head in _SECTIONS:
            items = re.sub(r"\n +", " ", textwrap.dedent(rest)).splitlines()
            named = (re.sub(r"^(\w+)(?=: )", r"`\1`", _escaped(item)) for item in items)
            parts += [f"**{head[:-1]}**", "\n".join(f"- {item}" for item in named)]
        elif block.startswith(">>>"):
            parts.append(f"```pycon\n{block}\n```")
        else:
            parts.append(_escaped(block))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """Let `<` outside of code be no tag."""
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", text)
