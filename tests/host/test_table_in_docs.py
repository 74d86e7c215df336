"""docs/parallelism.md has the table that the host tests have found; the last of them by name, so that they have run."""

import os

import pytest
from matrix import RESULTS, ROWS, TABLE, render, replace_table
from test_packed_data import PLACES as PACKED
from test_sequences import PLACES
from test_several_teachers import PLACES as BY_SOURCE


def test_the_table_is_what_was_found() -> None:
    wanted = {(row.feature, "" if row.refused else row.where) for row in ROWS} | set(PACKED)
    wanted |= set(PLACES) | set(BY_SOURCE)
    if RESULTS.keys() != wanted:
        pytest.skip("needs all of test_matrix.py, test_packed_data.py, test_sequences.py and test_several_teachers.py")
    document = TABLE.read_text()
    found = replace_table(document, render(RESULTS))
    if os.environ.get("WRITE_MATRIX"):
        TABLE.write_text(found)
    else:
        assert document == found, f"{TABLE.name} is not what was found; WRITE_MATRIX=1 writes it anew"
