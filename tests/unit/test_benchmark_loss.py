"""The losses' benchmark at a tiny size, on one rank and without the peers: it measures what it says.

Proves: a row for every contestant, the limit, and whatever cannot run, in table and picture; no collectives of
ours on one rank; errors and bytes that hold for the losses themselves; ratios and ranks put together as said.
Nothing here depends on how long anything takes.
"""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from abkd_megatron import kernels

PATH = Path(__file__).parents[2] / "benchmarks" / "loss.py"
SPEC = importlib.util.spec_from_file_location("benchmark_loss", PATH)
benchmark = importlib.util.module_from_spec(SPEC)
sys.modules["benchmark_loss"] = benchmark
SPEC.loader.exec_module(benchmark)

SETTINGS = benchmark.Settings("fp32", tensor_parallel=1, tokens=8, vocab=512, rounds=2, peers=False)
OURS = [
    f"ours, eager: {loss}"
    for loss in ("alpha-beta + CE + metrics", "the same, in place", "forward KL", "ToDi", "both KLs + Jensen-Shannon")
]


@pytest.fixture(scope="module")
def rows():
    before = kernels.use("auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "BACKENDS", ("eager",))  # the others take their time to compile
        yield benchmark.finish([benchmark.measure(SETTINGS)])
    kernels.use(before)


def test_every_contestant_has_a_row(rows):
    names = [row["name"] for row in rows]
    assert set(OURS) < set(names) and names[-1] == benchmark.LIMIT
    assert names[:-1] == [contestant.name for contestant in benchmark.contestants(1, None, peers=False)]
    assert all(len(row["seconds"]) == SETTINGS.rounds and "x limit" in row for row in rows)
    text = benchmark.table(SETTINGS, rows)
    assert all(f"\n{name}  " in text for name in names)


def test_numbers_that_do_not_depend_on_the_machine(rows):
    of = {row["name"]: row for row in rows}
    nothing = {"collectives": 0, "bytes": 0}
    for name, row in of.items():
        if name == benchmark.LIMIT:
            continue
        assert row["forward"] == row["backward"] == nothing
        assert row["loss error"] < 1e-5 and row["gradient error"] < 1e-5
    # Both log-probabilities; 4 or 5 more of that size, of what backward needs or forward has at hand.
    assert 24 <= of["autograd, log space: alpha-beta"]["bytes per logit"] <= 40


def test_peak_bytes_counts_what_operators_make_and_not_the_input():
    batch = benchmark.Batch.random(4, 256, 256)

    def loss(student, teacher, labels):
        return (student * 2.0 * 2.0).sum((-1, -2))  # 2 products, then in backward 1 product of an expanded scalar

    for _ in range(2):  # a measurement leaves nothing behind for the next
        assert 8 * 4 * 256 <= benchmark.peak_bytes(loss, batch) <= 8 * 4 * 256 + 64


def test_what_cannot_run_keeps_its_row(rows, tmp_path):
    def fail(world_size):
        raise ImportError("no such package\nand more")

    contestant = benchmark.peer("a peer", fail, 1, None)
    assert contestant.loss is None and contestant.why == "ImportError: no such package"
    assert [c.why != "" for c in benchmark.contestants(2, None, peers=False)].count(True) == 2
    absent = {"name": "a peer", "why": contestant.why}
    assert "\na peer" in benchmark.table(SETTINGS, [*rows, absent])
    assert "cannot run: ImportError: no such package" in benchmark.table(SETTINGS, [*rows, absent])
    pytest.importorskip("matplotlib")
    run = {"dtype": "fp32", "tensor_parallel": 1, "tokens": 8, "vocab": 512, "rows": [*rows, absent]}
    benchmark.picture([run, run], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_ranks_and_ratios():
    def rank(times, error):
        return [
            {"name": benchmark.MEGATRON, "seconds": times, "bytes per logit": 1.0, "loss error": error},
            {"name": benchmark.LIMIT, "seconds": [1.0, 1.0, 1.0], "bytes per logit": 1.0},
            {"name": "absent", "why": "because"},
        ]

    first, limit, absent = benchmark.finish([rank([1.0, 5.0, 3.0], 0.1), rank([2.0, 2.0, 2.0], 0.3)])
    assert first["seconds"] == [2.0, 5.0, 3.0] and first["loss error"] == 0.3
    assert (first["median"], first["min"], first["max"]) == (3.0, 2.0, 5.0)
    assert first["x limit"] == 3.0 and first["x Megatron"] == 1.0 and "x ModelOpt" not in first
    assert limit["x Megatron"] == pytest.approx(1 / 3)
    assert absent == {"name": "absent", "why": "because"}


def test_an_error_is_seen():
    def halved(student, teacher, labels):
        return 0.5 * benchmark.log_space(student, teacher, labels)

    contestant = benchmark.Contestant("halved", halved, benchmark.dense(benchmark.AlphaBeta(0.2, 0.7)))
    found = benchmark.errors(contestant, benchmark.Batch.random(4, 64, 64), torch.float32, 0, 1)
    assert math.isclose(found["loss error"], 0.5, rel_tol=1e-4)
    assert math.isclose(found["gradient error"], 0.5, rel_tol=1e-4)
