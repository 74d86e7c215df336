"""What the host tests share: a small text, a teacher and a student to start from, all made by the command line."""

import shutil
import sysconfig
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import run_job

# Small enough for a second an iteration, and with 112 padded columns in the vocabulary.
CONFIG = """\
device: cpu
megatron:
  num-layers: 2
  hidden-size: 32
  ffn-hidden-size: 64
  num-attention-heads: 4
  seq-length: 32
  max-position-embeddings: 32
  position-embedding-type: rope
  normalization: RMSNorm
  swiglu: true
  disable-bias-linear: true
  untie-embeddings-and-output-weights: true
  micro-batch-size: 2
  global-batch-size: 8
  train-iters: 5
  lr: 1e-2
  lr-decay-style: constant
  log-interval: 1
  tensorboard-log-interval: 1
  eval-interval: 1000
  eval-iters: 1
  ckpt-format: torch_dist
  distributed-timeout-minutes: 3
teacher:
  num-layers: 4
  hidden-size: 48
  ffn-hidden-size: 96
distillation:
  preset: none
data:
  source: [{text}]
  vocab_size: 400
  held_out: 0.2
  dir: {data}
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="session")
def config(workspace: Path) -> Path:
    """A configuration whose data are prepared."""
    path = workspace / "config.yaml"
    text = Path(sysconfig.get_path("stdlib")) / "email"
    path.write_text(CONFIG.format(text=text, data=workspace / "data"))
    run_job("prepare", path)
    return path


@pytest.fixture(scope="session")
def teacher(workspace: Path, config: Path) -> Path:
    """A teacher trained for a few steps in another layout than any student's."""
    path = workspace / "teacher"
    overrides = {
        "megatron.num-layers": 4,
        "megatron.hidden-size": 48,
        "megatron.ffn-hidden-size": 96,
        "megatron.train-iters": 8,
        "megatron.save": path,
        "megatron.save-interval": 8,
        "megatron.seed": 7,
    }
    run_job("pretrain", config, overrides, num_ranks=2)
    return path


@pytest.fixture(scope="session")
def student(workspace: Path, config: Path) -> Path:
    """A student after one step, for every layout to start from."""
    path = workspace / "student"
    run_job("pretrain", config, {"megatron.train-iters": 1, "megatron.save": path, "megatron.save-interval": 1})
    return path


@pytest.fixture(scope="session")
def spoilt(workspace: Path, config: Path, teacher: Path, student: Path) -> Iterator[Path]:
    """Beside teacher and student, in the workspace: what the cases of bad_input.py name.

    Yields:
        Data of a vocabulary of another size.
    """
    from bad_input import spoil  # imports test modules, which pytest has to have seen

    from abkd_megatron.preflight.student_checkpoint import only_writer

    (workspace / "empty").mkdir()
    for name in ("truncated", "headless"):
        shutil.copytree(teacher, workspace / name)
    largest = max((workspace / "truncated").rglob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1000])
    next((workspace / "headless").rglob(".metadata")).unlink()
    other = workspace / "other-vocabulary"
    run_job("prepare", config, {"data.dir": other, "data.vocab_size": 420})
    text = Path(sysconfig.get_path("stdlib")) / "asyncio"
    run_job("prepare", config, {"data.dir": workspace / "other-text", "data.source": f"[{text}]"})
    spoil(workspace, teacher, workspace / "data")
    (workspace / "locked").mkdir()
    with only_writer(Namespace(save=str(workspace / "locked"), skip_train=False)):
        yield other
