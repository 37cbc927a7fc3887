"""Windows and macOS: nothing that they lack is used unasked, and the whole way goes without it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from as_on_windows import MISSING_MODULES, MISSING_NAMES
from toy_model import save_toy_model, write_two_topics
from whole_way import whole_way

ROOT = Path(__file__).parents[1]
PRODUCT = [
    path
    for folder in ("cache_format", "extract", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
EVERYTHING = [*PRODUCT, *sorted((ROOT / "benchmarks").rglob("*.py"))]
MAPS_BY_LIBC = ROOT / "cache_format" / "stores" / "mapping.py"
"""Its callers ask `can_map`, which asks for the system."""
ASKS = ("hasattr(", "getattr(", "sys.platform", "os.name")
BINARY_OPENERS = (["os"], ["zarr"], ["safetensors"])


def parts(path: Path) -> Iterator[tuple[str, list[ast.AST]]]:
    """Give functions, methods and other statements of a file, as text and as nodes."""
    for outer in ast.parse(path.read_text(encoding="utf-8")).body:
        for part in outer.body if isinstance(outer, ast.ClassDef) else [outer]:
            yield ast.unparse(part), list(ast.walk(part))


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow
def test_the_whole_way_goes_without_what_windows_lacks(tmp_path: Path) -> None:
    """Every module is imported, and features and probabilities are the same bit for bit."""
    write_two_topics(tmp_path)
    model = save_toy_model(tmp_path / "toy")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    given = (model, tmp_path / "topics")
    script = Path(__file__).parent / "support" / "whole_way.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "there", *given],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == whole_way(tmp_path / "here", *given)


@pytest.mark.parametrize("path", EVERYTHING, ids=by_name)
def test_modules_that_windows_lacks_are_imported_with_a_way_out(path: Path) -> None:
    """Nobody imports fcntl, resource and the like, but where ImportError is caught."""
    for text, nodes in parts(path):
        names: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
        assert not names & MISSING_MODULES or "except ImportError" in text


@pytest.mark.parametrize("path", PRODUCT, ids=by_name)
def test_names_that_windows_lacks_are_asked_for(path: Path) -> None:
    """Who uses os.preadv, mmap.PROT_READ or the C library asks for it or for the system first."""
    for text, nodes in parts(path):
        if path == MAPS_BY_LIBC or any(word in text for word in ASKS):
            continue
        assert "ctypes.CDLL(None" not in text
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in MISSING_NAMES.get(node.value.id, ()), f"line {node.lineno}"


@pytest.mark.parametrize("path", PRODUCT, ids=by_name)
def test_text_files_are_utf_8_on_every_system(path: Path) -> None:
    """Who opens a file of text names its encoding, which on Windows would be another."""
    for _, nodes in parts(path):
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            assert not opens_text(call), f"line {call.lineno}: {ast.unparse(call)}"


def opens_text(call: ast.Call) -> bool:
    """Tell whether a call opens a file of text and does not name its encoding."""
    named = {key.arg: ast.unparse(key.value) for key in call.keywords}
    *owner, name = ast.unparse(call.func).rsplit(".", 1)
    if "encoding" in named or owner in BINARY_OPENERS:
        return False
    given = call.args[0 if owner else 1 :]
    mode = named.get("mode", ast.unparse(given[0]) if given else "")
    return name in {"read_text", "write_text"} or (name == "open" and "b" not in mode)
