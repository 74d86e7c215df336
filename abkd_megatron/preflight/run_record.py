"""Record of teacher and loss in the student's checkpoint, and its comparison when a run resumes.

The record is an attribute of Megatron's arguments, which Megatron saves with the tensors and loads without using it.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import checkpoint_exists

from abkd_megatron.cache.manifest import Identity
from abkd_megatron.config.schema import PLAIN, Config, DistillationConfig
from abkd_megatron.config.yaml import flow
from abkd_megatron.errors import CheckpointError, ConfigError
from abkd_megatron.losses.schedule import Progress
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.safe_load import read_common

# The attribute of Megatron's arguments. Its value is plain dicts, strings and numbers for weights_only loading.
RECORD = "abkd_distillation"

# Keys of `distillation:` that do not change the loss.
_NOT_OF_LOSS = (
    *("kernel", "head", "chunk_tokens", "gradient_in_place", "diagnostics", "skip_preflight", "on_change"),
    "preset",  # its values are recorded
    *("cache", "on_miss"),  # so is what a cache holds
)


def record(
    config: Config,
    teacher: TeacherCheckpoint | Identity,
    others: Sequence[tuple[Sequence[int], TeacherCheckpoint | Identity]] = (),
) -> dict[str, Any]:
    """Return what defines the loss: {"distillation": {key: YAML on one line}, "teacher": `TeacherCheckpoint.identity`}.

    With `others`, pairs of sources and their teacher, also {"teachers": {source: identity}}.

    A custom loss is recorded by its dotted path; its source is not recorded. A cache is recorded by its teacher, and by
    the number and precision of its log-probabilities, as the key `cache` of its teacher's identity with `others`.
    """
    settings = _settings(config)
    if isinstance(teacher, TeacherCheckpoint):
        found = {"distillation": settings, "teacher": teacher.identity()}
        if others:
            found["teachers"] = {str(at): _identity(other) for sources, other in others for at in sources}
        if any(isinstance(other, Identity) for _, other in others):
            settings["on_miss"] = config.distillation.on_miss
        return found
    of_teacher = _identity(teacher)
    settings |= {"cache": of_teacher.pop("cache"), "on_miss": config.distillation.on_miss}
    return {"distillation": settings, "teacher": of_teacher}


def _identity(teacher: TeacherCheckpoint | Identity) -> dict[str, Any]:
    """Return path, iteration and hash of a teacher, and the form of its records if it is cached."""
    if isinstance(teacher, TeacherCheckpoint):
        return teacher.identity()
    form = f"top {teacher.top_k}" + (f" and {teacher.draws} draws" if teacher.draws else "")
    return {
        "path": teacher.teacher_path,
        "iteration": teacher.teacher_iteration,
        "sha256": teacher.teacher,
        "cache": f"{form}, {teacher.precision}",
    }


def note_progress(args: Namespace, progress: Progress, scheduled: Mapping[str, float]) -> None:
    """Add the progress of a training step and the values of its schedules to the record that is saved next."""
    getattr(args, RECORD)["last step"] = {"progress": asdict(progress), "scheduled": dict(scheduled)}


def checkpoint_to_load(args: Namespace) -> tuple[Path | None, bool]:
    """Return the folder of the iteration that Megatron will load the student from.

    Args:
        args: Megatron's, validated.

    Returns:
        The folder, None without a checkpoint; and whether the run resumes from it, not only loads its weights.

    Raises:
        CheckpointError: the file with the iteration is invalid.
    """
    load, weights_only = args.load, args.finetune
    if not checkpoint_exists(load) and args.pretrained_checkpoint is not None:
        load, weights_only = args.pretrained_checkpoint, True
    if not checkpoint_exists(load):  # Megatron reports other errors
        return None, False
    tracker = Path(load, "latest_checkpointed_iteration.txt")
    saved = str(args.ckpt_step or tracker.read_text(errors="replace").strip())
    if saved != "release" and not saved.isdigit():
        raise CheckpointError(
            f"expected an iteration or `release` in {tracker}, got {saved!r}; write the iteration into it, or give "
            "megatron.ckpt-step"
        )
    return Path(load, f"iter_{int(saved):07d}" if saved.isdigit() else saved), not weights_only


def check_resumed(args: Namespace, now: dict[str, Any], on_change: str) -> str | None:
    """Compare this run's record with the record of the checkpoint that it resumes from.

    Args:
        args: Megatron's of the student, validated.
        now: as `record` returns it. If the checkpoint's record differs, it is appended to ``now["before"]``.
        on_change: "refuse" or "warn".

    Returns:
        A warning; None if nothing changed or the run does not resume.

    Raises:
        ConfigError: for "refuse", with all changes and the options.
        CheckpointError: the checkpoint cannot be read.
    """
    directory, before = _record_in_checkpoint(args)
    if directory is None:
        return None
    if before is None:
        return (
            f"the checkpoint in {directory} has no record of a distillation, so the teacher and loss of this run are "
            "not compared with it"
        )
    changed = _changes(before, now)
    if not changed:
        if "before" in before:
            now["before"] = before["before"]
        return None
    message = f"this run would resume from {directory} with another teacher or loss than it was trained with:\n  " + (
        "\n  ".join(changed)
    )
    if on_change == "refuse":
        raise ConfigError(
            f"{message}\ngive the checkpoint's settings; or distillation.on_change=warn to resume with these; or "
            "megatron.finetune=true to start at iteration 0 with its weights"
        )
    now["before"] = [*before.get("before", []), {name: it for name, it in before.items() if name != "before"}]
    return message


def check_resumed_alone(args: Namespace) -> str | None:
    """Return a warning if a run without a teacher resumes from a checkpoint of a distilled student, else None.

    Args:
        args: Megatron's, validated.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    directory, before = _record_in_checkpoint(args)
    if before is None:
        return None
    return (
        f"this run resumes from {directory}, which was distilled from {_shown(before['teacher'])}, without a "
        "teacher: it trains on cross entropy only"
    )


def _record_in_checkpoint(args: Namespace) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the checkpoint that this run resumes from and its record; None for what does not exist."""
    directory, resumes = (None, False) if args.skip_train else checkpoint_to_load(args)
    if directory is None or not resumes or not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
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
        # A key that a version or a divergence does not have counts as its default.
        default = flow(getattr(PLAIN, name, None))
        there, here = (of.get(name, default) for of in (theirs, ours))
        if there != here:
            changes.append(f"distillation.{name}: {there} in the checkpoint, {here} in this run")
    there, here = before["teacher"], now["teacher"]
    if there["sha256"] != here["sha256"]:  # the path does not matter
        changes.append(f"teacher: {_shown(there)} in the checkpoint, {_shown(here)} in this run")
    of_sources = [of.get("teachers", {}) for of in (before, now)]
    for source in sorted({source for of in of_sources for source in of}, key=int):
        at_source, here_at = (of.get(source, default) for of, default in zip(of_sources, (there, here), strict=True))
        if any(at_source.get(key) != here_at.get(key) for key in ("sha256", "cache")):
            changes.append(
                f"teacher of source {source}: {_shown(at_source)} in the checkpoint, {_shown(here_at)} in this run"
            )
    return changes


def _shown(teacher: Mapping[str, Any]) -> str:
    form = f", from a cache of {teacher['cache']}" if "cache" in teacher else ""
    return f"{teacher['path']} (iteration {teacher['iteration']}, sha256 {teacher['sha256'][:12]}{form})"
