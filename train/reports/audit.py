"""An audit as lines for a terminal, as a csv and as a page.

Names and texts are data: a terminal gets their control characters escaped, the page shows them
escaped and cut, the csv holds them as they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmembed.common.errors import ConfigError, shown
from llmembed.common.replace import check_outside, write_files
from llmembed.train.reports.page import render, short
from llmembed.train.runs.answers import defused

TABLE_FILE, PAGE_FILE = "audit.csv", "audit.html"
NOTE = (
    "score: 1 is sure that another class is right, 0.5 can't tell it from the given one; label: "
    "the row is of another class with confidence (confident learning, on rows held out); doubt: "
    "another class is likelier, though not with confidence; duplicate: the text stands there with "
    "another label; outlier: far from the mean of every class"
)
_COLUMNS = ("split", "row", "given", "suggested", "score", "reasons", "same_text", "distance")
_MOST_LINES = 20
_MOST_PAGE_ROWS = 500
_MOST_CHARACTERS = 60  # of a text or name on a terminal
_WHAT = {
    "label": "labels that look wrong",
    "doubt": "labels in doubt",
    "duplicate": "rows whose text has another label elsewhere",
    "outlier": "outliers",
}


def check_output(folder: Path) -> None:
    """Refuse a place where no folder can be, before anything is computed."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"--output {folder} is a file, and an audit writes a table and a page into a folder. "
            "Pass another --output."
        )
    check_outside(folder / TABLE_FILE)


def save_audit(folder: Path, document: Mapping[str, Any], *, defuses_formulas: bool) -> None:
    """Write the table and the page, each whole or not at all.

    Raises:
        RunStorageError: the disk failed or refused.
    """
    write_files(
        {
            folder / TABLE_FILE: _csv(document, defuses_formulas=defuses_formulas),
            folder / PAGE_FILE: audit_page(document),
        }
    )


def _csv(document: Mapping[str, Any], *, defuses_formulas: bool) -> str:
    columns = _COLUMNS if document["texts_missing"] else (*_COLUMNS, "text")
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in document["rows"]:
        cells = [_joined(row[name]) for name in columns]
        writer.writerow(map(defused, cells) if defuses_formulas else cells)
    return file.getvalue()


def _joined(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def audit_table(document: Mapping[str, Any]) -> str:
    """Lay out the counts, the classes and the first rows for a terminal."""
    lines = [f"{name:<44} {text}" for name, text in _figures(document)]
    for pair in document["classes"][:_MOST_LINES]:
        one, other = (_cut(name) for name in pair["classes"])
        lines.append(f"perhaps one class ({pair['overlap']:.2f}): {one} and {other}")
    heads = ("row", "score", "given", "suggested", "reasons", "text")
    rows = document["rows"]
    cells = [heads] + [_cells(row) for row in rows[:_MOST_LINES]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(heads))]
    lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)]
    if len(rows) > _MOST_LINES:
        lines.append(f"and {len(rows) - _MOST_LINES:,} more, in {TABLE_FILE}")
    return "\n".join([*lines, "", NOTE])


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    n_rows = document["n_rows"]
    yield "rows judged", f"{n_rows - document['n_alone']:,} of {n_rows:,}, {document['split']}"
    yield "accuracy on rows held out", f"{document['held_out_accuracy']:.4f}"
    for reason, n in document["n_flagged"].items():
        yield _WHAT[reason], f"{n:,}"
    yield "pairs of classes that may be one", f"{len(document['classes']):,}"
    if document["texts_missing"]:
        yield "texts", f"not shown: {document['texts_missing']}"


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    score = "-" if row["score"] is None else f"{row['score']:.4f}"
    names = (_cut(row["given"]), _cut(row["suggested"] or "-"), ", ".join(row["reasons"]))
    return (str(row["row"]), score, *names, _cut(row.get("text", "")))


def _cut(text: str) -> str:
    return shown(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…")


def audit_page(document: Mapping[str, Any]) -> str:
    """Lay out an audit as a page, of many rows the first."""
    rows = document["rows"][:_MOST_PAGE_ROWS]
    return render(
        "audit.html.j2",
        document=document,
        note=NOTE,
        figures=[(name, text, "") for name, text in _figures(document)],
        classes=[
            (*pair["classes"], *pair["n_rows"], *pair["n_seem_other"], pair["overlap"])
            for pair in document["classes"]
        ],
        heads=("row", "score", "given", "suggested", "reasons", "distance", "same text", "text"),
        rows=[
            (
                *(row["row"], row["score"], row["given"], row["suggested"] or ""),
                *(", ".join(row["reasons"]), row["distance"]),
                *(short(" ".join(map(str, row["same_text"]))), row.get("text", "")),
            )
            for row in rows
        ],
        n_left_out=len(document["rows"]) - len(rows),
        table_file=TABLE_FILE,
    )
