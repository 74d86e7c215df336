"""A bf16 teacher routes by the fp32 biases of its checkpoint, as the model that was saved does."""

import json
from pathlib import Path

from launch import launch


def test_biases_keep_their_bits(tmp_path: Path) -> None:
    (rank,) = launch([Path(__file__).with_name("router_bias.py"), tmp_path / "saved"], 1)
    assert rank.code == 0, rank.output[-6000:]
    (line,) = [line for line in rank.output.splitlines() if line.startswith("FOUND ")]
    assert json.loads(line.removeprefix("FOUND ")) == {
        "routers": 2,
        "biases": True,
        "bias dtypes": ["torch.float32"],
        "parameter dtypes": ["torch.bfloat16"],
        "logits": True,
    }
