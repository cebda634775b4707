"""The budgets of the code: what grows past them gets a home of its own."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "raylhf"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def test_no_file_is_longer_than_its_budget():
    too_long = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not too_long


def test_no_function_is_longer_than_its_budget():
    too_long = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}"
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not too_long
