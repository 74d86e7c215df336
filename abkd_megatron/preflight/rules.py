"""Checks of a job before its first optimizer step. `abkd-megatron check` runs the early phases, a job all of them."""

from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.training import print_rank_0
from megatron.training.checkpointing import checkpoint_exists

from abkd_megatron import kernels
from abkd_megatron.cache.manifest import Identity
from abkd_megatron.cache.record import RecordLayout
from abkd_megatron.config.cross_tokenizer import check_cross_tokenizer
from abkd_megatron.config.model_config import model_config
from abkd_megatron.config.rollouts import check_can_sample, check_sizes
from abkd_megatron.config.schema import PREFLIGHT, Config
from abkd_megatron.config.stages import layers_of_stages
from abkd_megatron.data.conversations import check_conversations
from abkd_megatron.data.indexed import check_datasets, prefixes_of, with_positions
from abkd_megatron.errors import AbkdError, ConfigError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.preflight import first_step, models, run_record, student_checkpoint
from abkd_megatron.preflight.first_step import Observed, Rounding
from abkd_megatron.student.hidden import Layers, check_layers
from abkd_megatron.student.plan import check_fused, obstacles_of, try_kernel
from abkd_megatron.student.supported import (
    check_cacheable,
    check_mixed_batches,
    check_mixed_forms,
    check_several_teachers,
    check_shared_vocab,
    check_tokens,
)
from abkd_megatron.teacher.args import OtherTeacher, check_teacher
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.checksums import check_contents
from abkd_megatron.teacher.compatibility import tokenizer_identity
from abkd_megatron.vocab_parallel.execution import Execution


class Phase(Enum):
    """The stage of a job from which a check can run."""

    CONFIG = "config"
    """Needs the configuration and Megatron's arguments of both models."""
    FILES = "files"
    """Also needs the job's files."""
    MODELS = "models"
    """Needs the job's ranks and models."""
    FIRST_STEP = "first step"
    """Needs the batches and losses of the first step."""


class Verdict(Enum):
    """Result of a check, as `abkd-megatron check` prints it."""

    OK = "ok"
    WARNING = "warning"
    ABSENT = "not here"
    """A file is not on this machine, so it was not checked."""
    REJECTED = "rejected"


class Finding(NamedTuple):
    """Description or warning that a check returns."""

    text: str
    verdict: Verdict = Verdict.OK


class Check[Subject](NamedTuple):
    """A named check."""

    name: str
    phase: Phase
    run: Callable[[Subject], Finding | None]
    """Raises an `AbkdError` to reject the job. Returns None if there is nothing to report."""


@dataclass(kw_only=True)
class Setup:
    """Subject of the phases `config` and `files`. Checks skip what is None."""

    config: Config
    job: str
    """``pretrain`` or ``distill``."""
    student: Namespace | None = None
    """Megatron's arguments of the student: parsed for `FOLDER_CHECKS`, validated for all others."""
    vocab_size: int | None = None
    """True size of the student's vocabulary, in tokens; None if its tokenizer is not on this machine."""
    teacher: Namespace | None = None
    """Megatron's arguments of the teacher, validated."""
    checkpoint: TeacherCheckpoint | None = None
    others: Sequence[OtherTeacher] = ()
    """Teachers of some data sources."""
    cache: Identity | None = None
    """Of the cache that is used in place of a teacher."""
    objective: Objective | None = None
    execution: Execution | None = None
    dry_run: bool = False
    """Whether this is not the job: files may be on another machine, and nothing is written or built."""
    absent_projectors: Sequence[str] = ()
    """Set by the check of hidden losses, see `add_projectors`."""
    record: dict[str, Any] | None = None
    """Set by the check of a resume: the run's record, see `run_record.record`."""


def run_checks[Subject](
    checks: Sequence[Check[Subject]], subject: Subject, skip: Collection[str] = ()
) -> dict[str, Finding]:
    """Run checks of a job in order and print their warnings.

    Args:
        checks: some of `CHECKS`, with one type of subject.
        subject: of these checks.
        skip: `distillation.skip_preflight`.

    Returns:
        The findings by name of the check.

    Raises:
        AbkdError: of the first check that fails. If it can be skipped, the message names the setting.
    """
    findings = {}
    for check in checks:
        if check.name in skip:
            continue
        try:
            finding = check.run(subject)
        except AbkdError as error:
            if check.name not in PREFLIGHT:
                raise
            hint = f"or leave this check out: distillation.skip_preflight=[{check.name}]"
            raise type(error)(f"{error}; {hint}") from error
        if finding is not None:
            findings[check.name] = finding
            if finding.verdict is Verdict.WARNING:
                print_rank_0(f"WARNING: {finding.text}")
    return findings


def _output_folders(setup: Setup) -> None:
    if not setup.dry_run:  # creates them
        student_checkpoint.check_folders(setup.config.megatron)


def _save_folder(setup: Setup) -> Finding | None:
    if setup.student is None or setup.student.save is None:
        return None
    student_checkpoint.check_save(setup.student)
    if setup.dry_run:  # a job takes the lock
        with student_checkpoint.only_writer(setup.student, asks=True):
            pass
    return Finding(setup.student.save)


def _event_files(setup: Setup) -> Finding | None:
    mixed = student_checkpoint.mixed_events(setup.student) if setup.student is not None else None
    return Finding(mixed, Verdict.WARNING) if mixed is not None else None


def _datasets(setup: Setup) -> Finding | None:
    prefixes = prefixes_of(setup.student) if setup.student is not None else []
    if setup.student is not None and setup.student.sft and prefixes:
        check_conversations(prefixes)
        return Finding(f"{len(prefixes)} files of conversations")
    prefixes = list(dict.fromkeys([*prefixes, *setup.config.validation.sets.values()]))
    if setup.dry_run:
        prefixes = [it for it in prefixes if all(Path(it + end).is_file() for end in (".bin", ".idx"))]
    if not prefixes:
        return None
    count = sum(tokens.count for tokens in check_datasets(prefixes, setup.vocab_size).values())
    ids = f"ids below {setup.vocab_size}" if setup.vocab_size is not None else "ids of an unknown vocabulary"
    return Finding(f"{len(prefixes)} of the expected sizes, {count} tokens; in samples: index entries, {ids}")


def _student_checkpoint(setup: Setup) -> Finding | None:
    args = setup.student
    paths = [path for path in (args.load, args.pretrained_checkpoint) if path is not None] if args is not None else []
    if args is None or not paths:
        return None
    found = [path for path in paths if checkpoint_exists(path)]
    if setup.dry_run and not found:
        return Finding(f"none in {', '.join(paths)}", Verdict.ABSENT)
    other = student_checkpoint.check_student(args)
    if other is not None:
        return Finding(f"the student's checkpoint is of another model: {other}", Verdict.WARNING)
    return Finding(f"in {found[0]}") if found else None


def _resume_without_teacher(setup: Setup) -> Finding | None:
    if setup.job != "pretrain" or setup.student is None:
        return None
    distilled = run_record.check_resumed_alone(setup.student)
    return Finding(distilled, Verdict.WARNING) if distilled is not None else None


def _teacher_checkpoint(setup: Setup) -> Finding | None:
    checkpoint = setup.checkpoint
    if checkpoint is None:
        return None
    if setup.student is None or setup.teacher is None:
        return Finding(f"{checkpoint.directory}: complete; not compared with the configuration")
    size = setup.vocab_size
    if size is None:  # the teacher's vocabulary can only be compared with itself
        described = checkpoint.described
        size = getattr(described.args, "vocab_size", None) if described is not None else None
    compared = check_teacher(setup.config, checkpoint, setup.teacher, size or setup.student.vocab_size)
    return Finding(f"{checkpoint.directory}: complete, and of the configured model; compared with {compared}")


def _other_teachers(setup: Setup) -> Finding | None:
    """Check each teacher of some data sources like the default one, and that they go together."""
    found, verdict = [], Verdict.OK
    for other in setup.others:
        of_one = replace(setup, config=other.config, teacher=other.args, checkpoint=other.checkpoint, others=())
        of_one.cache = other.identity
        with other.named():
            if other.identity is not None and other.identity.layout != _layout_of_caches(setup):
                raise ConfigError(
                    f"expected records of one form in all caches of the list `teachers`, got {other.identity.layout} "
                    f"and {_layout_of_caches(setup)}; write one of them again with the other's top_k, draws and "
                    "precision"
                )
            dtypes = {str(args.params_dtype) for args in (setup.teacher, other.args) if args is not None}
            if len(dtypes) > 1:
                raise ConfigError(
                    f"expected one dtype of all teachers, got {' and '.join(sorted(dtypes))}: their logits are in one "
                    "tensor; give it the same bf16 or fp16"
                )
            checks = (_teacher_checkpoint, _teacher_tokenizer, _cache)
            findings = [finding for check in checks if (finding := check(of_one))]
        if not findings or any(finding.verdict is Verdict.ABSENT for finding in findings):
            verdict = Verdict.ABSENT
        found.append(f"{other.name}: {'; '.join(finding.text for finding in findings) or 'not here'}")
    return Finding("; ".join(found), verdict) if found else None


def _layout_of_caches(setup: Setup) -> RecordLayout | None:
    """Return the layout of the records of the first of `others` that has a cache."""
    return next((of.identity.layout for of in setup.others if of.identity is not None), None)


def _cache(setup: Setup) -> Finding | None:
    """Compare a cache with the job that reads it."""
    cache, args, config = setup.cache, setup.student, setup.config
    if cache is None or args is None:
        return None
    expected = {
        "tokenizer": tokenizer_identity(args),
        "seq_length": args.seq_length,
        "reset_attention_mask": args.reset_attention_mask,
        "temperature": float(config.distillation.make_objective().objective.temperature),
    }
    if setup.vocab_size is not None:
        expected["vocab_size"] = setup.vocab_size
    cache.check(Path(str(config.distillation.cache)).expanduser(), expected)
    return Finding(f"of {cache.teacher_path}: {cache.layout.form}, {cache.layout.bytes_per_token} bytes")


def _teacher_tokenizer(setup: Setup) -> Finding | None:
    """Compare the tokenizers, since two vocabularies may have the same size."""
    if setup.checkpoint is None or setup.student is None or setup.config.distillation.shared_vocab is not None:
        return None
    owner = setup.student if setup.config.distillation.cross_tokenizer is None else setup.teacher
    theirs, ours = setup.checkpoint.tokenizer, owner.tokenizer_model if owner is not None else None
    if theirs is None or ours is None:
        return None
    if not setup.checkpoint.check_tokenizer(ours):
        missing = ", ".join(path for path in (theirs, ours) if not Path(path).exists())
        return Finding(f"{missing or theirs}: not compared with {ours}", Verdict.ABSENT)
    return Finding("the student's" if owner is setup.student else ours)


def _loss(setup: Setup) -> Finding | None:
    """Reject early what `attach` rejects when the models are built."""
    objective, student = setup.objective, setup.student
    if objective is None or student is None or (setup.teacher is None and setup.cache is None):
        return None
    with_positions(objective.sources, student)
    check_mixed_batches(objective, student)
    check_several_teachers(objective, 1 + len(setup.others))
    if any(of.cache is not None for of in setup.others):
        layout, execution = _layout_of_caches(setup), setup.execution
        draws, diagnostics = layout.draws if layout is not None else 0, execution is not None and execution.diagnostics
        scheduled = setup.config.distillation.make_objective()
        check_mixed_forms(scheduled, draws, student.context_parallel_size, diagnostics)
    if setup.vocab_size is not None:
        check_shared_vocab(objective, setup.vocab_size, student.context_parallel_size)
        check_tokens(objective, setup.vocab_size)
        if objective.cross_tokenizer is not None and setup.teacher is not None:
            check_cross_tokenizer(student, setup.teacher)
        if setup.cache is not None:
            check_cacheable(setup.config.distillation.make_objective(), setup.cache.draws)
        if setup.execution is not None:
            check_fused(setup.execution, obstacles_of(objective, setup.vocab_size))
    return Finding(str(objective.divergence or ", ".join(objective.names_of_logit_losses)))


def _on_policy(setup: Setup) -> Finding | None:
    settings, student = setup.config.distillation.on_policy, setup.student
    if settings is None or student is None or setup.objective is None:
        return None
    check_can_sample(student, student.hybrid_layer_pattern)
    check_sizes(settings, student)
    if settings.is_mixed and student.log_interval > 1:
        return Finding(
            f"distillation.on_policy: with log-interval {student.log_interval} Megatron's printed means divide by all "
            "steps, those on data and those on own text alike; TensorBoard has each step's own numbers",
            Verdict.WARNING,
        )
    return Finding(f"{settings}")


def _kernel(setup: Setup) -> Finding | None:
    if setup.objective is None or setup.student is None or setup.config.device != "cpu":
        return None
    if not setup.dry_run:  # a job tries it on the ranks that use it
        return None
    with kernels.using(setup.execution.kernel if setup.execution is not None else None):
        try_kernel(setup.objective, torch.empty(0, dtype=setup.student.params_dtype))
    return Finding(f"{setup.config.distillation.kernel}: tried")


def _hidden_losses(setup: Setup) -> Finding | None:
    objective, student, teacher = setup.objective, setup.student, setup.teacher
    if objective is None or student is None or teacher is None or not objective.hidden_losses:
        return None
    setup.absent_projectors = student_checkpoint.absent_projectors(student, objective.hidden_losses)
    if student.pipeline_model_parallel_layout or teacher.pipeline_model_parallel_layout:
        return Finding(
            "layers of a pipeline-model-parallel-layout are checked when the models are built", Verdict.ABSENT
        )
    layout = [(of.tensor_model_parallel_size, of.pipeline_model_parallel_size) for of in (student, teacher)]
    same_layout = layout[0] == layout[1] and student.sequence_parallel == teacher.sequence_parallel
    stages = {}
    if same_layout:
        ours, theirs = (
            layers_of_stages(model_config(args).transformer, args.hybrid_layer_pattern) for args in (student, teacher)
        )
        stages = {stage: Layers(stage, ours[stage], theirs[stage]) for stage in range(layout[0][1])}
    sizes = (student.hidden_size, teacher.hidden_size)
    check_layers(objective.hidden_losses, stages, same_layout=same_layout, sizes=sizes)
    return Finding(", ".join(loss.name for loss in objective.hidden_losses))


def _resume(setup: Setup) -> Finding | None:
    checkpoint = setup.checkpoint if setup.teacher is not None else None
    source = setup.cache or checkpoint
    if source is None or setup.student is None:
        return None
    found = [(of.sources, of.checkpoint or of.identity) for of in setup.others]
    others = [(sources, other) for sources, other in found if other is not None]
    if len(others) < len(setup.others):  # a dry run without the checkpoints
        return None
    setup.record = run_record.record(setup.config, source, others)
    changed = run_record.check_resumed(setup.student, setup.record, setup.config.distillation.on_change)
    return Finding(changed, Verdict.WARNING) if changed is not None else None


def _teacher_checksums(checkpoint: TeacherCheckpoint) -> None:
    check_contents(checkpoint.directory, checkpoint.index, dist.get_rank(), dist.get_world_size())


def _batch(observed: Observed) -> None:
    for teacher in observed.teachers or (None,):
        first_step.check_batch(observed.student, teacher)


def _teacher_loss(observed: Observed) -> None:
    for name, loss in observed.teacher_losses.items():
        if loss is not None:
            first_step.check_teacher_loss(loss, observed.vocab_size, name)
        elif len(observed.teacher_losses) > 1:
            print_rank_0(f"{name} has no token in the first step, so its loss there is not checked")


def _expected_loss(observed: Observed) -> None:
    loss = observed.teacher_losses.get("the teacher")
    if loss is not None and observed.expected_loss is not None:
        first_step.check_expected_loss(loss, observed.expected_loss)


def _fp32_range(observed: Observed) -> None:
    if observed.kd_loss is not None:
        first_step.check_fp32_range(observed.kd_loss, observed.kd_weight)


def _teacher_rounding(found: Rounding) -> Finding:
    first_step.check_rounding(found)
    return Finding(str(found))


# In the order of a job, grouped by their subject and by the ranks that run them.
FOLDER_CHECKS: tuple[Check[Setup], ...] = (
    Check("output folders", Phase.FILES, _output_folders),
    Check("save folder", Phase.FILES, _save_folder),
)
EVENT_FILES: Check[Setup] = Check("event files", Phase.FILES, _event_files)
# One rank reads for all.
STUDENT_CHECKS: tuple[Check[Setup], ...] = (
    Check("student's checkpoint", Phase.FILES, _student_checkpoint),
    Check("datasets", Phase.FILES, _datasets),
    Check("resume without teacher", Phase.FILES, _resume_without_teacher),
)
TEACHER_CHECKS: tuple[Check[Setup], ...] = (
    Check("teacher's checkpoint", Phase.FILES, _teacher_checkpoint),
    Check("teacher's tokenizer", Phase.FILES, _teacher_tokenizer),
    Check("teachers by source", Phase.FILES, _other_teachers),
    Check("teacher's cache", Phase.FILES, _cache),
    Check("loss", Phase.CONFIG, _loss),
    Check("own text", Phase.CONFIG, _on_policy),
    Check("kernel", Phase.CONFIG, _kernel),
    Check("hidden losses", Phase.FILES, _hidden_losses),
)
RESUME: Check[Setup] = Check("resume", Phase.FILES, _resume)
EARLY_CHECKS = (*FOLDER_CHECKS, EVENT_FILES, *STUDENT_CHECKS, *TEACHER_CHECKS, RESUME)
# The ranks of a job share the reading.
CHECKSUMS: Check[TeacherCheckpoint] = Check("teacher_checksums", Phase.MODELS, _teacher_checksums)
MODEL_CHECKS: tuple[Check[models.Models], ...] = (
    Check("teacher_weights", Phase.MODELS, models.check_weights),
    Check("memory", Phase.MODELS, models.check_memory),
    Check("gradient", Phase.MODELS, models.check_gradient),
)
FIRST_STEP_CHECKS: tuple[Check[Observed], ...] = (
    Check("batch", Phase.FIRST_STEP, _batch),
    Check("teacher_loss", Phase.FIRST_STEP, _teacher_loss),
    Check("expected_loss", Phase.FIRST_STEP, _expected_loss),
    Check("fp32_range", Phase.FIRST_STEP, _fp32_range),
)
ROUNDING: Check[Rounding] = Check("teacher_rounding", Phase.FIRST_STEP, _teacher_rounding)
CHECKS: tuple[Check[Any], ...] = (*EARLY_CHECKS, CHECKSUMS, *MODEL_CHECKS, *FIRST_STEP_CHECKS, ROUNDING)
