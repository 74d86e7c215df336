"""Job `rouge`: the same continuations in every layout, and their score."""

import json
import re
from pathlib import Path

import pytest
from launch import launch, run_job

pytest.importorskip("rouge_score")

LAYOUTS = {
    "TP 2": {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": "true"},
    "PP 2": {"megatron.pipeline-model-parallel-size": 2},
    "DP 2": {},
}
NUMBERS = {"compare.rouge_prompts": 7, "compare.prompt_tokens": 10, "compare.new_tokens": 22, "megatron.eval-iters": 3}


WORDS = ("one two three four five six seven eight nine ten eleven twelve " * 40).split()


@pytest.fixture(scope="module")
def data(workspace: Path, config: Path) -> Path:
    """Text that is easily learned: documents that count, from different numbers on."""
    texts, path = workspace / "counting", workspace / "counting-data"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(" ".join(WORDS[number % 12 :]))
    run_job("prepare", config, {"data.source": f"[{texts}]", "data.dir": path, "data.vocab_size": 320})
    return path


@pytest.fixture(scope="module")
def trained(workspace: Path, config: Path, data: Path) -> Path:
    """A student that has learned it."""
    path = workspace / "rouge/student"
    settings = {"train-iters": 25, "save-interval": 25, "save": path, "log-interval": 20, "eval-iters": 1}
    run_job("pretrain", config, {"data.dir": data, **{f"megatron.{name}": of for name, of in settings.items()}})
    return path


@pytest.fixture(scope="module")
def rouge(workspace: Path, config: Path, trained: Path, data: Path):
    def rouge(name: str, num_ranks: int = 1, **settings: object) -> dict:
        out = workspace / "rouge" / name
        given = {"megatron.load": trained, "data.dir": data, "compare.out": out, **NUMBERS, **settings}
        run_job("rouge", config, given, num_ranks=num_ranks)
        return json.loads((out / "rouge.json").read_text())

    return rouge


@pytest.fixture(scope="module")
def on_one_rank(rouge) -> dict:
    return rouge("one rank")


def longest_common(one: list[str], other: list[str]) -> int:
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for row, word in enumerate(one):
        for column, their in enumerate(other):
            longer = max(lengths[row][column + 1], lengths[row + 1][column])
            lengths[row + 1][column + 1] = lengths[row][column] + 1 if word == their else longer
    return lengths[-1][-1]


def test_score_is_that_of_the_longest_common_subsequence(on_one_rank) -> None:
    assert on_one_rank["prompts"] == len(on_one_rank["examples"]) == 7
    assert len({example["prompt"] for example in on_one_rank["examples"]}) > 1
    for draw in ("greedy", "sampled"):
        scores = []
        for example in on_one_rank["examples"]:
            text, own = (re.findall("[a-z0-9]+", example[name].lower()) for name in ("text", draw))
            common = longest_common(text, own)
            scores.append(2 * common / (len(text) + len(own)) if common else 0.0)
        assert on_one_rank[draw]["rougeL"] == pytest.approx(sum(scores) / 7)
    assert 0.5 < on_one_rank["greedy"]["rougeL"] > on_one_rank["sampled"]["rougeL"], "it has learned to count"
    assert any(example["greedy"] != example["sampled"] for example in on_one_rank["examples"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_continue_alike(rouge, on_one_rank, name: str) -> None:
    assert rouge(name, 2, **LAYOUTS[name]) == on_one_rank


REFUSED = {
    "too long": ({"compare.new_tokens": 23}, r"compare.new_tokens: .* seq-length 32"),
    "too many prompts": ({"compare.rouge_prompts": 100_000}, r"compare.rouge_prompts: expected at most"),
    "no prompts": ({"compare.rouge_prompts": 0}, r"compare.rouge_prompts: expected"),
    "no student": ({"megatron.load": "null"}, r"megatron.load: expected the student's checkpoint, got none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(config: Path, student: Path, workspace: Path, name: str) -> None:
    settings, message = REFUSED[name]
    given = {"megatron.load": student, "compare.out": workspace / "refused", **NUMBERS, **settings}
    words = [f"{key}={value}" for key, value in given.items()]
    (rank,) = launch(["-m", "abkd_megatron", "rouge", "--config", config, *words], 1)
    assert rank.code == 2 and re.search(message, rank.output), rank.output[-3000:]
