"""The LM head's benchmark at a tiny size, on one rank: it measures what it says.

Proves: a row for every contestant, and for what cannot run, in table and picture; gradients that agree, and one that
does not is seen; a fused head's peak below one with logits; ranks and ratios put together as said; the model on paper
against numbers worked out by hand, and the chunk it asks for. Nothing here depends on how long anything takes.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abkd_megatron import kernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    import head as benchmark

SETTINGS = benchmark.Settings(1, tokens=16, vocab=256, hidden=8, teacher_hidden=12, chunk=4, rounds=1)
WAYS = [benchmark.MATERIALIZED, benchmark.IN_PLACE, benchmark.IN_FORWARD, benchmark.RECOMPUTED]
NAMES = [benchmark.AUTOGRAD, *WAYS]


@pytest.fixture(scope="module", autouse=True)
def eager():
    before = kernels.use("eager")  # cpp takes its time to compile
    yield
    kernels.use(before)


@pytest.fixture(scope="module")
def of_run():
    rows = benchmark.finish(SETTINGS, [benchmark.measure(SETTINGS)])
    return {**dataclasses.asdict(SETTINGS), "rows": rows}


def test_every_contestant_has_a_row(of_run):
    assert [row["name"] for row in of_run["rows"]] == NAMES
    assert all(len(row["seconds"]) == 1 and row["x materialized"] > 0 for row in of_run["rows"])
    text = benchmark.table(of_run)
    assert all(f"\n{name:30}" in text for name in NAMES) and "only indicate" not in text
    assert "only indicate" in benchmark.table({**of_run, "tensor_parallel": 10**6})
    assert json.loads(json.dumps(of_run)) == of_run


def test_gradients_agree_and_memory_is_less(of_run):
    of = {row["name"]: row for row in of_run["rows"]}
    assert all(row["error"] < 1e-5 and row["outputs"] == 4 * 8 * (16 + 256) for row in of.values())
    assert of[benchmark.MATERIALIZED]["error"] == 0.0
    for name in (benchmark.IN_FORWARD, benchmark.RECOMPUTED):
        assert of[name]["outputs"] < of[name]["peak"] < of[benchmark.MATERIALIZED]["peak"]
        assert of[name]["predicted"] == 2 * 4 * 256 * 4 + 4 * 8 * (16 + 256)
        assert of[name]["peak / predicted"] == of[name]["peak"] / of[name]["predicted"]


def test_a_wrong_gradient_is_seen(monkeypatch):
    def off(case):
        return 1.01 * benchmark.materialized(False)(case)

    monkeypatch.setattr(benchmark, "contestants", lambda settings: {"off": off})
    (row,) = benchmark.measure(dataclasses.replace(SETTINGS, rounds=0))
    assert row["error"] == pytest.approx(0.01, rel=1e-3) and "seconds" not in row


def test_the_peak_counts_what_an_action_makes():
    before = torch.ones(1000)

    def action():
        return (before * 2.0 * 2.0).sum()

    for _ in range(2):  # a measurement leaves nothing behind for the next
        result, peak = benchmark.with_peak(action)
        assert result == 4000 and 8000 <= peak <= 8192


def test_ranks_share_the_case_of_one():
    whole = benchmark.Case.random(SETTINGS, 0, None)
    halves = [benchmark.Case.random(dataclasses.replace(SETTINGS, tensor_parallel=2), rank, None) for rank in (0, 1)]
    for name in ("student_weight", "teacher_weight"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    assert all(torch.equal(half.student_hidden, whole.student_hidden) for half in halves)
    assert all(torch.equal(half.labels, whole.labels) and torch.equal(half.mask, whole.mask) for half in halves)
    assert 0 < whole.mask.mean() < 1


def test_ranks_and_ratios():
    def rank(times, peak):
        return [
            {"name": benchmark.AUTOGRAD, "why": "because"},
            {"name": benchmark.MATERIALIZED, "seconds": [2.0, 2.0, 4.0], "peak": peak, "error": 0.0},
            {"name": benchmark.IN_FORWARD, "seconds": times, "peak": 1, "error": 1e-7},
        ]

    absent, base, row = benchmark.finish(SETTINGS, [rank([1.0, 5.0, 3.0], 100), rank([3.0, 1.0, 3.0], 300)])
    assert absent == {"name": benchmark.AUTOGRAD, "why": "because"}
    assert base["peak"] == 300 and base["x materialized"] == 1.0
    assert row["seconds"] == [3.0, 5.0, 3.0] and (row["median"], row["min"], row["max"]) == (3.0, 3.0, 5.0)
    assert row["x materialized"] == 1.5


def test_what_cannot_run_keeps_its_row(of_run, tmp_path):
    of_two = benchmark.contestants(dataclasses.replace(SETTINGS, tensor_parallel=2))
    of_many = benchmark.contestants(dataclasses.replace(SETTINGS, tokens=2**20))
    assert list(of_two) == list(of_many) == NAMES
    for of in (of_two, of_many):
        assert [name for name, head in of.items() if isinstance(head, str)] == [benchmark.AUTOGRAD]
    absent = {"name": benchmark.AUTOGRAD, "why": of_two[benchmark.AUTOGRAD]}
    other = {**of_run, "vocab": 512, "tokens": 32, "rows": [absent, *of_run["rows"][1:]]}
    assert "cannot run: needs the whole vocabulary" in benchmark.table(other)
    pytest.importorskip("matplotlib")
    benchmark.picture({"vocab": [of_run, other], "tokens": [of_run, other]}, tmp_path / "head.png")
    assert (tmp_path / "head.png").stat().st_size > 10_000


def test_paper_by_hand():
    # 8 columns a rank; 2 * (2 + 4) * 8 operations for a token's logits, 4 * 2 * 8 for its gradients.
    of = benchmark.paper(h=2, H=4, vocab=16, tensor_parallel=2, tokens=10, chunk=5)
    assert list(of) == WAYS
    assert [way["flops"] for way in of.values()] == [160, 160, 160, 256]
    assert [way["logits"] for way in of.values()] == [480, 320, 320, 320]
    # Gradients of hidden states 40, of weight 64 in fp32 and 32 in bf16: 4 chunks and all of that; 2 are less than 4.
    assert [way["peak"] for way in of.values()] == [480, 320, 320 + 40 + 64 + 32, 320]
    # Weights: 96 + 32 + 128, the first twice if recomputed. A token: 32 of logits, 12 of hidden states, likewise, then
    # 32 of their gradient, 4 of hidden states and 4 of theirs. A chunk's part of the weight's gradient: 2 * 32.
    assert [way["traffic"] for way in of.values()] == [256 + 840, 256 + 840, 256 + 420 + 64, 352 + 640 + 64]
    assert of[benchmark.IN_FORWARD]["intensity"] == 5 * 160 / 740
    better = benchmark.paper(2, 4, 16, 2, 10, 5, accumulating=True)
    assert [way["peak"] for way in better.values()] == [480, 320, 320 + 40 + 64, 320]
    assert [way["traffic"] for way in better.values()] == [256 + 840, 256 + 840, 256 + 420, 352 + 640]
    alone = benchmark.paper(2, 4, 16, 1, 10, 5, bytes_per_element=4)
    assert [way["logits"] for way in alone.values()] == [1920, 1280, 640, 640]  # one rank keeps one chunk
    assert [way["peak"] for way in alone.values()] == [1920, 1280, 640 + 208, 640 + 208]


def test_the_smallest_chunk_is_the_smallest():
    def intensity(chunk):
        return benchmark.paper(4096, 8192, 129024, 8, 8192, chunk)[benchmark.IN_FORWARD]["intensity"]

    found = [benchmark.smallest_chunk(4096, 8192, 129024, 8, ridge) for ridge in (50, 100, 200, benchmark.RIDGE, 600)]
    assert found == sorted(found) and found[0] == 128 < found[-1]
    assert all(chunk % 128 == 0 for chunk in found)
    assert intensity(found[3]) >= benchmark.RIDGE > intensity(found[3] - 128)
    assert benchmark.smallest_chunk(4096, 8192, 129024, 8, ridge=1e6) is None


def test_the_command_line_writes_what_it_prints(tmp_path):
    sizes = {"tokens": 8, "vocab": 64, "chunk": 3, "rounds": 1, "tensor-parallel": 1}
    command = [sys.executable, BENCHMARKS / "head.py", "--no-picture", "--out", tmp_path / "new"]
    command += [f"--{name}={value}" for name, value in sizes.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "new" / "head.json").read_text())
    (of_run,) = written["runs"]
    assert benchmark.table(of_run) in done.stdout and (of_run["chunk"], of_run["tokens"]) == (3, 8)
    assert [record["as it is"]["smallest chunk"] for record in written["paper"]] == [640, 640]
    assert [record["accumulating"]["smallest chunk"] for record in written["paper"]] == [512, 512]
