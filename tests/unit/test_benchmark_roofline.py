"""The predicted times in docs/costs.md are those that benchmarks/roofline.py computes from what was counted."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import roofline

    yield roofline
    del sys.modules["roofline"]


def test_the_table_is_in_the_documents(roofline):
    rows = json.loads(roofline.RESULTS.read_text())
    assert set(rows) == set(roofline.OURS)
    assert "\n".join(roofline.table(rows)) in (ROOT / "docs" / "costs.md").read_text()


def test_the_larger_of_memory_and_instructions(roofline):
    assert roofline.seconds(3.0, None, 1e12) == pytest.approx(1.0)
    assert roofline.seconds(3.0, 1.0, 1e12) == pytest.approx(1.0)
    limit = roofline.INSTRUCTIONS_PER_SECOND / roofline.BYTES_PER_SECOND
    assert roofline.seconds(1.0, 2 * limit, 1e12) == pytest.approx(2 * roofline.seconds(1.0, None, 1e12))
    row = {"bytes": {"record": 4, "gradient": 6}, "instructions": {"record": 0.0, "gradient": 0.0}}
    assert roofline.predicted(row, 3e11) == pytest.approx(1.0)
    assert roofline.predicted_of("a copy", 1.0) is None
    assert roofline.predicted_of("ours, triton: alpha-beta + CE + metrics", 1e9) > 0.0
