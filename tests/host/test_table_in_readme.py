"""The README's table says what the host tests have found; the last of them by name, so that they have run."""

import os

import pytest
from matrix import README, RESULTS, ROWS, render, replace_table
from test_sequences import PLACES


def test_the_table_is_what_was_found() -> None:
    wanted = {(row.feature, "" if row.refused else row.where) for row in ROWS} | set(PLACES)
    if RESULTS.keys() != wanted:
        pytest.skip("needs all of test_matrix.py and test_sequences.py")
    readme = README.read_text()
    found = replace_table(readme, render(RESULTS))
    if os.environ.get("WRITE_README"):
        README.write_text(found)
    else:
        assert readme == found, "README.md's table is not what was found; WRITE_README=1 writes it anew"
