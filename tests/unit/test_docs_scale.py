"""The tables of docs/scale.md are what `benchmarks/scale.py` wrote, and its formulas give their numbers."""

import json

import pytest
from pages import ROOT

pytest.importorskip("megatron.training")

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale

REPORT = json.loads((ROOT / "benchmarks/results/scale.json").read_text())


def test_tables_are_the_results() -> None:
    assert "\n".join(scale.table(REPORT["counted"], REPORT["layouts"])) in (ROOT / "docs/scale.md").read_text()


def test_layouts_are_what_they_were() -> None:
    for found in REPORT["layouts"]:
        now = scale.layout_of(found["case"])
        assert {**now, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize("row", REPORT["counted"], ids=lambda row: f"{row['case']}, {row['kind']}")
def test_sizes_are_those_of_the_formulas(row: dict) -> None:
    case = scale.CASES[row["case"]]
    student, teacher = {**scale.memory.COMMON, **case["student"]}, case["teacher"]
    tokens = student["seq-length"] * student["micro-batch-size"] // student.get(scale.CP, 1)
    tensor = student.get(scale.TP, 1)
    scattered = tensor if student.get("sequence-parallel") else 1
    message = tokens * teacher["hidden-size"] * (2 if student.get("bf16") else 4) // scattered
    last = row["rank"] >= case["ranks"] - case["ranks"] // student.get(scale.PP, 1)
    if not teacher.get(scale.TP):  # the teacher lies as the student does
        passed_on = 1 if last or not row["rank"] else 2
        assert scale.of_micro_batch(row, "teacher's messages") == (passed_on, passed_on * message)
    assert row["waiting"] == (message if last else 0)
    times, size = scale.of_micro_batch(row, "loss")
    if last and 1 < tensor <= 16:
        assert size == tokens * 14 * 8
    elif not last:
        assert times == 0
