"""What docs/soak.md shows of the long run is what was sampled; a straight line through samples is what it says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import soak

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text())


def test_the_page_shows_the_samples() -> None:
    found = {
        name: [{rank: soak.summary(samples) for rank, samples in part.items()} for part in parts]
        for name, parts in RESULTS["samples"].items()
    }
    assert found == RESULTS["summary"]
    assert soak.table(found) in (ROOT / "docs" / "soak.md").read_text()


def test_growth_is_seen() -> None:
    def sample(step: int) -> dict[str, float]:
        return {"step": step, "seconds": 0.1, **dict.fromkeys(soak.COUNTS, 7), "tensors": 100 + 2 * step}

    found = soak.summary([sample(step) for step in range(100, 1100, 100)])
    assert found["steps"] == {"start": 300, "end": 1000}
    assert found["tensors"] == {"start": 700, "end": 2100, "slope": pytest.approx(2000)}
    assert found["threads"] == {"start": 7, "end": 7, "slope": pytest.approx(0)}
    assert "700 -> 2,100" in soak.table({"job": [{"0": found}]})


def test_the_heap_has_what_no_garbage_collector_sees() -> None:
    before = soak.heap_in_use()
    kept = bytearray(2**24)
    assert soak.heap_in_use() - before >= len(kept)


def test_the_picture(tmp_path: Path) -> None:
    soak.draw(RESULTS["samples"], tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000
