"""Known vulnerabilities: of the versions that are taken, none that can be reached."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from product_files import PRODUCT, ROOT

Tries = Callable[[int], None]
FIRST_FIXED = {
    "fastapi": ("0.109.1", "CVE-2024-24762: a regular expression without end for a header"),
    "grpcio": ("1.65.4", "CVE-2024-7246: headers of others behind a proxy"),
    "jinja2": ("3.1.6", "CVE-2025-27516: out of the sandbox by |attr"),
    "lightning": ("2.6.6", "CVE-2026-58659: code by a checkpoint's hyperparameters"),
    "numcodecs": ("0.16.6", "its pickle filter ran code on a plain open of Zarr v2"),
    "onnx": ("1.21", "CVE-2026-27489, CVE-2026-34447: links out of a model's folder"),
    "playwright": ("1.55.1", "CVE-2025-59288: browsers without a checked signature"),
    "protobuf": ("6.33.5", "CVE-2025-4565, CVE-2026-0994: recursion without end"),
    "pyarrow": ("23.0.1", "CVE-2026-25087: freed memory is read, of Arrow files"),
    "pydantic": ("2.4", "CVE-2024-3772: a regular expression without end"),
    "pytest": ("9.0.3", "CVE-2025-71176: others write to its folder in /tmp"),
    "ray": ("2.55", "CVE-2025-62593, CVE-2026-41486: code by a page, code by Parquet"),
    "scikit-learn": ("1.5", "CVE-2024-5206: words of the training texts are kept"),
    "setuptools": ("83.0.0", "CVE-2025-47273, CVE-2026-59890: files outside a folder, or too many"),
    "skops": ("0.13", "CVE-2025-54413, CVE-2025-54886: code by types that were not trusted"),
    "starlette": ("1.3.1", "CVE-2026-48710, CVE-2026-54283: forged hosts, forms without end"),
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747: code by weights_only=True"),
    "tqdm": ("4.66.3", "CVE-2024-34062: eval of options"),
    "transformers": ("5.10.0", "CVE-2026-5241, CVE-2026-9856: code and files of a repository"),
}
"""Package -> the first version without a known vulnerability, and which."""


def floors() -> dict[str, Version]:
    """The lowest version of each dependency that pyproject.toml takes."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    project, build = document["project"], document["build-system"]["requires"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    found = {}
    for requirement in map(Requirement, [*build, *project["dependencies"], *extras]):
        lowest = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        assert len(lowest) == 1, f"{requirement} has no floor"
        known = found.setdefault(requirement.name, lowest[0])
        assert known == lowest[0], f"{requirement.name} has two floors"
    return found


@pytest.mark.fault("S8")
def test_no_floor_has_a_known_vulnerability(tries: Tries) -> None:
    """Each dependency has one floor, which is at or above what was mended; so are the pins."""
    lowest = floors()
    for name, (fixed, what) in FIRST_FIXED.items():
        if name in lowest:
            assert lowest[name] >= Version(fixed), f"{name}: {what}"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for line in (line for line in pins if not line.startswith("#")):
        name, _, version = line.partition("==")
        fixed, what = FIRST_FIXED.get(name, ("0", ""))
        assert Version(version) >= Version(fixed), f"{name}: {what}"
        assert name not in lowest or Version(version) >= lowest[name], line
    tries(len(lowest) + len(pins))


@pytest.mark.fault("S8")
def test_nothing_calls_what_an_ignored_vulnerability_is_in(tries: Tries) -> None:
    """What the audit leaves out is out of reach, by the names that its reasons tell."""
    ignored = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["IGNORED"]
    for reason in ignored.values():
        called = re.findall(r"torch\.[a-z.]+\w|\w+_\w+", reason)
        assert called, reason
        for path in PRODUCT:
            text = path.read_text(encoding="utf-8")
            assert not [name for name in called if name in text], path
    tries(len(ignored) * len(PRODUCT))


@pytest.mark.fault("S8")
def test_the_audit_fails_on_what_is_known_and_passes_where_nobody_answers(
    capsys: pytest.CaptureFixture[str], tries: Tries
) -> None:
    """A known vulnerability fails it by name, an ignored one not, and silence is told."""
    audit = runpy.run_path(str(ROOT / ".ci" / "audit.py"))
    known = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
    bad = {"name": "thing", "version": "1.0", "vulns": [known]}
    good = {"name": "other", "version": "1.0", "vulns": []}
    unasked = {"name": "third", "version": "1.0", "skip_reason": "not found"}
    cases: tuple[tuple[list[Any], int, str], ...] = (
        ([good, bad], 1, "thing 1.0: PYSEC-1 CVE-1, mended in 2.0"),
        ([good, unasked], 0, "1 versions asked for, 0 known vulnerabilities; nothing is known of"),
        ([unasked], 0, "of none of 1 packages. Nothing was checked."),
    )
    for found, code, said in cases:
        assert audit["_judge"](found) == code
        assert said in capsys.readouterr().out
    audit["IGNORED"]["CVE-1"] = "not used here"
    assert audit["_judge"]([good, bad]) == 0
    assert all(audit["IGNORED"].values())
    tries(4)
