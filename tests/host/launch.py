"""Running Python programs on several CPU ranks, as torchrun would, with every rank's output and exit code kept."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import forked
import strict
from forked import ROOT
from ports import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass(frozen=True)
class Rank:
    code: int
    output: str
    ended: float
    """When, as time.time() has it; of a rank that had to be killed, when that was."""


def launch(
    arguments: Sequence[object],
    num_ranks: int,
    *,
    timeout_seconds: float = 240,
    seconds_after_failure: float = 20,
    plain: bool = False,
) -> list[Rank]:
    """Run `python ARGUMENTS` as one job of `num_ranks` processes, under the rules of `strict`.

    `plain` leaves gloo as it is, for jobs whose memory or operators of c10d are counted.

    A rank that fails leaves the others `seconds_after_failure` to end by themselves, before they are killed.
    """
    port = free_port()
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "STRICT": str(int(num_ranks > 1 and not plain)),
    }
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(num_ranks)]
        ranks = [
            forked.context().Process(
                target=_be_rank,
                args=(words, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output),
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            for process in ranks:
                process.start()
            ended = _wait(ranks, time.monotonic() + timeout_seconds, seconds_after_failure)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                    process.join()
                # What a killed rank has left behind.
                if process.pid is not None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        return [
            Rank(process.exitcode, output.read_text(errors="replace"), ended.get(process, time.time()))
            for process, output in zip(ranks, outputs, strict=True)
        ]


def _be_rank(words: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    """Become `python WORDS`, with file descriptors, environment and command line of its own."""
    os.setpgrp()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if environment["STRICT"] == "1":
        strict.install()
    # What the program starts itself, it starts as if nobody had forked it.
    multiprocessing.set_start_method(None, force=True)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _wait(
    ranks: Sequence[multiprocessing.Process], deadline: float, seconds_after_failure: float
) -> dict[multiprocessing.Process, float]:
    """When which of them have ended, at the deadline at the latest."""
    running, ended = {process.sentinel: process for process in ranks}, {}
    while running and time.monotonic() < deadline:
        for sentinel in connection.wait(running, timeout=deadline - time.monotonic()):
            process = running.pop(sentinel)
            ended[process] = time.time()
            if process.exitcode != 0:
                deadline = min(deadline, time.monotonic() + seconds_after_failure)
    return ended


def run_job(
    job: str,
    config: Path,
    overrides: Mapping[str, object] | None = None,
    *,
    num_ranks: int = 1,
    program: Sequence[object] = ("-m", "abkd_megatron"),
) -> list[Rank]:
    """Run one of the command line's jobs, or a program around it; every rank must end well."""
    settings = [f"{key}={value}" for key, value in (overrides or {}).items()]
    ranks = launch([*program, job, "--config", config, *settings], num_ranks)
    for number, rank in enumerate(ranks):
        assert rank.code == 0, f"rank {number} of {job} ended with {rank.code}:\n{rank.output[-6000:]}"
    return ranks


def scalars(tensorboard_dir: Path) -> dict[str, list[float]]:
    """What Megatron's own writer put into TensorBoard: {name: values in the order of their steps}, fp32 as written."""
    events = EventAccumulator(str(tensorboard_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def found_per_ranks(program: Path, references: Path) -> Callable[[int], dict[str, Any]]:
    """Return a function of a number of ranks that returns what `program` has printed after ``FOUND ``, run once.

    The program gets `references`, which its run on one rank writes and others read.
    """
    jobs: dict[int, dict[str, Any]] = {}

    def found(num_ranks: int) -> dict[str, Any]:
        if num_ranks not in jobs:
            if num_ranks > 1:
                found(1)  # which leaves the references
            jobs[num_ranks] = {}  # a job that fails is not run again for each of its cases
            ranks = launch([program, references], num_ranks)
            for number, rank in enumerate(ranks):
                assert rank.code == 0, f"rank {number} of {num_ranks}:\n{rank.output[-6000:]}"
            (line,) = [line for line in ranks[0].output.splitlines() if line.startswith("FOUND ")]
            jobs[num_ranks] = json.loads(line.removeprefix("FOUND "))
        return jobs[num_ranks]

    return found
