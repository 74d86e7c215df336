"""One fault in one job: python inject.py PLACE STEP RANK WHAT -- ARGUMENTS OF abkd_megatron.

On rank RANK (-1: on all), at the first call of PLACE in training step STEP (0: before the first), WHAT happens, and the
job is on its own again. Only functions are wrapped; the classes of models stay what they are.
"""

import functools
import importlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

# The function at whose call it happens, as `module:name`.
PLACES = {
    "teacher is read": "abkd_megatron.teacher.checkpoint:TeacherCheckpoint.load",
    "preflight": "abkd_megatron.hosts.add_teacher:check_models",
    "data": "abkd_megatron.hosts.megatron_lm:get_batch",
    "teacher's forward": "abkd_megatron.teacher.runner:TeacherRunner.run",
    "lane, send": "abkd_megatron.teacher.channel:Channel.send",
    "lane, receive": "abkd_megatron.teacher.channel:Channel.receive",
    "loss, between collectives": "abkd_megatron.vocab_parallel.passes:Passes.conclude",
    "sampling": "abkd_megatron.rollouts.sampler:Sampler._step",
    "backward": "megatron.core.pipeline_parallel.schedules:backward_step",
    "optimizer step": "megatron.core.optimizer:ChainedOptimizer.step",
    "validation": "megatron.training.training:evaluate",
    "save": "megatron.core.dist_checkpointing.strategies.filesystem_async:_write_item",
    "save, all is written": "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.finish",
}
FULL = "/dev/full"  # writing there ends with the kernel's own ENOSPC
SECONDS_SLOW = 5


def main() -> None:
    place, step, rank, what, *behind = sys.argv[1:]
    assert behind[0] == "--", sys.argv
    if int(rank) in (-1, int(os.environ["RANK"])):
        _install(PLACES[place], int(step), ACTIONS[what], f"{what} in {place}")
    sys.argv = ["abkd_megatron", *behind[1:]]
    runpy.run_module("abkd_megatron", run_name="__main__", alter_sys=True)


def _install(path: str, step: int, action: Callable[..., None], said: str) -> None:
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = vars(owner)[name]

    @functools.wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        if _step() >= step:
            setattr(owner, name, original)
            print(f"\ninjected at {time.time()}: {said}", flush=True)
            action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def _step() -> int:
    """The training step, from 1, as Megatron logs it; 0 before the first."""
    from megatron.training.global_vars import _GLOBAL_ARGS as args

    return getattr(args, "curr_iteration", -1) + 1


def _signal(number: signal.Signals) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), number)


def _raise(*_: object) -> None:
    raise RuntimeError("injected")


def _fill_disk(transforms: object, stream: Any, *_: object) -> None:
    """From here on this file of the checkpoint is on a full disk."""
    full = os.open(FULL, os.O_WRONLY)
    os.dup2(full, stream.fileno())
    os.close(full)


ACTIONS: dict[str, Callable[..., None]] = {
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGSTOP": _signal(signal.SIGSTOP),
    "SIGTERM": _signal(signal.SIGTERM),
    # torchrun, or what else has started this rank.
    "SIGTERM to the launcher": lambda *_: os.kill(os.getppid(), signal.SIGTERM),
    "raise": _raise,
    "slow": lambda *_: time.sleep(SECONDS_SLOW),
    "full disk": _fill_disk,
}

if __name__ == "__main__":
    main()
