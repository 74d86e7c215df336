"""What Megatron will load the student from and save it to: looked at before anything is built."""

import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from abkd_megatron.distillation.checkpoint import check_whole, differences
from abkd_megatron.distillation.description import describe
from abkd_megatron.distillation.safe_reading import read_common, read_index
from abkd_megatron.errors import CheckpointError, ConfigError
from abkd_megatron.integrations.provenance import checkpoint_to_load

# Megatron refuses other values of these by an assertion, whatever is loaded beside the weights.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_BLOCK = 4096


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
