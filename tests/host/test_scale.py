"""What ranks start for the teacher in a real job of four CPU ranks, beside what `benchmarks/scale.py` counts alone.

Proves: the same collectives and messages a step, by kind, group and bytes, on every kind of rank, with the teacher in
the student's layout and in one of its own; as many process groups; the sizes that docs/scale.md has formulas for.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from launch import ROOT, launch

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import scale as benchmark


def run(name: str, folder: Path) -> list[dict]:
    teacher, ranks = folder / "teacher", benchmark.CASES[name]["ranks"]
    for words, number in (
        (["-m", "abkd_megatron", "pretrain", *benchmark.teacher_settings_of(name, teacher)], 1),
        ([benchmark.__file__, "--rank", folder, "distill", *benchmark.settings_of(name, teacher)], ranks),
    ):
        ended = launch(words, number, plain=True)
        assert all(rank.code == 0 for rank in ended), ended[-1].output[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("name", benchmark.SMALL)
def test_a_rank_alone_starts_what_it_starts_beside_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run(name, tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # In a process of its own, which gets the stand-in for a GPU for good.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = pool.submit(benchmark.counted, [name]).result()
    assert len(rows) >= 2
    for row in rows:
        there = real[row["rank"]]
        ours = [[it for it in of["step"] if it[0] != "Megatron's"] for of in (row, there)]
        assert ours[0] == ours[1] and ours[0], row["kind"]
    layout = benchmark.layout_of(name)
    assert [of["groups"][0] for of in real] == [layout["groups"]] * len(real)
    assert layout["own"] in [of["groups"][1] for of in real]
    if not benchmark.CASES[name]["teacher"].get(benchmark.TP):
        sizes = benchmark.CASES[name]["student"], benchmark.CASES[name]["teacher"]
        tokens = sizes[0]["micro-batch-size"] * benchmark.memory.COMMON["seq-length"]
        message = tokens * sizes[1]["hidden-size"] * 4
        assert benchmark.of_micro_batch(rows[0], "teacher's messages") == (1, message)
        assert rows[-1]["waiting"] == message
