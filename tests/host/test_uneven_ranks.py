"""Ranks that differ in free memory, GPU and clock train as one, and touch no GPU before Megatron has chosen it."""

from pathlib import Path

from launch import Rank, launch, scalars

from abkd_megatron import cpu_backend
from abkd_megatron.teacher.safe_load import read_common

SETTINGS = {
    **cpu_backend.MEGATRON_DEFAULTS,
    "tensor-model-parallel-size": 2,
    "micro-batch-size": 8,  # 256 tokens, of which one rank would make one chunk and the other two
    "train-iters": 4,
    "save-interval": 2,
    "deterministic-mode": False,
}


def run(config: Path, teacher: Path, folder: Path, **settings: object) -> list[Rank]:
    words = [f"megatron.{key.replace('_', '-')}={value}" for key, value in (SETTINGS | settings).items()]
    words += ["device=cuda", "distillation.head=fused", f"teacher.load={teacher}", f"megatron.save={folder}"]
    words.append(f"megatron.tensorboard-dir={folder}/events")
    ranks = launch([Path(__file__).with_name("uneven.py"), "distill", "--config", config, *words], 2)
    for rank in ranks:
        assert rank.code == 0, rank.output[-6000:]
        assert "TOO EARLY 0" in rank.output, rank.output[-6000:]
    return ranks


def plan_in(folder: Path, iteration: int) -> dict:
    return read_common(folder / f"iter_{iteration:07d}")["args"].abkd_distillation["plan"]


def losses(folder: Path) -> list[float]:
    return scalars(folder)["total loss"]


def test_one_chunk_size_before_and_after_a_resume(config: Path, teacher: Path, tmp_path: Path) -> None:
    whole, folder = run(config, teacher, tmp_path / "whole"), tmp_path / "resumed"
    first = run(config, teacher, folder, exit_interval=2)
    second = run(config, teacher, folder, load=folder)
    for ranks in (whole, first, second):
        assert "LM head fused with the loss: chunks of 128 tokens" in ranks[-1].output
    assert plan_in(tmp_path / "whole", 4) == plan_in(folder, 2) == plan_in(folder, 4)
    assert plan_in(folder, 4)["chunk_tokens"] == 128
    assert losses(folder / "events") == losses(tmp_path / "whole" / "events")
    assert len(losses(folder / "events")) == 4
