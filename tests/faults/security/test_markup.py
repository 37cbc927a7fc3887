"""What names and texts may do on a terminal, a page and in a spreadsheet: nothing."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_commands import EXTRACTED, done, extracted, refused
from toy_model import toy_texts

from llmembed.cache_format.cli import main as cache_main
from llmembed.extract.cli import main as extract_main
from llmembed.train.cli.audit import audit_main
from llmembed.train.cli.fit import fit_main
from llmembed.train.cli.predict import predict_main
from llmembed.train.cli.report import report_main
from llmembed.train.cli.sweep import sweep_main

Tries = Callable[[int], None]
HOSTILE = (
    "\x1b[2J\x1b[31mred\x07",
    "\x9b2J\u202eback",
    "two\nlines\r\nand a \x00",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "=cmd|' /C calc'!A0",
    "{{ 7*7 }}{% raw %}",
    "${HOME}$(id)`id`%s%n",
    "../../../etc/passwd",
    "a" * 3000,
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.fault("S2")
def test_names_and_texts_command_nothing(
    world: Path, tries: Tries, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ten hostile labels, texts and names through every command: escaped, and never markup."""
    rows = [
        {"text": f"{HOSTILE[k]} w{k} {text}", "label": HOSTILE[k], "=id": HOSTILE[-k]}
        for n, text in enumerate(toy_texts(120, longest=4))
        for k in [n % len(HOSTILE)]
    ]
    data = world / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outputs = [
        extracted("toy", data, "d.zarr", "--debug").output,
        done(extract_main, "--model", "toy", "--dataset", str(data), *EXTRACTED[:-1]).output,
        done(
            fit_main,
            *("--cache", "d.zarr", "--output", "named", "--store-texts"),
            *("--fusion", "concat", "--head", "ridge"),
        ).output,
        done(predict_main, "--run", "named", "--input", str(data), "--proba").output,
        done(predict_main, "--run", "named", "--input", str(data), "--json").output,
        done(predict_main, "--run", "named", "--text", HOSTILE[0], "--top-k", "10").output,
        done(report_main, "named", "--output", "page.html").output,
        done(report_main, "--cache", "d.zarr", "--output", "cache.html").output,
        done(audit_main, "--cache", "d.zarr", "--output", "audit", "--defuse-formulas").output,
        done(sweep_main, "--cache", "d.zarr", "--output", "sweep", "--layers", "1").output,
        done(cache_main, "info", "d.zarr").output,
        done(cache_main, "verify", "d.zarr").output,
        refused(extract_main, "--model", HOSTILE[0], "--dataset", str(data), "--layers", "1"),
        refused(extract_main, "--model", "toy", "--dataset", HOSTILE[0], "--layers", "1"),
        refused(fit_main, "--cache", HOSTILE[0]),
        refused(fit_main, "--cache", "d.zarr", "--fusion", HOSTILE[0]),
        refused(predict_main, "--run", HOSTILE[0], "--text", "w1"),
        refused(cache_main, "info", HOSTILE[0]),
        *capfd.readouterr(),
    ]
    for output in outputs:
        assert not OBEYED.findall(output.replace("\r\n", "\n")), output
    pages = [*world.rglob("*.html"), *world.rglob("*.svg")]
    assert len(pages) >= 4
    for page in pages:
        content = page.read_text(encoding="utf-8")
        assert not OBEYED.findall(content), page
        for markup in ("<script>alert", "<img src=x", "49{"):
            assert markup not in content, (page, markup)
    tries(len(outputs) + len(pages))


@pytest.mark.fault("S2")
def test_a_csv_to_open_in_a_spreadsheet_holds_no_formula(world: Path, tries: Tries) -> None:
    """With --defuse-formulas no cell, name of a column or label begins one."""
    begins = [f"{mark}cmd|' /C calc'!A0" for mark in ("=", "+", "-", "@", "'=", "a\t=")]
    with (world / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", *begins], *([one, *begins] for one in begins)])
    given = ["--run", "run", "--input", "in.csv", "--text-column", "text", "--output", "out.csv"]
    done(predict_main, *given, "--defuse-formulas")
    with (world / "out.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) > len(begins) ** 2
    assert not [one for one in cells if one.startswith(("=", "+", "-", "@", "\t", "\r"))]
    tries(len(cells))
