"""Crash report for unexpected exceptions: step, likely cause, how to resume."""

import shutil
import traceback
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from abkd_megatron.config.megatron_args import assertion
from abkd_megatron.errors import brief

# CheckpointException is not an Exception.
UNEXPECTED = (Exception, CheckpointException)

_OWN = "by an error on this rank"

# By the name of Megatron's function on the stack; the first that is found counts.
_DOING = {
    "save_checkpoint": "in the save after step {}",
    "evaluate_and_print_results": "in validation after step {}",
    "train_step": "in step {}",
}


def training_started(error: BaseException) -> bool:
    """Return whether the first training step had started on this rank when the error was raised."""
    if not hasattr(_args(), "curr_iteration"):
        return False
    frames = {frame.f_code.co_name: frame for frame, _ in traceback.walk_tb(error.__traceback__)}
    # Megatron's training loop prepares much before its first step.
    return "train" not in frames or "train_step" in frames or "loss_dict" in frames["train"].f_locals


def describe_startup_error(error: BaseException) -> str:
    """Describe an unexpected error before the first step: its text and the likely cause.

    Args:
        error: one of `UNEXPECTED`, as caught.

    Returns:
        A message of one line.
    """
    text = " ".join(str(error).partition("Exception raised from")[0].split())  # without torch's C++ stack
    name = type(error).__name__
    what = f"{name}: {brief(text)}" if text else f"{name} of `{assertion(error)}`"
    cause = _cause(error, _args())
    if cause == _OWN:
        return f"ended before the first step by {what}; change the setting or the file that causes it"
    return f"ended before the first step {cause} ({what})"


def describe_crash(error: BaseException) -> str:
    """Describe an error in training by what a traceback lacks: the step, the likely cause, and the last checkpoint.

    Args:
        error: one of `UNEXPECTED`, as caught.

    Returns:
        A message of one line.
    """
    args = _args()
    first = next(iter(str(error).splitlines()), "")
    name = type(error).__name__ + (f": {first}" if first else "")
    return f"ended {_where(error, args)} {_cause(error, args)} ({name}; traceback above). {_saved(args)}"


def _args() -> Namespace:
    try:
        return get_args()
    except AssertionError:  # Megatron has not read its arguments yet
        return Namespace()


def _where(error: BaseException, args: Namespace) -> str:
    if not hasattr(args, "curr_iteration"):
        return "before the first step"
    functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    doing = next((text for function, text in _DOING.items() if function in functions), "after step {}")
    return doing.format(args.curr_iteration + 1)


def _cause(error: BaseException, args: Namespace) -> str:
    text = str(error)
    if isinstance(error, CheckpointException):
        return (
            "because the checkpoint could not be written or read, here or on another rank; see the log of that "
            f"rank{_free(args)}"
        )
    # gloo raises RuntimeErrors that contain its source files.
    if not isinstance(error, dist.DistError) and "gloo/" not in text:
        return _OWN
    if "timed out" in text.lower() or "timeout" in text.lower():
        minutes = getattr(args, "distributed_timeout_minutes", 10)
        return (
            f"because another rank did not answer for {minutes} min (distributed-timeout-minutes): it is stopped, "
            "stuck or too slow; see its log and its machine"
        )
    return (
        "because another rank of the job has ended or cannot be reached; see the log of the rank that failed first. A "
        "rank that was killed logs nothing"
    )


def _free(args: Namespace) -> str:
    if not getattr(args, "save", None) or not Path(args.save).is_dir():
        return ""
    return f"; {shutil.disk_usage(args.save).free / 2**30:.1f} GiB are free in {args.save}"


def _saved(args: Namespace) -> str:
    """Return the step of the last checkpoint, and how to resume from it."""
    if not getattr(args, "save", None):
        return "Nothing was saved: megatron.save is not set"
    tracker = Path(args.save) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return f"No checkpoint was finished in {args.save}"
    return f"The last checkpoint is of step {tracker.read_text().strip()}; megatron.load={args.save} resumes from it"
