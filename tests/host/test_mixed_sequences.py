"""Distillation on mixed sequences: the dense form's loss and gradients, in every layout, and after a resume."""

import json
import re
from pathlib import Path

import pytest
from gradients import whole
from launch import launch, run_job, scalars

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.mixed_sequences import SequenceMix

TRAINED = ("kd loss", "total loss", "teacher entropy", "kl to teacher", "grad-norm", "lm loss validation")
MIXED = {"distillation.preset": "pretrain", "distillation.lm_weight": 0, "distillation.mix": "{alpha: 0.4}"}
FUSED = {"distillation.head": "fused", "distillation.chunk_tokens": 24}
TP = {"megatron.tensor-model-parallel-size": 2}
PP = {"megatron.pipeline-model-parallel-size": 2}
LAYOUTS = {
    "TP 2 with SP": (2, {**TP, "megatron.sequence-parallel": "true"}),
    "PP 2": (2, {**PP, **FUSED}),
    "DP 2": (2, {"megatron.use-distributed-optimizer": "true", **FUSED}),
    "DP 2, teacher TP 2": (2, {"teacher.tensor-model-parallel-size": 2}),
    "DP 2, teacher PP 2": (2, {"teacher.pipeline-model-parallel-size": 2}),
    "PP 2, teacher PP 1": (2, {**PP, "teacher.pipeline-model-parallel-size": 1}),
    "PP 2 x DP 2, teacher PP 4": (4, {**PP, "teacher.pipeline-model-parallel-size": 4}),
    "recomputed": (
        1,
        {
            "megatron.recompute-granularity": "full",
            "megatron.recompute-method": "uniform",
            "megatron.recompute-num-layers": 1,
        },
    ),
}
VPP = {**PP, "megatron.num-layers": 4, "megatron.num-layers-per-virtual-pipeline-stage": 1}


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, teacher: Path, student: Path):
    def train(name: str, num_ranks: int = 1, **settings: object):
        tensorboard = workspace / "mixed" / name
        given = {"teacher.load": teacher, "megatron.load": student, "megatron.finetune": "true", **MIXED}
        given |= {"megatron.train-iters": 3, "megatron.tensorboard-dir": tensorboard, **settings}
        program = [Path(__file__).with_name("gradients.py"), tensorboard / "gradients"]
        run_job("distill", config, given, num_ranks=num_ranks, program=program)
        return scalars(tensorboard), whole(sorted((tensorboard / "gradients").iterdir()))

    return train


@pytest.fixture(scope="module")
def deep(workspace: Path, config: Path) -> Path:
    path = workspace / "mixed-deep"
    settings = {"megatron.num-layers": 4, "megatron.train-iters": 1}
    run_job("pretrain", config, {**settings, "megatron.save": path, "megatron.save-interval": 1})
    return path


@pytest.fixture(scope="module")
def on_one_rank(train):
    return train("one rank")


def check_equal(found, expected) -> None:
    (logged, gradients), (wanted, of_one) = found, expected
    for key in TRAINED:
        assert len(wanted[key]) >= 2
        assert logged[key] == pytest.approx(wanted[key], rel=1e-4), key
    assert gradients.keys() == of_one.keys()
    for name, gradient in gradients.items():
        assert (gradient - of_one[name]).norm() <= 1e-4 * of_one[name].norm(), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_rank(train, on_one_rank, name: str) -> None:
    num_ranks, settings = LAYOUTS[name]
    check_equal(train(name, num_ranks, **settings), on_one_rank)


def test_virtual_pipeline_stages_equal_one_rank(train, deep: Path) -> None:
    of_four = {"megatron.num-layers": 4, "megatron.load": deep}
    check_equal(train("PP 2 x VPP 2", 2, **{**of_four, **VPP}), train("four layers", **of_four))


def test_equals_the_dense_form(config: Path, teacher: Path, student: Path, workspace: Path, on_one_rank) -> None:
    file, program = workspace / "mixed-twin.json", Path(__file__).with_name("mixed_twin.py")
    given = {"teacher.load": teacher, "megatron.load": student, "megatron.finetune": "true", **MIXED}
    run_job("distill", config, given, program=[program, file])
    found = json.loads(file.read_text())
    assert found["batches"] == 4
    assert found["loss"] == pytest.approx(on_one_rank[0]["kd loss"][0], rel=1e-5)
    assert max(found["gradients"].values()) < 1e-5


def test_validation_is_not_mixed(train, on_one_rank) -> None:
    mixed = on_one_rank[0]
    plain, _ = train("plain", **{"distillation.mix": "null"})
    assert mixed["teacher lm loss validation"] == plain["teacher lm loss validation"]
    assert mixed["teacher lm loss"][0] != plain["teacher lm loss"][0]
    assert mixed["lm loss validation"] != plain["lm loss validation"], "another student"


def test_a_resumed_run_repeats_the_straight_one(train, workspace: Path) -> None:
    saved = workspace / "mixed-saved"
    save = {"megatron.save": saved, "megatron.save-interval": 2, "megatron.train-iters": 4}
    straight, _ = train("straight", **save)
    # Validation between does not move the draws.
    more = {"megatron.train-iters": 4, "megatron.eval-interval": 1}
    resumed, _ = train(
        "resumed", **{"megatron.load": saved, "megatron.ckpt-step": 2, "megatron.finetune": "false", **more}
    )
    for name in ("kd loss", "total loss", "grad-norm"):
        assert len(straight[name]) == 4
        assert resumed[name] == straight[name][2:], name


REFUSED = {
    "a loss of labels": ({"distillation.lm_weight": 0.5}, r"mix: expected the divergence alone, got lm_weight"),
    "a scheduled loss of labels": (
        {"distillation.lm_weight": "{schedule: linear, from: 0, to: 1, end: 9}"},
        r"expected lm_weight 0 at every step",
    ),
    "nothing to mix": ({"megatron.micro-batch-size": 1}, r"expected megatron.micro-batch-size 2 or more, got 1"),
    "boundaries": ({"megatron.reset-attention-mask": "true"}, r"not supported with megatron.reset-attention-mask"),
    "predicts ahead": ({"megatron.mtp-num-layers": 1}, r"mix is not supported with multi-token prediction"),
    "an expected loss": ({"teacher.expected-loss": 4.0}, r"teacher.expected-loss: expected none with distillation.mix"),
    "no alpha": ({"distillation.mix": "{alpha: 0}"}, r"alpha"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(config: Path, teacher: Path, name: str) -> None:
    settings, message = REFUSED[name]
    given = {"teacher.load": teacher, **MIXED, **settings}
    words = [f"{key}={value}" for key, value in given.items()]
    (rank,) = launch(["-m", "abkd_megatron", "distill", "--config", config, *words], 1)
    assert rank.code == 2 and re.search(message, rank.output), rank.output[-3000:]


def test_draws() -> None:
    mix = SequenceMix(0.4)
    draws = [mix.draw(7, step, micro_batch, 5) for step in range(40) for micro_batch in range(5)]
    assert draws[0] == mix.draw(7, 0, 0, 5) != mix.draw(8, 0, 0, 5)
    assert len({draw.shares for draw in draws}) == len(draws)
    for draw in draws:
        assert sorted(draw.partners) == list(range(5)) and all(of != own for own, of in enumerate(draw.partners))
    shares = [share for draw in draws for share in draw.shares]
    mean = sum(shares) / len(shares)
    assert mean == pytest.approx(0.5, abs=0.04)
    variance = sum((share - mean) ** 2 for share in shares) / len(shares)
    assert variance == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)  # of Beta(a, a)
    for sequences in (0, 1):
        with pytest.raises(ConfigError):
            mix.draw(7, 0, 0, sequences)
