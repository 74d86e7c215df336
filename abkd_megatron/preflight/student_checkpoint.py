"""Checks of the folders that the student is loaded from and saved to, before anything is built."""

import errno
import fcntl
import logging
import os
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import checkpoint_exists

from abkd_megatron.config.pattern import pattern_of
from abkd_megatron.errors import CheckpointError, ConfigError
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.preflight.run_record import checkpoint_to_load
from abkd_megatron.student.projectors import PROJECTORS
from abkd_megatron.teacher.checkpoint import check_unquantized, check_whole, tensor_shapes
from abkd_megatron.teacher.compatibility import differences
from abkd_megatron.teacher.description import describe
from abkd_megatron.teacher.model import check_gpt_source
from abkd_megatron.teacher.safe_load import read_common, read_index

# Megatron asserts that these are the same, whatever is loaded with the weights.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_BLOCK = 4096

# In the folder of checkpoints. The file stays; its lock shows that a job writes to the folder.
_LOCK = ".writer.lock"
_SECONDS_FOR_THE_LAST_WRITER = 5.0  # a killed rank may take some time to end

logger = logging.getLogger(__name__)


def check_folders(megatron: Mapping[str, Any]) -> None:
    """Check that the output folders can be written to. Megatron would fail at the first save.

    Args:
        megatron: the job's Megatron arguments, by their names in the configuration.

    Raises:
        ConfigError: a folder cannot be created or written to.
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
    """Reject a save folder with checkpoints from which this run does not resume: it would overwrite them.

    Args:
        args: Megatron's of the student, as parsed.

    Raises:
        ConfigError: megatron.save has checkpoints of another run.
        CheckpointError: the file with the iteration to load is invalid.
    """
    if not _saves(args) or not checkpoint_exists(args.save) or _resumes_in(args.save, args):
        return
    last = Path(args.save, "latest_checkpointed_iteration.txt").read_text(errors="replace").strip()
    resume = " without megatron.finetune" if args.finetune else ""
    raise ConfigError(
        "megatron.save: expected a folder without checkpoints, or the folder from which this run resumes, "
        f"got {args.save}, where the last is of step {last}; this run would overwrite it. Give another folder, or "
        f"megatron.load={args.save}{resume} to resume from it"
    )


def mixed_events(args: Namespace) -> str | None:
    """Return a warning if a new run would write to the folder of another run's event files, else None.

    Args:
        args: Megatron's of the student, as parsed.
    """
    folder = args.tensorboard_dir
    if folder is None or not any(Path(folder).glob("events.out.tfevents.*")):
        return None
    _, resumes = checkpoint_to_load(args)
    if resumes or (args.load is not None and args.save is not None and _same(args.load, args.save)):
        return None
    return (
        f"megatron.tensorboard-dir {folder} has the event files of an earlier job, and this run does not resume from a "
        "checkpoint: TensorBoard and `report` would show both as one run; give another folder"
    )


def _saves(args: Namespace) -> bool:
    return args.save is not None and not args.skip_train


def _resumes_in(save: str, args: Namespace) -> bool:
    directory, resumes = checkpoint_to_load(args)
    return directory is not None and resumes and _same(directory.parent, save)


def _same(first: str | Path, second: str | Path) -> bool:
    return Path(first).resolve() == Path(second).resolve()


@contextmanager
def only_writer(args: Namespace, *, asks: bool = False) -> Iterator[None]:
    """Hold the lock of the save folder, which only one process can hold.

    It is a POSIX lock of the kernel: it ends with this process, however that ends, and children do not inherit it.
    On a file system without locks there is only a warning.

    Args:
        args: Megatron's of the student, as parsed.
        asks: whether to check the lock only, without creating a file.

    Raises:
        ConfigError: another process holds the lock.
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
    logger.warning(
        "%s cannot be locked (%s): a second job that writes there would not be detected", file, error.strerror
    )


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
            owner = os.pread(descriptor, 400, 0).decode(errors="replace").strip() or "an unknown job"
            raise ConfigError(
                f"megatron.save: expected a folder that no other job writes to, got {file.parent}, where one does "
                f"({owner}); wait for its end, or give another folder. If its machine is gone for good, remove {file}"
            )
        time.sleep(0.2)


def check_student(args: Namespace) -> str | None:
    """Reject a student's checkpoint that Megatron would fail to load, or would silently ignore.

    A folder without a checkpoint is accepted if the job also saves to it: this is the first start of the job.

    Args:
        args: Megatron's of the student, validated.

    Returns:
        Text with the settings other than sizes that differ, which may be intended; None if none differs.

    Raises:
        CheckpointError: there is no checkpoint, it is not complete, or its model has another size.
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
    check_unquantized(directory, index, "student")
    try:
        described = describe(directory, saved)
    except CheckpointError as error:
        return str(error)
    ours = {name: getattr(args, name) for name in _SIZES}
    if saved is not None and (pattern_of(saved) is None) != (args.hybrid_layer_pattern is None):
        ours["num_layers"] = _check_other_kind(args, saved)
    wrong = [
        f"{name.replace('_', '-')}: {described.source} has {theirs}, the configuration {ours[name]}"
        for name in _SIZES
        if described is not None
        and (theirs := getattr(described.args, name, None)) is not None
        and theirs != ours[name]
    ]
    if wrong:
        raise CheckpointError(
            f"the student's checkpoint in {directory} is not of the model configured; change `megatron:`, or "
            "megatron.load:\n  " + "\n  ".join(wrong)
        )
    _, changed = differences(described, args) if described is not None else (0, [])
    return "; ".join(changed) or None


def _check_other_kind(args: Namespace, saved: Namespace) -> int:
    """Reject a checkpoint of another class of model than the student's, unless Megatron can translate it.

    Returns:
        The number of layers of a GPTModel from which this HybridModel can start.

    Raises:
        CheckpointError: the layers cannot be translated, or the optimizer's state would be loaded as well.
    """
    if args.hybrid_layer_pattern is None:
        raise CheckpointError(
            f"the student's checkpoint is a HybridModel's of the pattern {pattern_of(saved)}, the configured student a "
            "GPTModel; set megatron.hybrid-layer-pattern, or another megatron.load"
        )
    layers = check_gpt_source(args.hybrid_layer_pattern, "student")
    if not args.no_load_optim and not getattr(saved, "no_save_optim", False):
        raise CheckpointError(
            "the student's checkpoint is a GPTModel's, and Megatron would load the state of its optimizer with the "
            "weights, even with megatron.finetune; give megatron.no-load-optim=true"
        )
    return layers


def absent_projectors(args: Namespace, losses: Sequence[HiddenLoss]) -> list[str]:
    """Return the projectors that the student's checkpoint does not have, as after plain training.

    Args:
        args: Megatron's of the student, validated.
        losses: all hidden losses of the objective.

    Returns:
        Their `HiddenLoss.pair`.

    Raises:
        ConfigError: Megatron would also load the optimizer's state, which has none for these projectors.
    """
    wanted = [loss.pair for loss in losses if loss.projector]
    directory, resumes = checkpoint_to_load(args)
    if not wanted or directory is None:
        return []
    found: set[str] = set()
    if dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        found = set(tensor_shapes(directory))
    absent = [pair for pair in wanted if f"{PROJECTORS}.{pair}.weight" not in found]
    if absent and resumes and not args.no_load_optim:
        raise ConfigError(
            f"expected the projectors of the hidden losses {', '.join(absent)} in {directory}, from which this run "
            "would resume; give megatron.finetune=true to start with its weights and new projectors"
        )
    return absent


@contextmanager
def other_schedule_named() -> Iterator[None]:
    """Replace Megatron's assertion about another learning-rate schedule by an error that names the settings.

    Raises:
        ConfigError: in place of the AssertionError.
    """
    try:
        yield
    except AssertionError as error:
        if not str(error).startswith("OptimizerParamScheduler: class input value"):
            raise
        raise ConfigError(
            f"Megatron does not resume with another schedule of the learning rate ({error}), as another train-iters "
            "makes it; give megatron.override-opt_param-scheduler=true for this run's, or "
            "megatron.use-checkpoint-opt_param-scheduler=true for the checkpoint's"
        ) from error
