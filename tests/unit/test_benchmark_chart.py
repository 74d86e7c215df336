"""README's chart and its numbers come from the results of the benchmarks."""

from pathlib import Path

import pytest
from pages import ROOT

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import chart


def test_the_readme_has_the_measured_memory() -> None:
    _, materialized, fused = chart.memory().values()
    readme = (ROOT / "README.md").read_text()
    assert f"{fused:.0f} MiB" in readme and f"{materialized:.0f}" in readme


def test_the_chart_has_six_bars(tmp_path: Path) -> None:
    assert len(chart.memory()) + len(chart.time()) == 6
    chart.draw(tmp_path / "chart.png")
    pixels = pytest.importorskip("matplotlib.image").imread(tmp_path / "chart.png")
    assert pixels.std() > 0.05  # not blank
