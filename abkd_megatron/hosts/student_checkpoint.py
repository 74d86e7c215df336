"""What Megatron will load the student from and save it to: looked at before anything is built."""

import errno
import fcntl
import logging
import os
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import checkpoint_exists

from abkd_megatron.errors import CheckpointError, ConfigError
from abkd_megatron.hosts.run_record import checkpoint_to_load
from abkd_megatron.teacher.checkpoint import check_whole
from abkd_megatron.teacher.compatibility import differences
from abkd_megatron.teacher.description import describe
from abkd_megatron.teacher.safe_load import read_common, read_index

# Megatron refuses other values of these by an assertion, whatever is loaded beside the weights.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_BLOCK = 4096

# In the folder of checkpoints; locked, not merely there, while a job writes to it.
_LOCK = ".writer.lock"
_SECONDS_FOR_THE_LAST_WRITER = 5.0  # a rank that was killed may take some to go

logger = logging.getLogger(__name__)


def check_folders(megatron: Mapping[str, Any]) -> None:
    """See that something can be written where the job will write: Megatron would find out at the first save.

    Args:
        megatron: the job's Megatron arguments, by their names in the configuration.

    Raises:
        ConfigError: a folder that cannot be made or written to.
    """
    for name in ("save", "tensorboard-dir"):
        if megatron.get(name) is None:
            continue
        folder = Path(str(megatron[name]))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_BLOCK))
                file.flush()
        except OSError as error:
            raise ConfigError(
                f"megatron.{name}: expected a folder that can be written to, got {folder} ({error.strerror}); give "
                "another folder, or make room there"
            ) from error


def check_save(args: Namespace) -> None:
    """Refuse to save to a folder of checkpoints that this run does not go on from: it would count them anew.

    Args:
        args: Megatron's of the student, as parsed.

    Raises:
        ConfigError: megatron.save holds a checkpoint of something else.
        CheckpointError: the file that names the iteration to load does not.
    """
    if not _saves(args) or not checkpoint_exists(args.save) or _goes_on_in(args.save, args):
        return
    last = Path(args.save, "latest_checkpointed_iteration.txt").read_text(errors="replace").strip()
    resume = " without megatron.finetune" if args.finetune else ""
    raise ConfigError(
        "megatron.save: expected a folder without checkpoints, or that of the checkpoint that this run goes on from, "
        f"got {args.save}, where the last is of step {last}; this run would write over it. Give another folder, or "
        f"megatron.load={args.save}{resume} to go on from there"
    )


def mixed_events(args: Namespace) -> str | None:
    """What there is to warn of where a run begins anew beside the event files of another one.

    Args:
        args: Megatron's of the student, as parsed.
    """
    folder = args.tensorboard_dir
    if folder is None or not any(Path(folder).glob("events.out.tfevents.*")):
        return None
    _, goes_on = checkpoint_to_load(args)
    if goes_on or (args.load is not None and args.save is not None and _same(args.load, args.save)):
        return None
    return (
        f"megatron.tensorboard-dir {folder} has the event files of an earlier job, and this run does not go on from a "
        "checkpoint: TensorBoard and `report` take both for one run, the later numbers of a step for its own; give "
        "another folder"
    )


def _saves(args: Namespace) -> bool:
    return args.save is not None and not args.skip_train


def _goes_on_in(save: str, args: Namespace) -> bool:
    directory, goes_on = checkpoint_to_load(args)
    return directory is not None and goes_on and _same(directory.parent, save)


def _same(first: str | Path, second: str | Path) -> bool:
    return Path(first).resolve() == Path(second).resolve()


@contextmanager
def only_writer(args: Namespace, *, asks: bool = False) -> Iterator[None]:
    """Hold the lock of the folder that a run saves to, which one process at a time can.

    It is a lock of the kernel's (POSIX) and ends with this process, however that ends; children do not inherit it.
    Where there can be none there is a warning.

    Args:
        args: Megatron's of the student, as parsed.
        asks: only look; nothing is created.

    Raises:
        ConfigError: another process holds it.
    """
    file = Path(args.save or "", _LOCK)
    if not _saves(args) or (asks and not file.exists()):
        yield
        return
    try:
        descriptor = os.open(file, os.O_RDWR | (0 if asks else os.O_CREAT), 0o666)
    except OSError as error:
        _warn(file, error)
        yield
        return
    try:
        _lock(descriptor, file, 0.0 if asks else _SECONDS_FOR_THE_LAST_WRITER)
        if not asks:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _warn(file: Path, error: OSError) -> None:
    logger.warning("%s cannot be locked (%s): a second job that writes there would not be seen", file, error.strerror)


def _lock(descriptor: int, file: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                _warn(file, error)
                return
        if time.monotonic() > until:
            owner = os.pread(descriptor, 400, 0).decode(errors="replace").strip() or "one that is not known"
            raise ConfigError(
                f"megatron.save: expected a folder that no other job writes to, got {file.parent}, where one does "
                f"({owner}); wait for its end, or give another folder. If its machine is gone for good, remove {file}"
            )
        time.sleep(0.2)


def check_student(args: Namespace) -> str | None:
    """Refuse a checkpoint that Megatron would fail to load the student from, or pass over without a word.

    A folder without a checkpoint is fine where the job saves to it, too: it is that of a job's first start.

    Args:
        args: Megatron's of the student, validated.

    Returns:
        In words, the settings other than sizes in which the model was another one, which may be meant; None for none.

    Raises:
        CheckpointError: nothing there, not whole, or of a model of another size.
    """
    load = args.load or args.pretrained_checkpoint
    if load is None:
        return None
    directory, _ = checkpoint_to_load(args)
    if directory is None:
        if args.save is not None and Path(args.save).absolute() == Path(load).absolute():
            return None
        hugging_face = (Path(load) / "config.json").is_file()
        found = (
            "one of Hugging Face, which has to be converted, for example by Megatron Bridge" if hugging_face else "none"
        )
        raise CheckpointError(
            f"expected a checkpoint of the student in {load}, found {found}; set megatron.load to the folder that "
            "Megatron's --save wrote, or leave it out to begin with new weights"
        )
    if not directory.is_dir():
        raise CheckpointError(
            f"expected the student's checkpoint in {directory}, found no such folder; give megatron.ckpt-step of an "
            f"iteration that is in {load}"
        )
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        return None  # in one of Megatron's older formats
    try:
        index = read_index(directory)
        check_whole(directory, index, "student")
        saved = read_common(directory, index).get("args")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or give megatron.ckpt-step of an earlier iteration") from error
    try:
        described = describe(directory, saved)
    except CheckpointError as error:
        return str(error)
    wrong = [
        f"{name.replace('_', '-')}: {described.source} has {theirs}, the configuration {getattr(args, name)}"
        for name in _SIZES
        if described is not None
        and (theirs := getattr(described.args, name, None)) is not None
        and theirs != getattr(args, name)
    ]
    if wrong:
        raise CheckpointError(
            f"the student's checkpoint in {directory} is not of the model configured; change `megatron:`, or "
            "megatron.load:\n  " + "\n  ".join(wrong)
        )
    _, changed = differences(described, args) if described is not None else (0, [])
    return "; ".join(changed) or None


@contextmanager
def other_schedule_named() -> Iterator[None]:
    """Megatron refuses to go on with another learning-rate schedule by an assertion: say what to give.

    Raises:
        ConfigError: in its place.
    """
    try:
        yield
    except AssertionError as error:
        if not str(error).startswith("OptimizerParamScheduler: class input value"):
            raise
        raise ConfigError(
            f"Megatron refuses to go on with another schedule of the learning rate ({error}), as another train-iters "
            "makes it; give megatron.override-opt_param-scheduler=true for this run's, or "
            "megatron.use-checkpoint-opt_param-scheduler=true for the checkpoint's"
        ) from error
