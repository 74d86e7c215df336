"""The fused head equals Megatron's own output layer, which makes logits.

Four micro-batches; chunks that do not divide them; tied and untied output layers, tensor and sequence parallel; on all
tokens, and on every third, of which alone the teacher's layer then makes logits. Whole training runs through it are
rows of the matrix.
"""

import json
from pathlib import Path

import pytest
from launch import launch


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_equals_megatrons_output_layer(num_ranks: int) -> None:
    ranks = launch([Path(__file__).with_name("output_layer.py")], num_ranks)
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
        (line,) = [line for line in rank.output.splitlines() if line.startswith("FOUND ")]
        found = json.loads(line.removeprefix("FOUND "))
        assert len(found) == (3 + 6 / 2) * (16 if num_ranks > 1 else 8)
        assert all(worst <= 1.0 for worst in found.values()), found
