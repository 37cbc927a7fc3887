"""Every line of the table has a test, and every test of a fault has a line."""

from __future__ import annotations

import ast
from pathlib import Path

from fault_lines import LINES
from findings import FINDINGS


def test_every_fault_has_a_test_of_its_own() -> None:
    """The lines that tests name are the lines of the table, all of them."""
    named = {
        argument.value
        for path in Path(__file__).parent.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    assert named == set(LINES)


def test_every_finding_is_held_by_a_test() -> None:
    """Each is a test that is there."""
    root = Path(__file__).parents[2]
    for test in FINDINGS:
        path, _, name = test.partition("::")
        assert f"\ndef {name}(" in (root / path).read_text(encoding="utf-8"), test
