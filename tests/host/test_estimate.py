"""What `estimate` says of a job's memory, beside the real job on CPU ranks.

Proves: within 10 % of the tensors that the job's ranks hold at their peak, on every kind of rank, in fp32 and bf16,
with and without logits, through 1F1B and the interleaved schedule, of a HybridModel with experts and multi-token
prediction; the parameters a rank; and that the teacher's hidden states wait as the README's formula says.
"""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from launch import ROOT, launch

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    import estimate as benchmark


@pytest.mark.parametrize("name", benchmark.CASES)
def test_estimate_is_within_a_tenth_of_what_a_job_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, ranks = tmp_path / "teacher", benchmark.CASES[name][0]
    for words, number in (
        (["-m", "abkd_megatron", "pretrain", *benchmark.teacher_settings_of(name, teacher)], 1),
        ([benchmark.__file__, "--rank", tmp_path, "distill", *benchmark.settings_of(name, teacher)], ranks),
    ):
        ended = launch(words, number, plain=True)
        assert all(rank.code == 0 for rank in ended), ended[-1].output[-6000:]
    # In a process of its own, which gets the stand-in for a GPU for good.
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = pool.submit(benchmark.compared, name, benchmark.read(tmp_path, ranks)).result()
    assert len(rows) == benchmark.CASES[name][1].get("pipeline-model-parallel-size", 1)
    for row in rows:
        assert row["estimated"]["peak"] == pytest.approx(row["measured"]["peak"], rel=0.1), row
    waited = re.search(r"waited here, (\d+) bytes", ended[-1].output)
    assert waited is not None and rows[-1]["estimated"]["waiting"] == int(waited[1])
    if ranks == len(rows):
        student, teacher = (sum(of) for of in zip(*(row["estimated"]["parameters"] for row in rows), strict=True))
        if "multi-token prediction" in name:
            student -= 4096 * 256  # the last stage's copy of the embedding
        assert [student, teacher] == rows[0]["estimated"]["of all ranks"]
    if "VPP" in name:  # G * s * b * H numbers of 2 bytes, G micro-batches being the pipeline parallelism
        assert int(waited[1]) == 2 * 128 * 4 * 512 * 2
