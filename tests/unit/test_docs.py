"""What the documents show is what was measured: the comparison's table is written from its results."""

import json
from pathlib import Path

from abkd_megatron.compare import summarise, table

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_comparison_shows_its_results() -> None:
    results = json.loads((DOCS / "comparison.json").read_text())
    summary = summarise(results["runs"], list(results["summary"])[:-1])
    assert summary == results["summary"]
    assert table(summary) in (DOCS / "comparison.md").read_text()
    seeds = {run["seed"] for run in results["runs"]}
    assert len(seeds) >= 5 and len(results["runs"]) == len(seeds) * (len(summary) - 1)
    assert (DOCS / "comparison.png").stat().st_size > 50_000
