from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmembed.extract.cli import main
from llmembed.extract.config import ExtractConfig


@pytest.fixture
def arguments(llama: Path, write_csv: Any, tmp_path: Path) -> list[str]:
    dataset = write_csv()
    return [
        *("--model", str(llama), "--layers", "1:4", "--dataset", str(dataset)),
        *("--max-length", "16", "--cache", str(tmp_path / "c.zarr")),
    ]


def test_every_field_of_the_config_is_an_option_with_its_default() -> None:
    """Options and dataclass fields cannot drift apart."""
    options = {parameter.name: parameter for parameter in main.params}
    for field in dataclasses.fields(ExtractConfig):
        option = options.pop(field.name)
        assert option.help
        if field.default is dataclasses.MISSING:
            assert option.required
        elif not option.multiple:
            assert option.default == field.default
    assert set(options) == {"as_json", "quiet", "debug", "version"}


def test_the_result_is_one_json_document_on_stdout(arguments: list[str]) -> None:
    """Progress stays on stderr, so stdout can be piped."""
    result = CliRunner().invoke(main, [*arguments, "--pooling", "mean,max", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["n_rows"], summary["layers"]) == ({"train": 150}, [1, 2, 3])
    assert summary["poolings"] == ["mean", "max"]


def test_a_known_error_is_one_line_and_exit_1(arguments: list[str], tmp_path: Path) -> None:
    """No traceback, nothing on stdout, nothing half-written."""
    result = CliRunner().invoke(main, [*arguments, "--layers", "9"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: layer 9 does not exist in toy-llama")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "c.zarr").exists()


def test_bad_usage_is_exit_2(arguments: list[str]) -> None:
    """An option that does not exist, or a value of another type."""
    assert CliRunner().invoke(main, [*arguments, "--no-such-option"]).exit_code == 2
    assert CliRunner().invoke(main, [*arguments, "--max-length", "many"]).exit_code == 2


def test_ctrl_c_is_exit_130_and_says_how_to_resume(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption ends in one line."""

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmembed.extract.pipeline.extract", interrupted)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 130
    assert "run the same command again to go on" in result.stderr


def test_help_imports_no_heavy_package() -> None:
    """`--help` answers without torch."""
    code = (
        "import sys; from llmembed.extract.cli import main; main(['--help'], standalone_mode=False)"
        "; assert not {'torch', 'transformers', 'lightning', 'zarr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
