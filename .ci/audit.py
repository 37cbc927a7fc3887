"""Fail if a pinned version has a known vulnerability; say so, and pass, where PyPI does not answer.

python .ci/audit.py constraints.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

IGNORED = {
    "CVE-2025-3000": "torch.jit.script, which nothing here calls; mended in torch 2.13",
    "CVE-2026-69112": "accelerate's load_checkpoint_in_model and load_checkpoint_and_dispatch, "
    "which nothing here calls; no version mends it",
}
"""Identifier of a vulnerability -> why it does not matter here; a test looks that it is so."""


def audit(pins: Path) -> int:
    """Ask pip-audit about the versions of a file, tell what it says, and give an exit code."""
    asked = subprocess.run(  # noqa: S603
        [
            *(sys.executable, "-m", "pip_audit", "--requirement", str(pins)),
            *("--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in asked.stdout.splitlines() if line.startswith("{")]
    if not lines:
        reason = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        return _tell(f"audit: the registry does not answer: {reason}. Nothing was checked.", 0)
    return _judge(json.loads(lines[-1])["dependencies"])


def _judge(found: list[dict[str, Any]]) -> int:
    answered = [one for one in found if "vulns" in one]
    if not answered:
        return _tell(
            f"audit: the registry says nothing of vulnerabilities, of none of {len(found)} "
            "packages. Nothing was checked.",
            0,
        )
    bad = [
        f"{one['name']} {one['version']}: {known['id']} {', '.join(known['aliases'])}, mended in "
        f"{', '.join(known['fix_versions']) or 'no version'}"
        for one in answered
        for known in one["vulns"]
        if not {known["id"], *known["aliases"]} & IGNORED.keys()
    ]
    unknown = [one["name"] for one in found if "vulns" not in one]
    said = f"audit: {len(answered)} versions asked for, {len(bad)} known vulnerabilities"
    said += f"; nothing is known of {', '.join(unknown)}" if unknown else ""
    return _tell("\n".join([*bad, said]), int(bool(bad)))


def _tell(text: str, code: int) -> int:
    print(text)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(audit(Path(sys.argv[1])))
