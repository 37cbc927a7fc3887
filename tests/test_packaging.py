"""What is installed: the import name, its lazy names, and all that the wheel must hold."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import llmembed

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache_format", "extract", "train")
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
API = ("ExtractConfig", "FitConfig", "LLMEmbedClassifier", "fit", "load_run", "open_cache")


def test_the_version_is_the_metadata_s() -> None:
    """`llmembed.__version__` is what pip shows."""
    assert llmembed.__version__ == version("llmembed-cache")


def test_everybody_gets_what_everybody_needs() -> None:
    """Ray, bitsandbytes, loggers and the tools of development are extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = {re.split(r"[<>=;\[ ]", one)[0] for one in project["dependencies"]}
    dev = {re.split(r"[<>=;\[ ]", one)[0] for one in project["optional-dependencies"]["dev"]}
    assert {"bitsandbytes", "ray", "wandb", "tensorboard", "moto"} <= dev - given
    assert given & dev == set()


def test_an_import_is_light() -> None:
    """`import llmembed`, its version and its configs import neither torch nor scikit-learn."""
    code = (
        "import sys, llmembed; llmembed.__version__; llmembed.FitConfig; llmembed.ExtractConfig\n"
        "assert not {'torch', 'sklearn', 'lightning', 'transformers', 'zarr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-Pc", code], check=True)


def test_the_python_api_stands_under_the_top_name() -> None:
    """`dir` lists what the API has, and each is what the package of its own gives."""
    assert {*API, *FOLDERS, "__version__"} == set(dir(llmembed)) == set(llmembed.__all__)
    assert llmembed.LLMEmbedClassifier is llmembed.train.LLMEmbedClassifier
    assert all(callable(getattr(llmembed, name)) for name in API)
    assert callable(llmembed.extract.extract)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    """As in any module."""
    with pytest.raises(AttributeError, match="module 'llmembed' has no attribute 'fti'"):
        llmembed.fti  # type: ignore[attr-defined] # noqa: B018


def folder_of(package: str) -> str:
    """Find the folder of a package by the nearest package above it that has a place of its own."""
    above, _, name = package.rpartition(".")
    return SETUP["package-dir"].get(package) or f"{folder_of(above)}/{name}"


def test_every_package_is_listed() -> None:
    """A folder that is not listed would be there in the editable install and not in the wheel."""
    found = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert {folder_of(name) for name in SETUP["packages"]} == found


@pytest.mark.slow
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    """Modules, markers, templates and the specification of the format are in the wheel, no more."""
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-Pc", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    expected = {
        "llmembed/" + path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".typed", ".md", ".j2", ".css", ".js"}
    }
    top = "llmembed/cache_format/llmembed/"
    expected = {f"llmembed/{name.removeprefix(top)}" if top in name else name for name in expected}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
