"""Prompts of steps on own text, and the reward of the example."""

import runpy
from pathlib import Path

import torch

from abkd_megatron.rollouts.prompts import of_beginnings, of_conversations


def row(*lengths: int, counts: list[int]) -> dict[str, torch.Tensor]:
    """Packed conversations in 12 tokens, 100 and on; `counts` are the positions of tokens that are trained on."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.zeros(1, 12)
    mask[0, [at - 1 for at in counts]] = 1
    cu_seqlens = torch.full((1, 13), 12, dtype=torch.int32)
    cu_seqlens[0, : len(ends)] = ends.int()
    return {"tokens": torch.arange(100, 112).unsqueeze(0), "loss_mask": mask, "cu_seqlens": cu_seqlens}


def test_a_conversation_is_continued_where_it_first_counts() -> None:
    rows = [
        row(7, 5, counts=[3, 4, 9]),
        row(7, 5, counts=[9, 10]),  # the first conversation is a prompt only, which was cut off
        row(12, counts=[11]),  # longer than 5
        row(12, counts=[]),
        row(12, counts=[1, 2]),
    ]
    assert of_conversations(rows, 5).tolist() == [
        [100, 101, 102, 0, 0, 3],
        [107, 108, 0, 0, 0, 2],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [100, 0, 0, 0, 0, 1],
    ]
    assert of_conversations(rows, 20).shape == (5, 21)
    assert of_conversations(rows[2:3], 20)[0, -1] == 11


def test_text_is_continued_after_its_first_tokens() -> None:
    assert of_beginnings([row(12, counts=[1])], 3).tolist() == [[100, 101, 102, 3]]


def test_the_examples_reward_is_of_statements() -> None:
    reward = runpy.run_path(str(Path(__file__).parents[2] / "examples/valid_python.py"))["reward"]
    texts = ["(x)\n    y = 1\n\n    # a\n    z =", "\nif x:\nfor (", "no line", "\nas it is\n\x00\n", "\ny = (\n"]
    assert reward(["p"] * 5, texts) == [0.5, 1.0, 0.0, 0.0, 0.0]
