"""On the stand-in for a GPU: formats of the optimizer's checkpoint, and what Megatron asks of a GPU only to log it."""

from pathlib import Path

import pytest
from launch import run_job, scalars


@pytest.mark.parametrize("fully_reshardable", ["true", "false"])
def test_the_distributed_optimizer_is_resumed(workspace: Path, config: Path, fully_reshardable: str) -> None:
    folder = workspace / f"resumed-{fully_reshardable}"
    settings = {
        "megatron.use-distributed-optimizer": "true",
        "megatron.dist-ckpt-optim-fully-reshardable": fully_reshardable,
        "megatron.train-iters": 4,
        "megatron.save-interval": 2,
    }
    straight = {"megatron.save": folder, "megatron.tensorboard-dir": folder / "straight"}
    run_job("pretrain", config, {**settings, **straight}, num_ranks=2)
    resumed = {"megatron.load": folder, "megatron.ckpt-step": 2, "megatron.tensorboard-dir": folder / "resumed"}
    run_job("pretrain", config, {**settings, **resumed}, num_ranks=2)
    assert scalars(folder / "resumed")["lm loss"] == scalars(folder / "straight")["lm loss"][2:]


def test_what_a_gpu_is_asked_for_the_log(workspace: Path, config: Path) -> None:
    events = workspace / "asked"
    settings = {
        "log-memory-to-tensorboard": "true",
        "log-device-memory-used": "true",
        "log-straggler": "true",
        "profile": "true",
        "profile-step-start": 1,
        "profile-step-end": 3,
        "tensorboard-dir": events,
    }
    run_job("pretrain", config, {f"megatron.{name}": value for name, value in settings.items()})
    assert len(scalars(events)["mem-reserved-bytes"]) == 5
