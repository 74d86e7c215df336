"""Run a function on several gloo ranks of this machine, from a test.

Ranks are forked from a server that has torch imported (`forked.py`), so a launch costs a fraction of a second.
"""

import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import pytest
import strict
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode


def chosen(request: pytest.FixtureRequest) -> list[int]:
    """Return the cases that the session's tests read, as `index`, from a fixture `ranks` with this parameter."""
    mine = [item.callspec.params for item in request.session.items if item.path == request.path and "[" in item.name]
    found = {it["index"] for it in mine if "index" in it and it.get("ranks") == request.param}
    return sorted(found) or list(range(len(request.module.CASES)))


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; the message has the first traceback."""


class CollectiveCounter(TorchDispatchMode):
    """Counts operations below autograd, and lists collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.collectives: list[str] = []

    def __enter__(self):
        self.before = len(strict.ISSUED)
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.collectives = strict.ISSUED[self.before :]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120) -> list[Any]:
    """What `fn(rank, world_size, *args)` returned on each of `world_size` gloo ranks, in rank order.

    `fn` must be importable (a module's own function), `args` and results picklable. torch.distributed is
    initialized when it is called. If a rank fails, the others are ended at once.

    Raises:
        RankFailed: if a rank raises, dies, or is not done after timeout_seconds.
    """
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory(prefix="abkd_ranks_") as directory:
        forked.context()  # starts the server, as it has to be
        context = mp.start_processes(
            _rank_main,
            (fn, world_size, args, directory, timeout_seconds),
            nprocs=world_size,
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        try:
            while not context.join(timeout=max(0.0, min(1.0, deadline - time.monotonic()))):
                if time.monotonic() > deadline:
                    alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    raise RankFailed(f"ranks {alive} of {world_size} not done after {timeout_seconds} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            # A rank that dies takes its peers' collectives down with it: the earliest traceback is the cause.
            reports = sorted(Path(directory).glob("failed_*"), key=lambda report: report.stat().st_mtime_ns)
            raise RankFailed(reports[0].read_text() if reports else str(error)) from None
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(directory, f"result_{rank}"), weights_only=False) for rank in range(world_size)]


def _rank_main(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    directory: str,
    timeout_seconds: float,
) -> None:
    faulthandler.dump_traceback_later(0.9 * timeout_seconds)  # where a hung rank stood, on its stderr
    torch.set_num_threads(1)
    strict.install()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        torch.save(fn(rank, world_size, *args), Path(directory, f"result_{rank}"))
        dist.barrier()
    except BaseException:
        report = Path(directory, f"failed_{rank}")
        report.with_suffix(".part").write_text(f"rank {rank} of {world_size} failed:\n{traceback.format_exc()}")
        report.with_suffix(".part").rename(report)
        raise
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of Python's own end: a thread of gloo's that then asks for Python's lock aborts the process.
    os._exit(0)
