"""Each promise of docs/trust.md has tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_names_tests_that_are_there() -> None:
    table = [line for line in (ROOT / "docs/trust.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(table) > 8
    for line in table:
        files = re.findall(r"\(\.\./(tests/\S+?\.py)\)", line.split("|")[3])
        assert files, line
        for file in files:
            assert "def test_" in (ROOT / file).read_text(), file
