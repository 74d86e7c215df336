"""The recipe for custom loops in docs/training.md trains."""

from pathlib import Path

import pytest
from launch import launch, scalars
from test_neutrality import stock_arguments

JOB = Path(__file__).with_name("recipe_job.py")


@pytest.mark.parametrize("pipeline", [1, 2])
def test_the_recipe_trains(workspace: Path, config: Path, teacher: Path, pipeline: int) -> None:
    out = workspace / "recipe" / str(pipeline)
    words = stock_arguments(config, tensorboard_dir=out, train_iters=3, pipeline_model_parallel_size=pipeline)
    for rank in launch([JOB, teacher, *words], pipeline):
        assert rank.code == 0, rank.output[-6000:]
    logged = scalars(out)
    assert len(logged["kd loss"]) == 3 and all(loss > 0 for loss in logged["kd loss"])
    assert logged["total loss"] == pytest.approx(
        [0.5 * lm + kd for lm, kd in zip(logged["lm loss"], logged["kd loss"], strict=True)], rel=1e-5
    )
