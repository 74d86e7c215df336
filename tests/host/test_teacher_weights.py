"""`teacher.weights` by the command line: what `estimate` counts, and a job's own words.

That values and gradients are right in every layout is in test_sequences.py.
"""

import re
from pathlib import Path

import pytest
from launch import ROOT, launch, run_job


def test_estimate_counts_what_is_on_the_device() -> None:
    """Of a teacher of 3.2 G parameters in bf16, 0.4 G of them embedding, which take 6.0 GiB."""
    config = ROOT / "configs" / "llama32_3b_to_1b_8xH100.yaml"
    (rank,) = launch(["-m", "abkd_megatron", "estimate", "--config", config, "teacher.weights=int8"], 1)
    assert rank.code == 0, rank.output[-6000:]
    found = re.search(r"teacher's parameters\W+([\d.]+)", rank.output)
    assert found is not None and 3.0 < float(found[1]) < 4.0, rank.output


def test_a_job_trains_with_a_rounded_teacher(workspace: Path, config: Path, teacher: Path, student: Path) -> None:
    losses = {}
    for weights in ("device", "host", "int8"):
        settings = {"teacher.load": teacher, "megatron.load": student, "teacher.weights": weights}
        (rank,) = run_job("distill", config, {**settings, "megatron.train-iters": 2, "megatron.finetune": True})
        losses[weights] = re.findall(r"kd loss: (\S+)", rank.output)
        assert ("teacher's layers" in rank.output) == (weights != "device")
    assert losses["host"] == losses["device"] != losses["int8"]
    for mine, theirs in zip(losses["int8"], losses["device"], strict=True):
        assert float(mine) == pytest.approx(float(theirs), rel=2e-2)
