"""Teacher and student whose vocabularies differ in size: the same losses however Megatron pads and shards them.

Of two SentencePiece models of one text the ids do not really mean the same; what is computed of them is the same.
"""

from pathlib import Path

import pytest
from launch import run_job, scalars

NAMES = ("lm loss", "kd loss", "total loss", "teacher lm loss", "kl to teacher", "teacher entropy", "top-1 agreement")
TP = {"megatron.tensor-model-parallel-size": 2}
PP = {"megatron.pipeline-model-parallel-size": 2}


@pytest.fixture(scope="module")
def larger(workspace: Path, config: Path) -> Path:
    """Data of a vocabulary of 420."""
    path = workspace / "vocabulary-of-420"
    run_job("prepare", config, {"data.dir": path, "data.vocab_size": 420})
    return path


def run(config: Path, tensorboard: Path, num_ranks: int, overrides: dict[str, object]) -> tuple[dict, str]:
    """What was logged, and what was said."""
    settings = {"megatron.tensorboard-dir": tensorboard, "distillation.shared_vocab": 400, **overrides}
    ranks = run_job("distill", config, settings, num_ranks=num_ranks)
    return scalars(tensorboard), "".join(rank.output for rank in ranks)


def check_equal(got: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    for name in (*NAMES, "grad-norm"):
        assert len(got[name]) == 5
        assert got[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert wanted["kd loss"][-1] < wanted["kd loss"][0]


def test_a_teacher_with_more_tokens(workspace: Path, config: Path, larger: Path, student: Path) -> None:
    teacher = workspace / "teacher-of-420"
    size = {"num-layers": 4, "hidden-size": 48, "ffn-hidden-size": 96, "make-vocab-size-divisible-by": 4}
    overrides = {f"megatron.{name}": value for name, value in size.items()}
    run_job(
        "pretrain", config, {**overrides, "data.dir": larger, "megatron.save": teacher, "megatron.save-interval": 5}
    )

    start = {"megatron.load": student, "megatron.finetune": "true", "teacher.load": teacher}
    # Of the teacher's 420 rows, the first run takes all and makes 512 of them, the second one 200 on each rank.
    wanted, said = run(config, workspace / "420-to-400", 1, start)
    sentence = "abkd_megatron: vocabularies: student 400 tokens, teacher 420; the divergence is over the first 400\n"
    assert said.count(sentence) == 1
    assert "the divergence is 0" not in said
    narrow = {**TP, "megatron.make-vocab-size-divisible-by": 8}
    check_equal(run(config, workspace / "420-to-400-narrow", 2, {**start, **narrow})[0], wanted)


def test_a_student_with_more_tokens(workspace: Path, config: Path, larger: Path, teacher: Path) -> None:
    student = workspace / "student-of-420"
    data = {"data.dir": larger}
    save = {"megatron.train-iters": 1, "megatron.save": student, "megatron.save-interval": 1}
    run_job("pretrain", config, {**data, **save})

    start = {**data, "megatron.load": student, "megatron.finetune": "true", "teacher.load": teacher}
    wanted, said = run(config, workspace / "400-to-420", 1, start)
    assert said.count("vocabularies: student 420 tokens, teacher 400; the divergence is over the first 400\n") == 1
    assert said.count("the teacher does not know tokens 400 .. 419") == 1
    assert said.count("LM head materialized: ") == 1
    assert "(shared_vocab 400 of the student's 420 tokens: " in said
    narrow = {**TP, **PP, "megatron.make-vocab-size-divisible-by": 8}
    check_equal(run(config, workspace / "400-to-420-narrow", 4, {**start, **narrow})[0], wanted)
