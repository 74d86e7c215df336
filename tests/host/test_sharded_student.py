"""attach() refuses a student whose weights are sharded, whoever wrapped it, and one that is compiled as a whole."""

import json
from pathlib import Path

from launch import launch


def test_each_wrapper_is_refused_by_name() -> None:
    (rank,) = launch([Path(__file__).with_name("sharded.py")], 1)
    assert rank.code == 0, rank.output[-6000:]
    (line,) = [line for line in rank.output.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    names = {"Megatron": "Megatron FSDP", "torch, by Megatron": "torch FSDP2"}
    for wrapper in ("Megatron", "torch, by Megatron", "torch", "torch, a layer"):
        name = names.get(wrapper, "torch FSDP2")
        assert found[wrapper].startswith(f"student: {name} is not supported: it shards"), found
    for compiled in ("compiled", "compiled in place"):
        assert found[compiled].startswith("student: torch.compile of the whole model is not supported"), found
