"""A teacher with another tokenizer: the dense form's loss and gradients, in every layout; and what is noticed."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest
from gradients import whole
from launch import launch, run_job, scalars
from matrix import check_refused, run_refused

LOGGED = ("lm loss", "kd loss", "total loss", "teacher lm loss", "chunk log-ratio", "aligned bytes", "grad-norm")
SP = {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": "true"}
DP = {"megatron.use-distributed-optimizer": "true"}
KEYS = {"distillation.divergence": "forward_kl", "distillation.cross_tokenizer": "{temperature: 20}"}


@pytest.fixture(scope="module")
def other(workspace: Path, config: Path) -> dict[str, Path]:
    """A teacher of a larger vocabulary, and its tokenizer."""
    data, path = workspace / "cross-data", workspace / "cross-teacher"
    settings = {"data.dir": data, "data.vocab_size": 600}
    run_job("prepare", config, settings)
    sizes = {"megatron.num-layers": 4, "megatron.hidden-size": 48, "megatron.ffn-hidden-size": 96}
    saved = {"megatron.train-iters": 12, "megatron.save": path, "megatron.save-interval": 12}
    run_job("pretrain", config, {**settings, **sizes, **saved, "megatron.seed": 7}, num_ranks=2)
    return {"teacher.load": path, "teacher.tokenizer-model": data / "tokenizer.model"}


def test_value_and_gradient_are_the_dense_form_s(
    workspace: Path, config: Path, student: Path, other: dict[str, Path]
) -> None:
    tensorboard, found = workspace / "cross-twin", workspace / "cross-twin.json"
    given = {**other, **KEYS, "megatron.load": student, "megatron.finetune": "true", "teacher.seq-length": 40}
    given |= {"megatron.max-position-embeddings": 64, "distillation.kd_weight": 0.7}
    program = [Path(__file__).with_name("chunked_twin.py"), found]
    run_job("distill", config, {**given, "megatron.tensorboard-dir": tensorboard}, program=program)
    dense = json.loads(found.read_text())
    assert dense["kd loss"] > 0.1
    assert dense["logged"] == pytest.approx({name: dense[name] for name in dense["logged"]}, rel=1e-5)
    assert all(distance < 2e-5 for distance in dense["gradients"].values()), dense


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, student: Path, other: dict[str, Path]):
    def train(name: str, num_ranks: int = 1, **settings: object):
        tensorboard = workspace / "cross" / name
        given = {**other, **KEYS, "megatron.load": student, "megatron.finetune": "true", "megatron.train-iters": 2}
        given |= {"megatron.eod-mask-loss": "true", "megatron.tensorboard-dir": tensorboard, **settings}
        program = [Path(__file__).with_name("gradients.py"), tensorboard / "gradients"]
        run_job("distill", config, given, num_ranks=num_ranks, program=program)
        return scalars(tensorboard), whole(sorted((tensorboard / "gradients").iterdir()))

    return train


@pytest.fixture(scope="module")
def on_one_rank(train):
    return train("one rank")


@pytest.mark.parametrize(("name", "settings"), [("TP 2 with SP", SP), ("DP 2", DP)])
def test_layouts_equal_one_rank(train, on_one_rank, name: str, settings: dict[str, object]) -> None:
    (logged, gradients), (wanted, of_one) = train(name, 2, **settings), on_one_rank
    for key in (*LOGGED, "kd loss validation"):
        assert logged[key] == pytest.approx(wanted[key], rel=1e-4), key
    assert gradients.keys() == of_one.keys()
    for key, gradient in gradients.items():
        assert (gradient - of_one[key]).norm() <= 1e-4 * of_one[key].norm(), key
    assert all(0.9 < share <= 1 for share in wanted["aligned bytes"]) and max(wanted["bytes cut off"]) == 0


def test_a_short_row_of_the_teacher_cuts_text_off_and_says_how_much(train) -> None:
    logged, _ = train("cut off", **{"teacher.seq-length": 12, "distillation.kd_weight": 0.5})
    for aligned, cut in zip(logged["aligned bytes"], logged["bytes cut off"], strict=True):
        assert 0.2 < aligned < 0.8 and 0.95 < aligned + cut <= 1.0001


def test_a_watched_teacher_changes_no_bit(train, workspace: Path, config: Path, student: Path) -> None:
    alone = workspace / "cross" / "without"
    settings = {"megatron.load": student, "megatron.finetune": "true", "megatron.train-iters": 2}
    run_job("pretrain", config, {**settings, "megatron.eod-mask-loss": "true", "megatron.tensorboard-dir": alone})
    logged, _ = train("watched", **{"distillation.kd_weight": 0})
    assert logged["lm loss"] == scalars(alone)["lm loss"] and min(logged["kd loss"]) > 0


def test_losses_are_compared_with_it(workspace: Path, config: Path, teacher: Path, other: dict[str, Path]) -> None:
    out = workspace / "cross-compare"
    tokenizer = workspace / "data" / "tokenizer.model"
    same = f"{{cross_tokenizer: null, teacher.tokenizer-model: {tokenizer}, teacher.load: {teacher}}}"
    given = {
        **other,
        **KEYS,
        "megatron.train-iters": 4,
        "megatron.save-interval": 4,
        "megatron.eval-interval": 2,
        "compare.out": out,
        "compare.losses": f"{{CE only: {{kd_weight: 0, lm_weight: 1}}, chunks: {{kd_weight: 2}}, same tokens: {same}}}",
        "compare.seeds": "[1]",
        "compare.launch": f"{sys.executable} {Path(__file__).with_name('quick.py')}",
    }
    words = [f"{key}={value}" for key, value in given.items()]
    (rank,) = launch(["-m", "abkd_megatron", "compare", "--config", config, *words], 1)
    assert rank.code == 0, rank.output[-3000:]
    found = json.loads((out / "results.json").read_text())
    runs = {run["loss"]: run for run in found["runs"]}
    watched, chunks, of_same = (runs[name]["test"] for name in ("CE only", "chunks", "same tokens"))
    assert watched["chunk log-ratio"] > 0 < chunks["chunk log-ratio"] != watched["chunk log-ratio"]
    assert "kl to teacher" not in chunks and of_same["kl to teacher"] > 0
    # The row of the teacher is of the student's tokens.
    assert found["summary"]["teacher"]["cross entropy"]["mean"] == of_same["teacher lm loss"]


# Each was supported for no teacher but one of the student's tokens, or is not supported for another one.
REJECTED = {
    "without the loss": (
        {"distillation.cross_tokenizer": "null"},
        r"teacher.tokenizer-model.*set distillation.cross_tokenizer",
    ),
    "without a tokenizer": ({"teacher.tokenizer-model": "null"}, r"cross_tokenizer.*teacher.tokenizer-model"),
    "the student's tokenizer": (
        {"teacher.tokenizer-model": "{data}/tokenizer.model"},
        r"vocabulary of 600 tokens.*400",
    ),
    "another tokenizer of the size": (
        {"teacher.tokenizer-model": "{same_size}/tokenizer.model"},
        r"tokenizer that the teacher was trained with.*got another one",
    ),
    "no tokenizer there": (
        {"teacher.tokenizer-model": "{data}/nothing"},
        r"teacher's tokenizer.*nothing.*on this mach",
    ),
    "pipeline stages": (
        {"megatron.pipeline-model-parallel-size": 2},
        r"cross_tokenizer.*pipeline-model-parallel-size 1, got 2.*tensor and data",
    ),
    "independent parallelism": ({"teacher.tensor-model-parallel-size": 2}, r"cross_tokenizer.*teacher.tensor-model"),
    "positions reset": ({"megatron.reset-position-ids": "true"}, r"cross_tokenizer.*reset-position-ids"),
    "fused head": ({"distillation.head": "fused"}, r"cross_tokenizer.*head: fused"),
    "selection": ({"distillation.tokens": "{{select: every, n: 2}}"}, r"cross_tokenizer.*tokens"),
}


@pytest.fixture(scope="module")
def ended(workspace: Path, config: Path, other: dict[str, Path]):
    same_size = workspace / "cross-same-size"
    text = Path(sysconfig.get_path("stdlib")) / "asyncio"
    run_job("prepare", config, {"data.dir": same_size, "data.vocab_size": 600, "data.source": f"[{text}]"})
    places = {"data": workspace / "data", "same_size": same_size}
    cases = {}
    for name, (settings, _) in REJECTED.items():
        given = {**other, **KEYS, **{key: str(value).format(**places) for key, value in settings.items()}}
        cases[name] = ["distill", "--config", str(config), *(f"{key}={value}" for key, value in given.items())]
    return run_refused(cases, 2, workspace)


@pytest.mark.parametrize("name", REJECTED)
def test_what_does_not_go_with_it_is_rejected_on_every_rank(ended, name: str) -> None:
    check_refused(ended, name, "distill", REJECTED[name][1])
