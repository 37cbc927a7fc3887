"""Every line of the table has a test, and every test of a fault has a line."""

from __future__ import annotations

import ast
from pathlib import Path

from fault_lines import LINES


def test_every_fault_has_a_test_of_its_own() -> None:
    """The lines that tests name are the lines of the table, all of them."""
    named = {
        argument.value
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    assert named == set(LINES)
