"""The scripts in examples/launch start a job on several nodes: all of it here on one machine.

torchrun is the real one. Slurm is not where the tests run: `srun` and `scontrol` stand in for its two commands, each
task a process that is told its number as Slurm tells it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT
from ports import free_port

SRUN = """\
#!/usr/bin/env bash
until [[ "$1" == bash ]]; do echo "srun option $1"; shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SCONTROL = """\
#!/usr/bin/env bash
[[ "$1 $2 $3" == "show hostnames node[0-1]" ]] && echo 127.0.0.1 && echo 127.0.0.2
"""


def environment(**more: object) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    of_all = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    of_all.pop("MASTER_ADDR", None)
    return {**of_all, **{name: str(value) for name, value in more.items()}}


@pytest.fixture
def job(config: Path, teacher: Path, tmp_path: Path) -> list[str]:
    """A distillation of two steps, data parallel over two ranks; the second of them prints the losses."""
    return [
        *("distill", "--config", str(config), f"teacher.load={teacher}", f"megatron.save={tmp_path / 'run'}"),
        *("megatron.train-iters=2", "megatron.save-interval=2"),
    ]


def test_two_nodes_by_torchrun(job: list[str], tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [
        subprocess.Popen(
            ["bash", ROOT / "examples/launch/torchrun.sh", *job],
            env=environment(NNODES=2, NPROC=1, ENDPOINT=endpoint, LOGS=tmp_path / f"node{node}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-6000:]
    logs = sorted(tmp_path.glob("node*/*/attempt_0/0/stdout.log"))
    assert len(logs) == 2
    assert sum("kd loss" in log.read_text() for log in logs) == 1
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "2"


def test_slurm_tasks_are_ranks(job: list[str], tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": os.getpid(), "SLURM_NTASKS": 2, "SLURM_NNODES": 1}
    told = environment(**slurm, IMAGE="some/image", MOUNTS="/data:/data")
    told["PATH"] = os.pathsep.join([str(tmp_path), told["PATH"]])
    ended = subprocess.run(
        ["bash", ROOT / "examples/launch/slurm.sh", *job],
        env=told,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    assert "kd loss" in ended.stdout
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "2"
    options = [line.removeprefix("srun option ") for line in ended.stdout.splitlines() if line.startswith("srun opt")]
    assert options[2:4] == ["--container-image", "some/image"]
    assert options[5] == f"{ROOT}:{ROOT},/data:/data"
