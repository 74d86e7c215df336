"""Teachers by dataset of a blend, in the command line's own job: one run, its layouts, its record and its errors."""

from pathlib import Path

import pytest
from launch import Rank, run_job, scalars
from matrix import check_refused, run_refused

TRAINED = ("lm loss", "kd loss", "total loss", "teacher lm loss", "grad-norm", "total loss validation")
LAYOUTS = {
    "DP 2, teachers of TP 2": {
        "teacher.tensor-model-parallel-size": 2,
        "distillation.head": "fused",
        "distillation.chunk_tokens": 24,
    },
    "PP 2, teachers of PP 1": {
        "megatron.pipeline-model-parallel-size": 2,
        "megatron.timing-log-level": 2,
        "teacher.pipeline-model-parallel-size": 1,
    },
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


# {name: (settings in place of others, what the message says)}; TEACHER, STUDENT and DATA are paths.
REFUSED = {
    "resumed with swapped teachers": (
        {"megatron.load": "SAVED", "megatron.finetune": "false", "teachers": "[{sources: [0], load: STUDENT, SMALL}]"},
        r"another teacher or loss than it was trained with:\n"
        r"  teacher of source 0: \S*teacher/iter_0000008 .* in the checkpoint, \S*student/iter_0000001 .* in this run\n"
        r"  teacher of source 1: \S*student/iter_0000001 .* in the checkpoint, \S*teacher/iter_0000008 .* in this run",
    ),
    "no blend": (
        {"megatron.train-data-path": "[DATA/train]"},
        r"teachers: expected a blend of several datasets for training, got 1.*or remove teachers",
    ),
    "no such dataset": ({"teachers": "[{sources: [2], load: TEACHER}]"}, r"teachers: expected a source from 0 to 1"),
    "no such path": ({"teachers": "[{sources: [DATA/tran], load: TEACHER}]"}, r"teachers: unknown path of a dataset"),
    "one dataset of two teachers": (
        {"teachers": "[{sources: [1], load: TEACHER}, {sources: [DATA/valid], load: STUDENT, SMALL}]"},
        r"got teacher of source 1 and teacher of source \S*valid for the dataset at position 1",
    ),
    "no checkpoint": (
        {"teachers": "[{sources: [1], load: DATA/nothing}]"},
        r"teacher of source 1: .*DATA/nothing".replace("DATA", r"\S*data"),
    ),
    "another model": (
        {"teachers": "[{sources: [1], load: STUDENT}]"},
        r"teacher of source 1: .*num-layers",
    ),
    "another dtype": (
        {"teachers": "[{sources: [1], load: TEACHER, bf16: true}]"},
        r"teacher of source 1: expected one dtype of all teachers, got torch.bfloat16 and torch.float32",
    ),
}


@pytest.fixture(scope="module")
def ended(
    workspace: Path, config: Path, settings: dict[str, object], teacher: Path, student: Path, saved: Path, on_one_rank
) -> list[dict]:
    paths = {"TEACHER": teacher, "STUDENT": student, "DATA": workspace / "data", "SAVED": saved}
    paths["SMALL"] = "num-layers: 2, hidden-size: 32, ffn-hidden-size: 64"
    cases = {}
    for name, (others, _) in REFUSED.items():
        words = [f"{key}={value}" for key, value in {**settings, **others}.items()]
        for short, path in paths.items():
            words = [word.replace(short, str(path)) for word in words]
        cases[name] = ["distill", "--config", str(config), *words]
    folder = workspace / "teachers" / "refused"
    folder.mkdir()
    return run_refused(cases, 2, folder)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(ended: list[dict], name: str) -> None:
    check_refused(ended, name, "distill", REFUSED[name][1])
