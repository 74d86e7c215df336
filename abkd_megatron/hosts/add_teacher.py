"""A teacher for the student that Megatron is about to build: its arguments, its objective, its place in the step."""

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, print_rank_0

from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import SCRIPT
from abkd_megatron.errors import ConfigError, from_rank_0, on_every_rank
from abkd_megatron.hosts import run_record
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.losses.schedule import Progress
from abkd_megatron.preflight.live import check_files, check_models
from abkd_megatron.student.attach import attach
from abkd_megatron.student.hidden import PROJECTORS, add_projectors
from abkd_megatron.student.report import LossChecks
from abkd_megatron.student.step import DistilledStep
from abkd_megatron.student.supported import check_tokens
from abkd_megatron.teacher.args import check_teacher, open_teacher, teacher_arguments
from abkd_megatron.teacher.build import build_teacher
from abkd_megatron.teacher.checkpoint import tensor_shapes

logger = logging.getLogger(__name__)


def add_teacher(
    config: Config,
    megatron: Mapping[str, Any],
    args: Namespace,
    model_config: Any,
    forward_step: Callable[..., tuple[Any, Any]],
    host: str = SCRIPT,
) -> DistilledStep:
    """Have Megatron give a teacher to the student that it is about to build.

    Args:
        config: checked for "distill"; `device`, `teacher` and `distillation` are used.
        megatron: the student's Megatron arguments, as `to_argv` takes them: the teacher's are derived from them.
        args: Megatron's arguments of the student, validated, with the true `vocab_size`.
        model_config: the student's GPTModelConfig; gets hooks, in which projectors are added, the teacher is built and
            attached, and `args` get a record of the distillation, `run_record.RECORD`, which Megatron saves with the
            checkpoint.
        forward_step: of Megatron's kind, with a model that is called with labels and the loss mask.
        host: as `check_layout` takes it, for the teacher.

    Returns:
        The forward step for `pretrain`.

    Raises:
        AbkdError: on every rank, when something cannot be run; without torch.distributed, on those that see it.

    Collectives: one all_gather_object and one broadcast_object_list where torch.distributed is initialized, else the
    second in the hooks; there those of `TeacherCheckpoint.verify` for --verify-integrity, `check_files`,
    `build_teacher`, `attach` and `check_models`.
    """
    scheduled = config.distillation.make_objective()
    objective = scheduled.objective
    vocab_size, timeout = args.vocab_size, timedelta(minutes=args.distributed_timeout_minutes)
    with on_every_rank():
        check_tokens(objective, vocab_size)
        teacher_args, teacher_config = teacher_arguments(megatron, config.teacher.megatron, args, host)
        checkpoint = open_teacher(config, megatron)
        compared = check_teacher(config, checkpoint, teacher_args, vocab_size)
        if objective.shared_vocab is None:
            checkpoint.check_tokenizer(args.tokenizer_model)
        absent = absent_projectors(args, objective.hidden_losses)
    step = DistilledStep(forward_step, MegatronHost(), needs_input_ids=objective.shares_part_of(vocab_size))

    def recorded() -> tuple[dict[str, Any], str | None]:
        record = run_record.record(config, checkpoint)
        return record, run_record.check_resumed(args, record, config.distillation.on_change)

    # Rank 0 reads and tells the others: now if it can, else once Megatron has initialized torch.distributed.
    early = from_rank_0(recorded) if torch.distributed.is_initialized() else None

    def with_projectors(student: list[torch.nn.Module]) -> list[torch.nn.Module]:
        pg_collection, size = get_attr_wrapped_model(student[0], "pg_collection"), teacher_args.hidden_size
        with on_every_rank():
            add_projectors(
                student, objective.hidden_losses, size, tp_group=pg_collection.tp, absent=absent, seed=args.seed
            )
        return student

    def attach_teacher(student: list[torch.nn.Module]) -> list[torch.nn.Module]:
        losses = [str(term) for term in (objective.divergence, *(loss for _, loss in objective.logit_losses)) if term]
        print_rank_0(f"distilling with {', '.join(losses)} from the teacher in {checkpoint.directory}")
        print_rank_0(f"the teacher's settings were compared with {compared}")
        for name, schedule in scheduled.schedules.items():
            print_rank_0(f"scheduled {name}: {schedule}")
        record, changed = early or from_rank_0(recorded)
        setattr(args, run_record.RECORD, record)
        if changed is not None:
            print_rank_0(f"WARNING: {changed}")
        pg_collection = get_attr_wrapped_model(student[0], "pg_collection")
        # Megatron leaves a model there that it was to initialize there.
        teacher_config.transformer.use_cpu_initialization = next(student[0].parameters()).device.type == "cpu"
        if teacher_args.verify_integrity:
            checkpoint.verify()
        check_files(checkpoint, config.distillation.skip_preflight)
        tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
        step.attachment = attach(
            student,
            build_teacher(
                teacher_config,
                checkpoint,
                pg_collection,
                sequence_parallel=args.sequence_parallel,
                timeout=timeout,
            ),
            scheduled,
            vocab_size=vocab_size,
            pg_collection=pg_collection,
            timeout=timeout,
            execution=config.make_execution(),
            tokens=tokens,
        )
        if step.attachment.plan is not None:
            record["plan"] = step.attachment.plan.record()
        check_models(
            student,
            step.attachment,
            vocab_size=vocab_size,
            pg_collection=pg_collection,
            tokens=tokens,
            skip=config.distillation.skip_preflight,
            expected_loss=config.teacher.expected_loss,
        )
        return student

    if objective.hidden_losses:
        model_config.pre_wrap_hooks.append(with_projectors)
    model_config.post_wrap_hooks.append(attach_teacher)
    return step


class MegatronHost:
    """Megatron-LM's training loop."""

    def progress(self, training: bool) -> Progress:
        """Return Megatron's progress before this training step, or before the last one."""
        args = get_args()
        if training:
            iteration, samples = args.curr_iteration, args.consumed_train_samples
        else:  # what was loaded was saved after a step
            iteration = max(args.iteration - 1, 0)
            samples = max(args.consumed_train_samples - get_current_running_global_batch_size(), 0)
        return Progress(iteration, samples, samples * args.seq_length)

    def loss_checks(self) -> LossChecks:
        """Return what Megatron's arguments ask for."""
        args = get_args()
        return LossChecks(nan=args.check_for_nan_in_loss_and_grad, spikes=args.check_for_spiky_loss, save=args.save)

    def log(self, progress: Progress, scheduled: Mapping[str, float]) -> None:
        """Put the position of the schedules into the record that the next checkpoint saves."""
        run_record.note_progress(get_args(), progress, scheduled)


def absent_projectors(args: Namespace, losses: Sequence[HiddenLoss]) -> list[str]:
    """The projectors that the student's checkpoint does not have, as one of plain training; allowed to begin with.

    Raises:
        ConfigError: if Megatron would also resume the optimizer from it, which has no state of theirs.
    """
    wanted = [loss.pair for loss in losses if loss.projector]
    directory, goes_on = run_record.checkpoint_to_load(args)
    if not wanted or directory is None:
        return []
    found: set[str] = set()
    if dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        found = set(tensor_shapes(directory))
    absent = [pair for pair in wanted if f"{PROJECTORS}.{pair}.weight" not in found]
    if absent and goes_on and not args.no_load_optim:
        raise ConfigError(
            f"expected the projectors of the hidden losses {', '.join(absent)} in {directory}, where this run would go "
            "on; give megatron.finetune=true to begin with its weights and new projectors"
        )
    return absent
