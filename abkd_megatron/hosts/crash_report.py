"""What a rank says when its job ends by an unforeseen error: where it was, whose fault it may be, how to go on."""

import shutil
import traceback
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from abkd_megatron.config.megatron_args import assertion
from abkd_megatron.errors import brief

# CheckpointException is no Exception.
UNFORESEEN = (Exception, CheckpointException)

_OWN = "by an error on this rank"

# By a function of Megatron's on the stack, the innermost concern first.
_DOING = {
    "save_checkpoint": "in the save after step {}",
    "evaluate_and_print_results": "in validation after step {}",
    "train_step": "in step {}",
}


def has_begun(error: BaseException) -> bool:
    """Whether the first training step had begun on this rank when it was raised."""
    if not hasattr(_args(), "curr_iteration"):
        return False
    frames = {frame.f_code.co_name: frame for frame, _ in traceback.walk_tb(error.__traceback__)}
    # Megatron's loop has a preparation of its own.
    return "train" not in frames or "train_step" in frames or "loss_dict" in frames["train"].f_locals


def before_the_first_step(error: BaseException) -> str:
    """Tell of an error that ends the job before its first step what it is and what to do.

    Args:
        error: one of `UNFORESEEN`, as it was caught.

    Returns:
        A message of one line.
    """
    text = " ".join(str(error).partition("Exception raised from")[0].split())  # without torch's stack in C++
    name = type(error).__name__
    what = f"{name}: {brief(text)}" if text else f"{name} of `{assertion(error)}`"
    cause = _cause(error, _args())
    if cause == _OWN:
        return f"ended before the first step by {what}; change the setting or the file that leads there"
    return f"ended before the first step {cause} ({what})"


def last_words(error: BaseException) -> str:
    """Tell of an error in training what a traceback does not: the step, if another rank is the cause, what is saved.

    Args:
        error: one of `UNFORESEEN`, as it was caught.

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
    doing = next((words for function, words in _DOING.items() if function in functions), "after step {}")
    return doing.format(args.curr_iteration + 1)


def _cause(error: BaseException, args: Namespace) -> str:
    text = str(error)
    if isinstance(error, CheckpointException):
        return (
            "because the checkpoint could not be written or read, here or on another rank; the log of that rank has "
            f"the cause{_free(args)}"
        )
    # gloo's errors are RuntimeErrors; its own sources stand in them.
    if not isinstance(error, dist.DistError) and "gloo/" not in text:
        return _OWN
    if "timed out" in text.lower() or "timeout" in text.lower():
        minutes = getattr(args, "distributed_timeout_minutes", 10)
        return (
            f"because another rank did not answer for {minutes} min (distributed-timeout-minutes): it is stopped, "
            "stuck or too slow; look at its log and its machine"
        )
    return (
        "because another rank of the job has ended or cannot be reached; the rank that failed first has the cause in "
        "its log, or was killed and says nothing"
    )


def _free(args: Namespace) -> str:
    if not getattr(args, "save", None) or not Path(args.save).is_dir():
        return ""
    return f"; {shutil.disk_usage(args.save).free / 2**30:.1f} GiB are free in {args.save}"


def _saved(args: Namespace) -> str:
    """The last checkpoint of this run, and how to go on from there."""
    if not getattr(args, "save", None):
        return "Nothing was saved: megatron.save is not set"
    tracker = Path(args.save) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return f"No checkpoint was finished in {args.save}"
    return f"The last checkpoint is of step {tracker.read_text().strip()}; megatron.load={args.save} goes on from there"
