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


def test_the_chart_of_three_students(tmp_path: Path) -> None:
    found = chart.gains()
    page = (ROOT / "docs" / "comparison.md").read_text()
    for student, losses in found.items():
        for loss, gain in losses.items():
            (row,) = [line for line in page.splitlines() if line.startswith(f"| {student} | {loss} |")]
            assert f"{gain['mean']:.3f}".replace("-0.000", "0.000") in row
    chart.draw_regimes(tmp_path / "regimes.png")
    assert pytest.importorskip("matplotlib.image").imread(tmp_path / "regimes.png").std() > 0.05


def test_the_chart_of_longer_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    for of in chart.longer():
        for loss, found in of["summary"].items():
            if loss == "teacher":
                continue
            start = f"| {of['student']} | {of['teacher']} | {of['steps']} | {of['learning rate']:g} | {loss} |"
            (row,) = [line for line in page.splitlines() if line.startswith(start)]
            assert f"| {of['seeds']} | {found['cross entropy']['mean']:.3f} |" in row
    chart.draw_longer(tmp_path / "longer.png")
    assert pytest.importorskip("matplotlib.image").imread(tmp_path / "longer.png").std() > 0.05


def test_the_chart_has_six_bars(tmp_path: Path) -> None:
    assert len(chart.memory()) + len(chart.time()) == 6
    chart.draw(tmp_path / "chart.png")
    pixels = pytest.importorskip("matplotlib.image").imread(tmp_path / "chart.png")
    assert pixels.std() > 0.05  # not blank
