"""The registry: names of one kind, from the package itself, its users, and other packages."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from llmembed.common.errors import ConfigError
from llmembed.common.registry import Registry, loaded


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """Red is registered; the package `pens` brings blue, and should bring more."""
    registry: Registry[str] = Registry("pen colour", "llmembed.test")
    registry.register("red", "#ff0000")
    metadata = tmp_path / "pens-2.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pens\nVersion: 2.1\n")
    points = "blue = pens\ngreen = pens\npink = pens_that_are_not_there\nteal = pens:teal\n"
    (metadata / "entry_points.txt").write_text(f"[llmembed.test]\n{points}")
    source = "from box_of_pens import colours\ncolours.register('blue', '#0000ff')\n"
    (tmp_path / "pens.py").write_text(source)
    box = types.ModuleType("box_of_pens")
    box.colours = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "box_of_pens", box)
    monkeypatch.delitem(sys.modules, "pens", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return registry


def test_names_are_known_before_their_package_is_imported(colours: Registry[str]) -> None:
    """What is registered comes first, then what installed packages bring."""
    assert list(colours) == ["red", "blue", "green", "pink", "teal"]
    assert "blue" in colours
    assert "grey" not in colours
    assert "pens" not in sys.modules


def test_a_name_imports_its_package_when_it_is_used(colours: Registry[str]) -> None:
    """What the import registers is what the name stands for, and whose it is can be told."""
    assert colours["red"] == "#ff0000"
    assert "pens" not in sys.modules
    assert colours["blue"] == "#0000ff"
    assert colours.brought_by("blue") == "pens 2.1"
    assert colours.brought_by("red") is None


def test_an_unknown_name_is_told_with_those_that_exist(colours: Registry[str]) -> None:
    """A close match of a package's names is offered too."""
    with pytest.raises(ConfigError, match="pen colour 'bluu' does not exist; did you mean 'blue'"):
        colours["bluu"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("green", "does not register it"),
        ("pink", "cannot be imported: No module named 'pens_that_are_not_there'"),
        ("teal", "cannot be imported: module 'pens' has no attribute 'teal'"),
    ],
)
def test_a_package_that_does_not_bring_what_it_says_is_named(
    name: str, reason: str, colours: Registry[str]
) -> None:
    """The sentence says which package, why, and what else to pass."""
    with pytest.raises(ConfigError, match=f"{name!r} should come from pens 2.1, which {reason}.*"):
        colours[name]


def test_a_name_stands_for_one_thing(colours: Registry[str]) -> None:
    """The same registration twice is none too many; another one is refused."""
    colours.register("red", "#ff0000")
    with pytest.raises(ConfigError, match="pen colour 'red' is registered already"):
        colours.register("red", "#cc0000")


def test_a_home_is_the_thing_or_leads_to_it() -> None:
    """A string names the module and the name in it, which is imported then."""
    assert loaded("json:dumps")([1]) == "[1]"
    assert loaded(len) is len
