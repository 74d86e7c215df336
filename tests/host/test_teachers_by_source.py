"""Teachers by dataset of a blend, in the command line's own job: one run, its layouts, its record and its errors."""

import re
from pathlib import Path

import pytest
from launch import Rank, run_job, scalars
from matrix import check_refused, run_refused

TRAINED = ("lm loss", "kd loss", "total loss", "teacher lm loss", "grad-norm", "total loss validation")
LAYOUTS = {
    "PP 2": {"megatron.pipeline-model-parallel-size": 2, "teacher.pipeline-model-parallel-size": 1},
    "DP 2, TP 2": {"teacher.tensor-model-parallel-size": 2, "distillation.head": "fused", "distillation.chunk_tokens": 24},
    "PP 2 P": {"megatron.pipeline-model-parallel-size": 2, "megatron.timing-log-level": 2},
}


@pytest.fixture(scope="module")
def settings(workspace: Path, config: Path, teacher: Path, student: Path) -> dict[str, object]:
    """A blend of two datasets, whose second has the untrained student as its teacher."""
    data = workspace / "data"
    small = "num-layers: 2, hidden-size: 32, ffn-hidden-size: 64"
    return {
        "data.dir": "null",
        "megatron.tokenizer-type": "SentencePieceTokenizer",
        "megatron.tokenizer-model": data / "tokenizer.model",
        "megatron.data-cache-path": workspace / "cache",
        "megatron.train-data-path": f"[0.6, {data / 'train'}, 0.4, {data / 'valid'}]",
        "megatron.valid-data-path": f"[0.6, {data / 'train'}, 0.4, {data / 'valid'}]",
        "megatron.test-data-path": f"[{data / 'test'}]",
        "megatron.train-iters": 3,
        "megatron.load": student,
        "megatron.finetune": "true",
        "teacher.load": teacher,
        "teachers": f"[{{sources: [0], load: {teacher}}}, {{sources: [{data / 'valid'}], load: {student}, {small}}}]",
    }


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, settings: dict[str, object]):
    def train(name: str, num_ranks: int = 1, **others: object) -> tuple[dict[str, list[float]], list[Rank]]:
        tensorboard = workspace / "teachers" / name / "tensorboard"
        ranks = run_job(
            "distill", config, {**settings, "megatron.tensorboard-dir": tensorboard, **others}, num_ranks=num_ranks
        )
        return scalars(tensorboard), ranks

    return train


@pytest.fixture(scope="module")
def saved(workspace: Path) -> Path:
    return workspace / "teachers" / "saved"


@pytest.fixture(scope="module")
def on_one_rank(train, saved: Path):
    return train("one rank", **{"megatron.save": saved, "megatron.save-interval": 3})


def test_equal_checkpoints_are_held_once(on_one_rank) -> None:
    (rank,) = on_one_rank[1]
    assert rank.output.count("teacher of source 0: the same as the teacher, held once") == 1
    assert "held once" not in rank.output.replace("teacher of source 0: the same as the teacher, held once", "")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_rank(train, on_one_rank, name: str) -> None:
    found, _ = train(name, 2, **LAYOUTS[name])
    for key in TRAINED:
        assert len(on_one_rank[0][key]) >= 2
        assert found[key] == pytest.approx(on_one_rank[0][key], rel=1e-4), key
