"""The job `generate` writes the same texts in every layout."""

import json
import re
from pathlib import Path

import pytest
from launch import launch, run_job

PROMPTS = ["def parse(message):", "import", "class Message:\n    def", "# The header is", "return self"]
LAYOUTS = {
    "tensor": {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": True},
    "pipeline": {"megatron.pipeline-model-parallel-size": 2},
    "data": {},
}


def settings(student: Path, **more: object) -> dict[str, object]:
    given = {"prompts": json.dumps(PROMPTS), "new_tokens": 12, "seed": 3, "top_k": 50, **more}
    return {
        "megatron.load": student,
        "megatron.max-position-embeddings": 64,
        **{f"generate.{name}": it for name, it in given.items()},
    }


@pytest.fixture(scope="module")
def on_one(workspace: Path, config: Path, student: Path) -> list[dict]:
    out = workspace / "texts.jsonl"
    (rank,) = run_job("generate", config, settings(student, out=out))
    assert re.search(r"\d+ tokens after 5 prompts in [\d.]+ s: [\d.]+ tokens/s", rank.output)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_prompt_is_continued(on_one: list[dict]) -> None:
    assert [row["prompt"] for row in on_one] == PROMPTS
    assert all(row["tokens"] == 12 or row["ended"] for row in on_one)
    assert len({row["text"] for row in on_one}) == len(PROMPTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_the_same(
    workspace: Path, config: Path, student: Path, on_one: list[dict], name: str
) -> None:
    out = workspace / f"texts-{name}.jsonl"
    run_job("generate", config, {**settings(student, out=out), **LAYOUTS[name]}, num_ranks=2)
    assert [json.loads(line) for line in out.read_text().splitlines()] == on_one


def test_a_file_has_a_prompt_per_line(workspace: Path, config: Path, student: Path) -> None:
    file = workspace / "prompts.txt"
    file.write_text("import\n\nreturn self\n")
    (rank,) = run_job("generate", config, settings(student, prompts="[]", file=file, temperature=0))
    rows = [json.loads(line) for line in rank.output.splitlines() if line.startswith('{"prompt"')]
    assert [row["prompt"] for row in rows] == ["import", "return self"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"generate.prompts": "[]"}, "generate.prompts or generate.file"),
        ({"megatron.load": "nowhere"}, "expected a checkpoint in megatron.load"),
        ({"generate.top_p": 2}, "generate.top_p"),
        ({"generate.new_tokens": 60}, "max-position-embeddings 64"),
        ({"generate.out": Path(__file__)}, "expected a file that does not exist"),
    ],
)
def test_a_job_that_cannot_run_is_rejected(config: Path, student: Path, change: dict, message: str) -> None:
    words = [f"{key}={value}" for key, value in {**settings(student), **change}.items()]
    (rank,) = launch(["-m", "abkd_megatron", "generate", config, *words], 1)
    assert rank.code == 2 and message in rank.output, rank.output[-3000:]
