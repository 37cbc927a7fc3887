"""Facts about the modules of the package as such."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import llmembed.cache_format

MODULES = [module.name for module in pkgutil.iter_modules(llmembed.cache_format.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    """Every worked example gives what it shows."""
    module = importlib.import_module(f"llmembed.cache_format.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("command", [[], ["info"], ["verify"], ["convert"], ["merge"]])
def test_help_imports_no_heavy_package(command: list[str]) -> None:
    """So it answers at once."""
    code = (
        "import sys; from llmembed.cache_format.cli import main\n"
        "try: main()\n"
        "finally: assert not {'numpy', 'zarr', 'h5py', 'torch'} & set(sys.modules)"
    )
    arguments = [sys.executable, "-c", code, *command, "--help"]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert "Usage:" in result.stdout


def test_the_package_imports_no_torch() -> None:
    """What lies on disk needs neither torch nor transformers."""
    names = ", ".join(f"llmembed.cache_format.{name}" for name in MODULES)
    code = f"import sys, {names}\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
