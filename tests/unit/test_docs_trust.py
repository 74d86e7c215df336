"""README's promises of long runs: each has tests that are there, and numbers are those of the tables."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows(page: str) -> int:
    """Of all tables of a page, their headings aside."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return sum(line.startswith("| ") for line in lines) - sum(line.startswith("|---") for line in lines)


def test_every_promise_names_tests_that_are_there() -> None:
    table = [line for line in (ROOT / "docs/trust.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(table) > 8
    for line in table:
        files = re.findall(r"\(\.\./(tests/\S+?\.py)\)", line.split("|")[3])
        assert files, line
        for file in files:
            assert "def test_" in (ROOT / file).read_text(), file


def test_the_numbers_of_cases_are_those_of_the_tables() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"[{rows('bad-input.md')} cases](docs/bad-input.md)" in readme
    assert f"[{rows('faults.md')} faults](docs/faults.md)" in readme
