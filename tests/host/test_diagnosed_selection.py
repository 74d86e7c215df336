"""A validation with diagnostics is of all tokens, whichever the divergence is trained on."""

from pathlib import Path

import pytest
from launch import run_job, scalars


def test_metrics_are_of_all_tokens(workspace: Path, config: Path, teacher: Path, student: Path) -> None:
    reports = {}
    for name, selection in (("all", "null"), ("every third", "{select: every, n: 3}")):
        tensorboard = workspace / "diagnosed" / name
        settings = {
            "teacher.load": teacher,
            "megatron.load": student,
            "megatron.finetune": "true",
            "megatron.train-iters": 1,
            "megatron.eval-interval": 1,
            "megatron.tensorboard-dir": tensorboard,
            "distillation.diagnostics": "true",
            "distillation.tokens": selection,
        }
        run_job("distill", config, settings)
        reports[name] = scalars(tensorboard)
    every, whole = reports["every third"], reports["all"]
    assert every["selected tokens validation"][0] == pytest.approx(10 / 32)
    for metric in ("teacher lm loss", "teacher entropy"):  # the students have had different steps
        assert every[f"{metric} validation"] == pytest.approx(whole[f"{metric} validation"], rel=1e-6), metric
        assert every[metric][0] != pytest.approx(whole[metric][0], rel=1e-6), metric  # in training they are not
