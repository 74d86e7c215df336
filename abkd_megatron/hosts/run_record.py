"""What a student's checkpoint says of its distillation, and a resume that would go on with something else.

It is an attribute of Megatron's arguments, which Megatron saves beside the tensors and reads without having to know it.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import checkpoint_exists

from abkd_megatron.config.schema import Config, DistillationConfig
from abkd_megatron.config.yaml import flow
from abkd_megatron.errors import CheckpointError, ConfigError
from abkd_megatron.losses.schedule import Progress
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.safe_load import read_common

# The attribute of Megatron's arguments. Plain dicts, text and numbers, which weights_only loading takes.
RECORD = "abkd_distillation"

# What of `distillation:` leaves the loss as it is.
_NOT_OF_LOSS = ("kernel", "head", "chunk_tokens", "gradient_in_place", "diagnostics", "skip_preflight", "on_change")


def record(config: Config, teacher: TeacherCheckpoint) -> dict[str, Any]:
    """What decides the loss: {"distillation": {key: YAML on one line}, "teacher": `TeacherCheckpoint.identity`}.

    A loss of one's own is recorded by its dotted path: what is in its file is not looked at.
    """
    return {"distillation": _settings(config), "teacher": teacher.identity()}


def note_progress(args: Namespace, progress: Progress, scheduled: Mapping[str, float]) -> None:
    """Put the progress of a step of training, and what schedules gave for it, into the record that is saved next."""
    getattr(args, RECORD)["last step"] = {"progress": asdict(progress), "scheduled": dict(scheduled)}


def checkpoint_to_load(args: Namespace) -> tuple[Path | None, bool]:
    """What Megatron will load the student from: the iteration's folder, if there is one.

    Args:
        args: Megatron's, validated.

    Returns:
        The folder, and whether the run goes on from there; if not, it begins with those weights.

    Raises:
        CheckpointError: the file that names the iteration does not.
    """
    load, begins = args.load, args.finetune
    if not checkpoint_exists(load) and args.pretrained_checkpoint is not None:
        load, begins = args.pretrained_checkpoint, True
    if not checkpoint_exists(load):  # what else there may be to refuse is Megatron's
        return None, False
    tracker = Path(load, "latest_checkpointed_iteration.txt")
    saved = str(args.ckpt_step or tracker.read_text(errors="replace").strip())
    if saved != "release" and not saved.isdigit():
        raise CheckpointError(
            f"expected an iteration or `release` in {tracker}, got {saved!r}; write the iteration into it, or give "
            "megatron.ckpt-step"
        )
    return Path(load, f"iter_{int(saved):07d}" if saved.isdigit() else saved), not begins


def check_resumed(args: Namespace, now: dict[str, Any], on_change: str) -> str | None:
    """Compare the record of the checkpoint that this run goes on from with this run's.

    Args:
        args: Megatron's of the student, validated.
        now: as `record` returns it. If the checkpoint says otherwise, it gets what that says, as `before`.
        on_change: "refuse" or "warn".

    Returns:
        What there is to warn of; None if nothing changed, or if there is nothing to go on from.

    Raises:
        ConfigError: for "refuse", saying what changed, from what to what, and how to go on.
        CheckpointError: the checkpoint cannot be read.
    """
    directory, before = _record_in_checkpoint(args)
    if directory is None:
        return None
    if before is None:
        return (
            f"the checkpoint in {directory} does not say what it was distilled with, if it was: whether this run goes "
            "on with the same teacher and loss is not looked at"
        )
    changed = _changes(before, now)
    if not changed:
        if "before" in before:
            now["before"] = before["before"]
        return None
    said = f"this run would go on from {directory} with another teacher or loss than it was trained with:\n  " + (
        "\n  ".join(changed)
    )
    if on_change == "refuse":
        raise ConfigError(
            f"{said}\ngive what the checkpoint has; or distillation.on_change=warn to go on all the same; or "
            "megatron.finetune=true to begin with its weights at iteration 0"
        )
    now["before"] = [*before.get("before", []), {name: it for name, it in before.items() if name != "before"}]
    return said


def check_resumed_alone(args: Namespace) -> str | None:
    """What there is to warn of where a run without a teacher goes on from a checkpoint of a distilled student.

    Args:
        args: Megatron's, validated.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    directory, before = _record_in_checkpoint(args)
    if before is None:
        return None
    return (
        f"this run goes on from {directory}, which was distilled from {_shown(before['teacher'])}, without a "
        "teacher: on cross entropy alone"
    )


def _record_in_checkpoint(args: Namespace) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that this run goes on training from, if it does, and the record in it, if there is one."""
    directory, goes_on = (None, False) if args.skip_train else checkpoint_to_load(args)
    if directory is None or not goes_on or not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        return None, None
    try:
        common = read_common(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or give megatron.ckpt-step of an earlier iteration") from error
    return directory, getattr(common.get("args"), RECORD, None)


def _settings(config: Config) -> dict[str, str]:
    left_out = {*_NOT_OF_LOSS, *config.without_effect()}
    values = {item.name: getattr(config.distillation, item.name) for item in fields(DistillationConfig)}
    return {name: flow(value) for name, value in values.items() if name not in left_out}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    theirs, ours = before["distillation"], now["distillation"]
    changes = []
    for name in dict.fromkeys([*ours, *theirs]):
        # A key that this or that version, or the chosen divergence, does not have is at its default.
        default = flow(getattr(DistillationConfig(), name, None))
        there, here = (of.get(name, default) for of in (theirs, ours))
        if there != here:
            changes.append(f"distillation.{name}: {there} in the checkpoint, {here} in this run")
    there, here = before["teacher"], now["teacher"]
    if there["sha256"] != here["sha256"]:  # where it lies is of no consequence
        changes.append(f"teacher: {_shown(there)} in the checkpoint, {_shown(here)} in this run")
    return changes


def _shown(teacher: Mapping[str, Any]) -> str:
    return f"{teacher['path']} (iteration {teacher['iteration']}, sha256 {teacher['sha256'][:12]})"
