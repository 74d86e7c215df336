"""`teacher.weights` by the command line: what `estimate` counts, and a job's own words.

That values and gradients are right in every layout is in test_sequences.py.
"""

import math
import re
from pathlib import Path

import pytest
from launch import ROOT, launch, run_job

from abkd_megatron.errors import ConfigError
from abkd_megatron.preflight.first_step import LARGEST_ROUNDING, Rounding
from abkd_megatron.preflight.rules import ROUNDING, run_checks

MEASURED = r"teacher.weights int8: KL (\S+) nats per token .* in (\S+)% of (\d+) tokens"


def test_estimate_counts_what_is_on_the_device() -> None:
    """Of a teacher of 3.2 G parameters in bf16, 0.4 G of them embedding, which take 6.0 GiB."""
    config = ROOT / "configs" / "llama32_3b_to_1b_8xH100.yaml"
    (rank,) = launch(["-m", "abkd_megatron", "estimate", "--config", config, "teacher.weights=int8"], 1)
    assert rank.code == 0, rank.output[-6000:]
    found = re.search(r"teacher's parameters\W+([\d.]+)", rank.output)
    assert found is not None and 3.0 < float(found[1]) < 4.0, rank.output


def test_a_job_trains_with_a_rounded_teacher(workspace: Path, config: Path, teacher: Path, student: Path) -> None:
    losses, found = {}, {}
    tensor = {
        "megatron.tensor-model-parallel-size": 2,
        "megatron.sequence-parallel": True,
        "distillation.hidden_losses": "[{student_layer: 1, teacher_layer: 2, loss: cosine}]",
    }
    other = {"teacher.tensor-model-parallel-size": 2}  # of two data-parallel ranks
    for name, weights, layout in (
        *((weights, weights, {}) for weights in ("device", "host", "int8")),
        ("tensor", "int8", tensor),
        ("other layout", "int8", other),
    ):
        settings = {"teacher.load": teacher, "megatron.load": student, "teacher.weights": weights, **layout}
        settings |= {"megatron.train-iters": 2, "megatron.finetune": True}
        first, *others = run_job("distill", config, settings, num_ranks=2 if layout else 1)
        losses[name] = re.findall(r"kd loss: (\S+)", (others or [first])[-1].output)
        assert ("teacher's layers" in first.output) == (weights != "device")
        found[name] = re.findall(MEASURED, first.output)
    assert losses["host"] == losses["device"] != losses["int8"]
    for name, steps in (
        ("int8", 2),
        ("tensor", 1),
        ("other layout", 2),
    ):  # losses between layers change the second step
        for mine, theirs in zip(losses[name][:steps], losses["device"][:steps], strict=True):
            assert float(mine) == pytest.approx(float(theirs), rel=2e-2)
    assert found["device"] == found["host"] == []
    for name in ("int8", "tensor", "other layout"):
        ((kl, agreement, tokens),) = found[name]
        assert 0 < float(kl) < 1e-4 and float(agreement) > 90
        assert tokens == ("128" if name == "other layout" else "64"), "a micro-batch of each data-parallel rank"


def test_a_teacher_that_rounding_changes_is_rejected() -> None:
    found = Rounding(0.02, 0.9, 64)
    with pytest.raises(
        ConfigError, match=r"within 0.01 nats per token, got KL 0.02 .* 90.00% of 64 .*teacher_rounding"
    ):
        run_checks([ROUNDING], found)
    for kl in (LARGEST_ROUNDING, 0.0):
        run_checks([ROUNDING], Rounding(kl, 1.0, 64))
    with pytest.raises(ConfigError, match="got KL nan"):
        run_checks([ROUNDING], Rounding(math.nan, 0.0, 64))
    run_checks([ROUNDING], found, ["teacher_rounding"])
