"""docs/trust.md: every guarantee names test files that have tests."""

import ast
import re
from pathlib import Path

import pytest
from pages import DOCS

TABLE = [line for line in (DOCS / "trust.md").read_text().splitlines() if line.startswith("| ")][1:]


def names_of_tests(file: Path) -> list[str]:
    """Return the names of a file's test functions."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.split("|")[1].strip()[:50])
def test_a_guarantee_names_tests(line: str) -> None:
    files = re.findall(r"\]\((\.\./tests/\S+?\.py)\)", line.split("|")[3])
    assert files and all(names_of_tests(DOCS / file) for file in files)
