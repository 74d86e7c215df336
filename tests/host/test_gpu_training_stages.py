"""The training stages of `make gpu`, tiny and on CPU ranks over gloo: they run, and see what they are to see.

On a GPU they run as they stand there, with `device: cuda`, NCCL and larger models.
"""

import sys
from dataclasses import replace

import pytest
from launch import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import gpu
finally:
    sys.path.pop(0)

TWO = gpu.Machine("cpu", ("a", "b"))
STAGES = {stage.name: stage for stage in gpu.stages()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, gpu.Outcome]:
    """Of a run with one stage on two ranks, and of one that trains another loss than one rank did."""
    two = STAGES["train TP 2"]
    wrong = replace(two, name="wrong", words=(*two.words, "distillation.alpha=0.9"))
    work = tmp_path_factory.mktemp("gpu stages")
    chosen = [*gpu.choose(["train TP 2"]), wrong]
    return {one.name: one for one in gpu.run_all(chosen, TWO, 500, work, "tiny")}


def test_one_rank_trains_with_a_fused_head(outcomes: dict[str, gpu.Outcome]) -> None:
    assert outcomes["data"].result == "passed", outcomes["data"]
    one = outcomes["train local"]
    assert one.result == "passed", one
    steps = one.numbers["steps"]
    assert len(steps["kd loss"]) == len(steps["grad norm"]) == 3 and steps["kd loss"][-1] < steps["kd loss"][0]


def test_two_ranks_are_held_to_one(outcomes: dict[str, gpu.Outcome]) -> None:
    two = outcomes["train TP 2"]
    assert two.result == "passed" and max(two.numbers["largest differences"].values()) <= 2e-2, two


def test_another_loss_is_seen(outcomes: dict[str, gpu.Outcome]) -> None:
    assert outcomes["wrong"].result == "failed"
    assert "kd loss differs from one GPU's by" in outcomes["wrong"].why
