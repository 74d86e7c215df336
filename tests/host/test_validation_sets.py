"""Validation: named sets of which every row is read once, before the first step, and the best checkpoint by it."""

import json
from pathlib import Path

import pytest
from launch import launch, run_job, scalars

from abkd_megatron.data.indexed import check_datasets

NUMBERS = ("lm loss", "kd loss", "teacher lm loss", "kl to teacher", "top-1 agreement")
LAYOUTS = {
    "TP 2": {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": "true"},
    "PP 2": {
        "megatron.pipeline-model-parallel-size": 2,
        "distillation.head": "fused",
        "distillation.chunk_tokens": 24,
        "megatron.eval-micro-batch-size": 1,
    },
    "DP 2": {"megatron.use-distributed-optimizer": "true", "megatron.overlap-grad-reduce": "true"},
}
LAYOUTS["DP 2"]["megatron.overlap-param-gather"] = "true"


@pytest.fixture(scope="module")
def run(workspace: Path, config: Path, teacher: Path, student: Path):
    data = workspace / "data"

    def run(name: str, num_ranks: int = 1, job: str = "distill", **given: object):
        folder = workspace / "validation" / name
        settings = {
            "teacher.load": teacher,
            "megatron.load": student,
            "megatron.finetune": "true",
            "megatron.train-iters": 4,
            "megatron.eval-interval": 2,
            "megatron.save": folder,
            "megatron.save-interval": 3,
            "megatron.tensorboard-dir": folder / "tensorboard",
            "validation.sets": f"{{valid: {data / 'valid'}, test: {data / 'test'}}}",
            "validation.at_start": "true",
            **given,
        }
        output = run_job(job, config, {key: of for key, of in settings.items() if of is not None}, num_ranks=num_ranks)
        return folder, scalars(folder / "tensorboard"), output[0].output

    return run


@pytest.fixture(scope="module")
def on_one_rank(run):
    return run("one rank", **{"validation.best": "valid kl to teacher"})


def test_one(on_one_rank):
    folder, found, output = on_one_rank
    for name in sorted(found):
        print(name, found[name])
    print(output[-4000:])
    print(sorted(it.name for it in folder.rglob("*")))
    print((folder/"best.json").read_text())
    assert 0
