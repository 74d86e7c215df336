"""A distilled student is a plain student: Megatron without a teacher evaluates it and trains on."""

from pathlib import Path

import pytest
from launch import run_job, scalars
from test_neutrality import run_stock

from abkd_megatron.teacher.checkpoint import tensor_shapes

# No column is padding: Megatron's cross entropy counts padded ones in, and that of distillation does not.
LAYOUT = {"use_distributed_optimizer": "true", "make_vocab_size_divisible_by": 8}


def test_megatron_goes_on_without_the_teacher(workspace: Path, config: Path, teacher: Path) -> None:
    distilled = workspace / "distilled-student"
    start = {**LAYOUT, "train_iters": 3, "save": distilled, "save_interval": 3}
    settings = {f"megatron.{name.replace('_', '-')}": value for name, value in start.items()}
    settings |= {"megatron.tensorboard-dir": distilled / "tensorboard", "teacher.load": teacher}
    run_job("distill", config, settings)
    own = scalars(distilled / "tensorboard")

    saved = tensor_shapes(distilled / "iter_0000003")
    assert not [name for name in saved if "teacher" in name]
    widths = {size for shape in saved.values() for size in shape}
    assert 32 in widths and 48 not in widths, "the student's width, not the teacher's"

    # Every tensor that Megatron asks for has to be there; that no more is, test_neutrality.py holds.
    load = {**LAYOUT, "load": distilled, "dist_ckpt_strictness": "raise_unexpected"}
    evaluated, trained_on = workspace / "student-evaluated", workspace / "student-trained-on"
    run_stock(config, **load, train_iters=3, tensorboard_dir=evaluated)
    found = scalars(evaluated)
    assert found["lm loss validation"] == pytest.approx(own["lm loss validation"], rel=1e-6)
    assert "lm loss" not in found, "there was no step left to take"
    assert not [tag for tag in found if "kd" in tag or "teacher" in tag]

    run_stock(config, **load, train_iters=4, override_opt_param_scheduler="true", tensorboard_dir=trained_on)
    found = scalars(trained_on)
    assert len(found["lm loss"]) == 1 and found["lm loss"][0] < own["lm loss"][0]
    assert found["lm loss validation"] != own["lm loss validation"]
