"""Running the command line on several CPU ranks, as torchrun would, with every rank's output and exit code kept."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Rank:
    code: int
    output: str


def launch(arguments: Sequence[object], num_ranks: int, *, timeout_seconds: float = 240) -> list[Rank]:
    """Run `python ARGUMENTS` as one job of `num_ranks` processes; a rank that fails ends the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        for rank in range(num_ranks)
    ]
    return [Rank(code, output) for code, output in _wait(ranks, time.monotonic() + timeout_seconds)]


def _wait(ranks: Sequence[subprocess.Popen], deadline: float) -> list[tuple[int, str]]:
    outputs: dict[int, str] = {}
    while len(outputs) < len(ranks):
        for index, process in enumerate(ranks):
            if index in outputs:
                continue
            try:
                outputs[index] = process.communicate(timeout=0.2)[0]
            except subprocess.TimeoutExpired:
                continue
            if process.returncode != 0:
                deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
            deadline = float("inf")
    return [(process.returncode, outputs[index]) for index, process in enumerate(ranks)]


def run_job(job: str, config: Path, overrides: Mapping[str, object] | None = None, *, num_ranks: int = 1) -> list[Rank]:
    """Run one of the command line's jobs; every rank must end well."""
    settings = [f"{key}={value}" for key, value in (overrides or {}).items()]
    ranks = launch(["-m", "abkd_megatron", job, "--config", config, *settings], num_ranks)
    for number, rank in enumerate(ranks):
        assert rank.code == 0, f"rank {number} of {job} ended with {rank.code}:\n{rank.output[-6000:]}"
    return ranks


def scalars(tensorboard_dir: Path) -> dict[str, list[float]]:
    """What Megatron's own writer put into TensorBoard: {name: values in the order of their steps}, fp32 as written."""
    events = EventAccumulator(str(tensorboard_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
