"""attach() rejects models that gather logits over tensor-parallel ranks; on one rank there is nothing to gather."""

import json
from pathlib import Path

import pytest
from launch import launch


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gathered_logits_are_rejected_by_name(num_ranks: int) -> None:
    for rank in launch([Path(__file__).with_name("gathered.py")], num_ranks):
        assert rank.code == 0, rank.output[-6000:]
        (line,) = [line for line in rank.output.splitlines() if line.startswith("FOUND ")]
        found = json.loads(line.removeprefix("FOUND "))
        assert found.pop("False False") is None
        rejected = found.pop("rejected")
        assert len(rejected) == (6 if num_ranks == 1 else 12)
        assert all("columns" in message for message in rejected)
        for models, message in found.items():
            if num_ranks == 1:
                assert message is None
            else:
                who = "student" if models.startswith("True") else "teacher"
                assert message.startswith(f"{who}: parallel_output=False is not supported"), found
