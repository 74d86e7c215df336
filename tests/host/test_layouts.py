"""The same student, teacher and data give the same losses, whatever tensor and pipeline parallelism they run in."""

from pathlib import Path

import pytest
from launch import run_job, scalars

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
LOSSES = ("lm loss", "kd loss", "total loss")
METRICS = ("teacher lm loss", "kl to teacher", "teacher entropy", "student entropy", "top-1 agreement")


@pytest.fixture(scope="module")
def runs(workspace: Path, config: Path, teacher: Path, student: Path) -> dict[tuple[int, int], dict[str, list[float]]]:
    found = {}
    for tensor, pipeline in LAYOUTS:
        tensorboard = workspace / f"tp{tensor}pp{pipeline}"
        overrides = {
            "megatron.tensor-model-parallel-size": tensor,
            "megatron.pipeline-model-parallel-size": pipeline,
            "megatron.load": student,
            "megatron.finetune": "true",
            "megatron.tensorboard-dir": tensorboard,
            "teacher.load": teacher,
        }
        run_job("distill", config, overrides, num_ranks=tensor * pipeline)
        found[tensor, pipeline] = scalars(tensorboard)
    return found


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_losses_and_gradients_equal_those_of_one_rank(runs: dict, layout: tuple[int, int]) -> None:
    for name in (*LOSSES, *METRICS, "grad-norm"):
        assert len(runs[layout][name]) == 5
        assert runs[layout][name] == pytest.approx(runs[1, 1][name], rel=1e-4), name


def test_the_report_is_what_is_trained(runs: dict) -> None:
    one = runs[1, 1]
    assert one["total loss"] == pytest.approx(
        [lm + kd for lm, kd in zip(one["lm loss"], one["kd loss"], strict=True)], rel=1e-6
    )
    assert one["kd loss"][-1] < one["kd loss"][0]
    assert all(0 <= share <= 1 for share in one["top-1 agreement"])
    for name in (*LOSSES, *METRICS):
        assert len(one[f"{name} validation"]) == 2, "the validation and the test split report the same numbers"
    # Cross entropy to the teacher is entropy + KL, and so is never below the teacher's entropy.
    assert all(kl > 0 for kl in one["kl to teacher"])


def test_bf16_stays_near_fp32(runs: dict, workspace: Path, config: Path, teacher: Path, student: Path) -> None:
    tensorboard = workspace / "bf16"
    overrides = {
        "megatron.bf16": "true",
        "megatron.tensor-model-parallel-size": 2,
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.load": student,
        "megatron.finetune": "true",
        "megatron.tensorboard-dir": tensorboard,
        "teacher.load": teacher,
    }
    run_job("distill", config, overrides, num_ranks=4)
    found = scalars(tensorboard)
    for name in (*LOSSES, "teacher lm loss", "teacher entropy", "student entropy"):
        assert found[name] == pytest.approx(runs[2, 2][name], rel=0.02), name
        assert found[name] != runs[2, 2][name]
