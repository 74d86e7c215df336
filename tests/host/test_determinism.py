"""Two runs of one job are equal to the bit, a resumed one as well, and the teacher is what it was.

With dropout in the student, tensor-parallel 2 x pipeline-parallel 2 and `megatron.deterministic-mode`: there Megatron
sets what NCCL, cuBLAS and TransformerEngine read from the environment, which means nothing on a CPU, and has torch
refuse operations of which it has no deterministic form.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch, run_job, scalars
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

STEPS, HALF = 6, 3
SETTINGS = {
    "tensor-model-parallel-size": 2,
    "pipeline-model-parallel-size": 2,
    "use-distributed-optimizer": "true",
    "deterministic-mode": "true",
    "hidden-dropout": 0.1,
    "attention-dropout": 0.1,
    "global-batch-size": 4,
    "train-iters": STEPS,
    "save-interval": HALF,
    "eval-interval": HALF,
}
HASHED = Path(__file__).with_name("hashed.py")


@pytest.fixture(scope="module")
def files(teacher: Path) -> dict[str, str]:
    """{file of the teacher's checkpoint: sha256}, before any of the runs."""
    return hashes(teacher)


def hashes(folder: Path) -> dict[str, str]:
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert any(name.endswith(".distcp") for name in found)
    return found


@pytest.fixture(scope="module")
def out(workspace: Path) -> Path:
    return workspace / "determinism"


def settings(out: Path, teacher: Path, **more: object) -> dict[str, object]:
    given = {**SETTINGS, "save": out, "tensorboard-dir": out / "tensorboard", **more}
    return {**{f"megatron.{key.replace('_', '-')}": value for key, value in given.items()}, "teacher.load": teacher}


@pytest.fixture(scope="module")
def straight(out: Path, config: Path, teacher: Path, files: dict[str, str]) -> list[list[str]]:
    """A run of all steps; what each rank said of its teacher's weights, in time."""
    words = [f"{key}={value}" for key, value in settings(out / "straight", teacher).items()]
    ranks = launch([HASHED, "distill", "--config", config, *words], 4)
    assert [rank.code for rank in ranks] == [0] * 4, ranks[-1].output[-6000:]
    assert re.search(r"deterministic_mode \.+ True", ranks[0].output)
    return [re.findall(r"^TEACHER (\d+ \w{64})$", rank.output, re.MULTILINE) for rank in ranks]


@pytest.fixture(scope="module")
def again(out: Path, config: Path, teacher: Path, straight: list[list[str]]) -> Path:
    """The same once more, in other folders and without anybody looking on."""
    run_job("distill", config, settings(out / "again", teacher), num_ranks=4)
    return out / "again"


@pytest.fixture(scope="module")
def resumed(out: Path, config: Path, teacher: Path, straight: list[list[str]]) -> Path:
    """The second half, from the checkpoint of the first."""
    more = {"load": out / "straight", "ckpt_step": HALF}
    run_job("distill", config, settings(out / "resumed", teacher, **more), num_ranks=4)
    return out / "resumed"


def whole(checkpoint: Path, step: int) -> dict[str, Any]:
    """All that the ranks have written: weights, optimizer state, random states."""
    file = checkpoint / f"whole-{step}.pt"
    if not file.exists():
        dcp_to_torch_save(checkpoint / f"iter_{step:07d}", file)
    found = torch.load(file, weights_only=False)
    for states in (it for name, it in found.items() if name.startswith("common_state")):
        for state in states:
            del state["args"]  # where it was saved, and from where it was loaded
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What is not the same in both, to the bit."""
    return sorted(name for name in one.keys() | other.keys() if as_bytes(one.get(name)) != as_bytes(other.get(name)))


def as_bytes(value: Any) -> Any:
    """Tensors by type, shape and bytes, so that NaN equals itself and 0.0 does not equal -0.0."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return value.dtype, tuple(value.shape), raw
    if isinstance(value, io.BytesIO):
        return as_bytes(torch.load(io.BytesIO(value.getvalue()), weights_only=False))
    if isinstance(value, Mapping):
        return {key: as_bytes(it) for key, it in value.items()}
    if isinstance(value, list | tuple):
        return [as_bytes(it) for it in value]
    return str(value)


def test_two_runs_are_equal_to_the_bit(out: Path, again: Path) -> None:
    one, other = scalars(out / "straight" / "tensorboard"), scalars(again / "tensorboard")
    timed = {name for name in one if "time" in name or "seconds" in name}
    compared = one.keys() - timed
    assert compared >= {"lm loss", "kd loss", "total loss", "grad-norm", "kd loss validation", "top-1 agreement"}
    assert len(one["kd loss"]) == STEPS and len(set(one["kd loss"])) == STEPS
    for name in compared:
        assert one[name] == other[name], name
    half, full = whole(out / "straight", HALF), whole(out / "straight", STEPS)
    assert differences(full, whole(again, STEPS)) == []
    # That could not be said of what is not there, or does not change.
    changed = differences(half, full)
    for part in ("decoder.layers.self_attention", "output_layer.weight", "exp_avg", "exp_avg_sq", "common_state"):
        assert any(part in name for name in changed), (part, sorted(full))
    assert len([name for name in changed if name.startswith("rng_state")]) == 4, "dropout took part on every rank"
    # What tensor-parallel ranks hold in common is dropped out alike, and what they share out is not.
    for stage in (0, 1):
        one, other = (random_states(full, stage, rank) for rank in (0, 1))
        assert differences(one, other) == ["rng_tracker_states"]


def random_states(full: Mapping[str, Any], stage: int, rank: int) -> dict[str, Any]:
    states = full[f"rng_state/shard_{stage}.{rank}_2.2"]
    while isinstance(states, list):
        (states,) = states
    return states


def test_a_resumed_run_is_equal_to_the_bit(out: Path, resumed: Path) -> None:
    one, other = scalars(out / "straight" / "tensorboard"), scalars(resumed / "tensorboard")
    for name in ("lm loss", "kd loss", "total loss", "grad-norm", "top-1 agreement"):
        assert other[name] == one[name][HALF:], name
    assert differences(whole(out / "straight", STEPS), whole(resumed, STEPS)) == []


def test_the_teacher_is_what_it_was(
    teacher: Path, files: dict[str, str], straight: list[list[str]], again: Path, resumed: Path
) -> None:
    for said in straight:
        assert [int(line.split()[0]) for line in said] == list(range(STEPS + 1))
        assert len({line.split()[1] for line in said}) == 1, "its weights in memory"
    assert len({said[0].split()[1] for said in straight}) == 4, "four shares"
    assert hashes(teacher) == files
