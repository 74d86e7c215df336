"""With parameters gathered while the student runs, the head stays fused, and its numbers are those of logits."""

import json
from pathlib import Path

import pytest
from launch import launch, scalars

SETTINGS = {
    "use-distributed-optimizer": True,
    "overlap-grad-reduce": True,
    "overlap-param-gather": True,
    "train-iters": 4,
    "global-batch-size": 8,  # two micro-batches on each of two ranks
    "eval-iters": 2,
}


@pytest.mark.parametrize("tied", [False, True])
def test_every_step_is_fused(config: Path, teacher: Path, tmp_path: Path, tied: bool) -> None:
    found, calls = {}, {}
    for head in ("fused", "materialized"):
        settings = SETTINGS | {
            "untie-embeddings-and-output-weights": not tied,
            "tensorboard-dir": tmp_path / head,
        }
        words = [f"megatron.{name}={value}" for name, value in settings.items()]
        words += [f"teacher.load={teacher}", f"distillation.head={head}", "distillation.chunk_tokens=24"]
        words.append("teacher.untie-embeddings-and-output-weights=true")
        ranks = launch([Path(__file__).with_name("counted.py"), "distill", "--config", config, *words], 2)
        for rank in ranks:
            assert rank.code == 0, rank.output[-6000:]
        calls[head] = [json.loads(rank.output.splitlines()[-1]) for rank in ranks]
        found[head] = scalars(tmp_path / head)
    validations = 2 * 2 * 2  # of validation and test data: steps and micro-batches
    micro_batches = 4 * 2 + validations
    assert calls["fused"] == [{"fused": micro_batches, "materialized": 0}] * 2
    assert calls["materialized"] == [{"fused": 0, "materialized": micro_batches}] * 2
    for name in ("lm loss", "kd loss", "total loss", "grad-norm", "kd loss validation"):
        assert found["fused"][name] == pytest.approx(found["materialized"][name], rel=1e-5), name
