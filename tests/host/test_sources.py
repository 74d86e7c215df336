"""Weights by dataset of a blend: the same in every layout, the objective's where nothing else is given."""

import re
from pathlib import Path

import pytest
from launch import launch, run_job, scalars

TRAINED = ("lm loss", "kd loss", "total loss", "grad-norm", "total loss validation")
# The text of the first dataset is trained on, the teacher is followed on the second.
SOURCES = "[{source: 0, kd_weight: 0, lm_weight: 1.5}, {source: 1, kd_weight: 0.8, lm_weight: 0}]"
LAYOUTS = {
    "TP 2": {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": "true"},
    "PP 2": {"megatron.pipeline-model-parallel-size": 2, "distillation.head": "fused", "distillation.chunk_tokens": 24},
    "DP 2": {"distillation.head": "fused", "distillation.chunk_tokens": 24},
    "other micro-batches": {"megatron.micro-batch-size": 1},
}


@pytest.fixture(scope="module")
def blend(workspace: Path, config: Path) -> dict[str, object]:
    """Settings of a blend of two datasets for training; validation has one."""
    data = workspace / "data"
    return {
        "data.dir": "null",
        "megatron.tokenizer-type": "SentencePieceTokenizer",
        "megatron.tokenizer-model": data / "tokenizer.model",
        "megatron.data-cache-path": workspace / "cache",
        "megatron.train-data-path": f"[0.6, {data / 'train'}, 0.4, {data / 'valid'}]",
        "megatron.valid-data-path": f"[{data / 'valid'}]",
        "megatron.test-data-path": f"[{data / 'test'}]",
    }


@pytest.fixture(scope="module")
def train(workspace: Path, config: Path, teacher: Path, student: Path, blend: dict[str, object]):
    def train(name: str, sources: str | None = SOURCES, num_ranks: int = 1, **layout: object):
        tensorboard = workspace / "sources" / name
        settings = {"teacher.load": teacher, "megatron.load": student, "megatron.finetune": "true", **blend, **layout}
        settings |= {"megatron.train-iters": 3, "megatron.tensorboard-dir": tensorboard}
        settings |= {"distillation.sources": sources} if sources else {}
        run_job("distill", config, settings, num_ranks=num_ranks)
        return scalars(tensorboard)

    return train


@pytest.fixture(scope="module")
def on_one_rank(train):
    return train("one rank")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_rank(train, on_one_rank, name: str) -> None:
    found = train(name, num_ranks=1 if "micro" in name else 2, **LAYOUTS[name])
    for key in TRAINED:
        assert len(on_one_rank[key]) >= 2
        assert found[key] == pytest.approx(on_one_rank[key], rel=1e-4), key


def test_a_path_is_a_position(train, on_one_rank, workspace: Path) -> None:
    data = workspace / "data"
    by_path = SOURCES.replace("source: 0", f"path: {data}/../data/train").replace(
        "source: 1", f"path: {data / 'valid'}"
    )
    found = train("by path", by_path, num_ranks=2, **LAYOUTS["PP 2"])
    for key in TRAINED:
        assert found[key] == pytest.approx(on_one_rank[key], rel=1e-4), key


def test_weights_multiply_the_losses_of_their_tokens(train, on_one_rank) -> None:
    """The total is linear in the weights: that of each source alone adds up to both."""
    parts = [
        train(f"source {source} {name}", f"[{{source: 0, {first}}}, {{source: 1, {second}}}]")["total loss"][0]
        for source, name, first, second in (
            (0, "text", "kd_weight: 0, lm_weight: 1.5", "kd_weight: 0, lm_weight: 1e-9"),
            (1, "teacher", "kd_weight: 1e-9, lm_weight: 0", "kd_weight: 0.8, lm_weight: 0"),
        )
    ]
    assert min(parts) > 0.1
    assert on_one_rank["total loss"][0] == pytest.approx(sum(parts), rel=1e-5)


def test_the_objectives_own_weights_change_nothing(train) -> None:
    """Validation, whose text is no blend, has the objective's weights in any case."""
    plain = train("plain", None)
    same = train("same", "[{source: 1, kd_weight: 1.0, lm_weight: 1.0}]")
    other = train("other", "[{source: 1, kd_weight: 0.5}]")
    for key in TRAINED:
        assert same[key] == pytest.approx(plain[key], rel=1e-6), key
        assert other[key][-1] != plain[key][-1], key
    # Before the first step all students are one.
    assert other["lm loss"][0] == plain["lm loss"][0] and other["total loss"][0] < plain["total loss"][0]
    parts = other["lm loss validation"][0] + other["kd loss validation"][0]
    assert other["total loss validation"][0] == pytest.approx(parts, rel=1e-6)


REFUSED = {
    "no blend": ({}, "[{source: 0, kd_weight: 0.5}]", r"expected a blend of several datasets for training, got 1"),
    "no such source": (None, "[{source: 2, kd_weight: 0.5}]", r"a source from 0 to 1.*got 2"),
    "twice": (None, "[{source: 1, kd_weight: 0.5}, {source: 1, lm_weight: 1}]", r"sources: .*2 entries for source 1"),
    "nothing": (None, "[{source: 1, kd_weight: 0, lm_weight: 0}]", r"sources: source 1: .* must not both be 0"),
    "no such path": (None, "[{path: data/tran, kd_weight: 0.5}]", r"sources: unknown path of a dataset 'data/tran'"),
    "path and position": (
        None,
        "[{path: VALID, kd_weight: 0.5}, {source: 1, lm_weight: 1}]",
        r"2 entries for source 1",
    ),
    "neither": (None, "[{kd_weight: 0.5}]", r"sources: expected source, .* got neither"),
    "a path twice": (
        {"megatron.train-data-path": "[0.6, VALID, 0.4, VALID]"},
        "[{path: VALID, kd_weight: 0.5}]",
        r"once in the list of the datasets, got it at \[0, 1\]",
    ),
    "another order in validation": (
        {"megatron.valid-data-path": "[0.6, VALID, 0.4, TRAIN]"},
        "[{path: VALID, kd_weight: 0.5}]",
        r"at position 1 of every split's list, .* got \[0\]",
    ),
    "no weight": (None, "[{source: 1}]", r"source 1: expected kd_weight or lm_weight, got neither"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(config: Path, teacher: Path, workspace: Path, blend: dict[str, object], name: str) -> None:
    data, sources, message = REFUSED[name]
    given = {**(blend if data != {} else {}), **(data or {}), "teacher.load": teacher, "distillation.sources": sources}
    words = [f"{key}={value}" for key, value in given.items()]
    for split in ("valid", "train"):
        words = [word.replace(split.upper(), str(workspace / "data" / split)) for word in words]
    (rank,) = launch(["-m", "abkd_megatron", "distill", "--config", config, *words], 1)
    assert rank.code == 2 and re.search(message, rank.output), rank.output[-3000:]
