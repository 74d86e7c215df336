"""Micro-batches that are not like the others: of another size in validation, and without a token that counts."""

import math
from pathlib import Path

import numpy
import pytest
from launch import run_job, scalars
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 2

LAYOUTS = {
    "1 rank": (1, {}),
    "TP 2": (2, {"megatron.tensor-model-parallel-size": 2}),
    "PP 2": (2, {"megatron.pipeline-model-parallel-size": 2}),
    "DP 2, teacher TP 2": (2, {"teacher.tensor-model-parallel-size": 2}),
}


def test_validation_has_a_size_of_its_own(workspace: Path, config: Path, teacher: Path, student: Path) -> None:
    found = {}
    for layout, (ranks, overrides) in LAYOUTS.items():
        events = workspace / f"validated {layout}"
        start = {"megatron.load": student, "megatron.finetune": "true", "teacher.load": teacher}
        sizes = {"megatron.eval-micro-batch-size": 4, "megatron.eval-global-batch-size": 16} if ranks > 1 else {}
        every = {"megatron.eval-interval": 2, "megatron.eval-global-batch-size": 16, "megatron.train-iters": 2}
        run_job(
            "distill",
            config,
            {**start, **every, **sizes, **overrides, "megatron.tensorboard-dir": events},
            num_ranks=ranks,
        )
        logged = scalars(events)
        found[layout] = [logged[f"{name} validation"][0] for name in ("lm loss", "kd loss", "teacher lm loss")]
    for layout, values in found.items():
        assert values == pytest.approx(found["1 rank"], rel=1e-4), layout


@pytest.mark.parametrize("job", ["distill", "pretrain"])
def test_an_evaluation_alone(workspace: Path, config: Path, teacher: Path, student: Path, job: str) -> None:
    settings = {"megatron.load": student, "megatron.skip-train": "true"}
    if job == "distill":
        settings["teacher.load"] = teacher
    (rank,) = run_job(job, config, settings)
    assert "validation loss at iteration 1 on test set" in rank.output


def test_training_goes_on_after_validation(workspace: Path, config: Path, teacher: Path) -> None:
    """Also where Megatron synchronizes the device at every message, and the schedule begins with posted receives."""
    settings = {
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.num-layers": 4,
        "megatron.num-layers-per-virtual-pipeline-stage": 1,
        "megatron.timing-log-level": 2,
        "megatron.global-batch-size": 16,
        "megatron.eval-micro-batch-size": 4,
        "megatron.eval-interval": 1,
        "megatron.train-iters": 3,
        "megatron.distributed-timeout-minutes": 1,
        "teacher.load": teacher,
    }
    run_job("distill", config, settings, num_ranks=2)


@pytest.fixture(scope="module")
def ends(workspace: Path, config: Path) -> dict[str, object]:
    """Settings of data that hold the ends of documents alone, which do not count."""
    prefix = workspace / "ends"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(40):
        builder.add_document([END_OF_DOCUMENT] * 50, [50])
    builder.finalize(f"{prefix}.idx")
    return {
        "data.dir": "null",
        "megatron.tokenizer-type": "SentencePieceTokenizer",
        "megatron.tokenizer-model": workspace / "data/tokenizer.model",
        "megatron.data-cache-path": workspace / "cache",
        "megatron.eod-mask-loss": "true",
        **{f"megatron.{split}-data-path": f"[{prefix}]" for split in ("train", "valid", "test")},
    }


@pytest.mark.parametrize("job", ["distill", "pretrain"])
def test_a_step_that_counts_nothing_is_logged(
    workspace: Path, config: Path, teacher: Path, ends: dict[str, object], job: str
) -> None:
    events = workspace / f"nothing-{job}"
    overrides = {**ends, "megatron.eval-interval": 2, "megatron.train-iters": 3, "megatron.tensorboard-dir": events}
    if job == "distill":
        overrides["teacher.load"] = teacher
    ranks = run_job(job, config, overrides, num_ranks=2)
    logged = scalars(events)
    assert not [name for name, values in logged.items() if not all(map(math.isfinite, values))]
    assert logged["lm loss"] == [0.0] * 3
    assert logged["lm loss validation"][0] == 0.0
    for number, rank in enumerate(ranks):
        for when in ("step 3", "validation after step 2"):
            assert f"{when}: the loss mask is 0 for all tokens that rank {number} has read" in rank.output
