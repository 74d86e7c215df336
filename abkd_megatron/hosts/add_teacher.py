"""A teacher for the student that Megatron is about to build: its arguments, its objective, its place in the step."""

import argparse
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, print_rank_0

from abkd_megatron.config.schema import SCHEDULED, Config, DistillationConfig
from abkd_megatron.config.unsupported import UNSUPPORTED, checked_model_config
from abkd_megatron.errors import ConfigError, HostError, from_rank_0, on_every_rank
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Progress, Schedule
from abkd_megatron.preflight import run_record
from abkd_megatron.preflight.live import FirstStep, check_files, check_models
from abkd_megatron.preflight.rules import RESUME, TEACHER_CHECKS, Setup, run_checks
from abkd_megatron.student.attach import Attachment, attach
from abkd_megatron.student.projectors import add_projectors
from abkd_megatron.student.step import masked_loss
from abkd_megatron.teacher.args import open_teacher, teacher_arguments
from abkd_megatron.teacher.build import build_teacher

logger = logging.getLogger(__name__)


def add_teacher(
    config: Config,
    megatron: Mapping[str, Any],
    options: Mapping[str, argparse.Action],
    args: Namespace,
    model_config: Any,
    forward_step: Callable[..., tuple[Any, Any]],
    unsupported: Mapping[str, tuple[str, str]] = UNSUPPORTED,
) -> "DistilledStep":
    """Have Megatron give a teacher to the student that it is about to build.

    Args:
        config: checked for "distill"; `device`, `teacher` and `distillation` are used.
        megatron: the student's Megatron arguments, as `to_argv` takes them: the teacher's are derived from them.
        options: as `megatron_options` returns them.
        args: Megatron's arguments of the student, validated, with the true `vocab_size`.
        model_config: the student's GPTModelConfig; gets hooks, in which projectors are added, the teacher is built and
            attached, and `args` get a record of the distillation, `run_record.RECORD`, which Megatron saves with the
            checkpoint.
        forward_step: of Megatron's kind, with a model that is called with labels and the loss mask.
        unsupported: as `check_layout` takes it, for the teacher.

    Returns:
        The forward step for `pretrain`.

    Raises:
        AbkdError: on every rank, when something cannot be run; without torch.distributed, on those that see it.

    Collectives: one all_gather_object and one broadcast_object_list where torch.distributed is initialized, else the
    second in the hooks; there those of `TeacherCheckpoint.verify` for --verify-integrity, `check_files`,
    `build_teacher`, `attach` and `check_models`.
    """
    scheduled = make_objective(config.distillation)
    objective = scheduled.objective
    vocab_size, timeout = args.vocab_size, timedelta(minutes=args.distributed_timeout_minutes)
    with on_every_rank():
        teacher_args = teacher_arguments(megatron, config.teacher.megatron, options, args, unsupported)
        teacher_config = checked_model_config(teacher_args, "teacher", unsupported)
        checkpoint = open_teacher(config, megatron, options)
        setup = Setup(
            config=config,
            job="distill",
            student=args,
            vocab_size=vocab_size,
            teacher=teacher_args,
            checkpoint=checkpoint,
            objective=objective,
            kernel=kernel_of(config),
        )
        findings = run_checks(TEACHER_CHECKS, setup)
    step = DistilledStep(forward_step, needs_input_ids=objective.shares_part_of(vocab_size))

    def recorded() -> dict[str, Any]:
        run_checks([RESUME], setup)
        assert setup.record is not None
        return setup.record

    # Rank 0 reads for all: now if torch.distributed is initialized, else once Megatron has done so.
    early = from_rank_0(recorded) if torch.distributed.is_initialized() else None

    def with_projectors(student: list[torch.nn.Module]) -> list[torch.nn.Module]:
        pg_collection, size = get_attr_wrapped_model(student[0], "pg_collection"), teacher_args.hidden_size
        with on_every_rank():
            add_projectors(
                student,
                objective.hidden_losses,
                size,
                tp_group=pg_collection.tp,
                absent=setup.absent_projectors,
                seed=args.seed,
            )
        return student

    def attach_teacher(student: list[torch.nn.Module]) -> list[torch.nn.Module]:
        losses = [str(term) for term in (objective.divergence, *(loss for _, loss in objective.logit_losses)) if term]
        print_rank_0(f"distilling with {', '.join(losses)} from the teacher in {checkpoint.directory}")
        print_rank_0(f"teacher's checkpoint: {findings["teacher's checkpoint"].text}")
        for name, schedule in scheduled.schedules.items():
            print_rank_0(f"scheduled {name}: {schedule}")
        record = early or from_rank_0(recorded)
        setattr(args, run_record.RECORD, record)
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
            tokens=tokens,
            kernel=setup.kernel,
        )
        if step.attachment.plan is not None:
            record["plan"] = step.attachment.plan.record()
        step.first_step = check_models(
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


class DistilledStep:
    """A forward step of Megatron's kind, of a student that has a teacher: its numbers go into the report.

    The step within stays in charge of batches, and its loss function of the loss and of what it logs itself; `lm loss`
    is the student's cross entropy here, not what is trained.

    Attributes:
        attachment: the teacher's, once the model is built.
        first_step: what is looked at in the first training step, once the model is built.
        needs_input_ids: whether the step has to give the model its input ids on the last pipeline stage, too.
    """

    def __init__(self, forward_step: Callable[..., tuple[Any, Any]], needs_input_ids: bool) -> None:
        self.attachment: Attachment | None = None
        self.first_step: FirstStep | None = None
        self.needs_input_ids = needs_input_ids
        self._forward_step = forward_step

    def __call__(
        self, data_iterator: Iterator | None, model: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[Any, Callable[..., Any] | None]:
        """Run the step within, its model with the teacher.

        Returns:
            Its output, and its loss function with our numbers in the report.

        Raises:
            HostError: the model has no teacher.
        """
        if self.attachment is None:
            raise HostError(
                "expected a teacher beside the student, got none: the model was not built from the model config that "
                "was to add it; give pretrain() that one"
            )
        assert self.first_step is not None
        if model.training:
            self.first_step.begin(is_first=get_args().consumed_train_samples == 0)
        _set_progress(self.attachment, model.training)
        output, loss_func = self._forward_step(data_iterator, model, *args, **kwargs)
        return output, partial(self._loss, loss_func) if loss_func is not None else None

    def _loss(self, loss_func: Callable[..., Any], output_tensor: torch.Tensor, **kwargs: Any) -> Any:
        if kwargs:  # non_loss_data: what the caller collects is no loss
            return loss_func(output_tensor, **kwargs)
        assert self.attachment is not None and self.first_step is not None
        args = get_args()
        return loss_with_report(
            self.attachment,
            self.first_step,
            loss_func,
            output_tensor,
            args.check_for_nan_in_loss_and_grad,
            check_for_spikes=args.check_for_spiky_loss,
            save=args.save,
        )


def loss_with_report(
    attachment: Attachment,
    first_step: FirstStep,
    loss_func: Callable[..., Any],
    output_tensor: torch.Tensor,
    check_for_nan: bool,
    *,
    check_for_spikes: bool = False,
    save: str | None = None,
) -> tuple[Any, ...]:
    """What a loss function returns of a micro-batch, with our numbers in its report.

    Args:
        attachment: of the model whose last forward gave `output_tensor`.
        first_step: is told the losses.
        loss_func: of Megatron's kind: returns the loss, perhaps the number of tokens, and what it logs.
        output_tensor: [b, s], the loss a token.
        check_for_nan: as `masked_loss` takes it.
        check_for_spikes: likewise.
        save: likewise.

    Raises:
        ConfigError: the model was not given its loss mask.
    """
    assert attachment.report is not None
    if attachment.loss_mask is None:
        raise ConfigError(
            "expected a forward step that gives the model its loss mask, by which the teacher's numbers are "
            "summed, got None; call model(..., labels=labels, loss_mask=loss_mask)"
        )
    # First, since its checks say which of the losses is not finite.
    *_, ours = masked_loss(
        attachment.loss_mask,
        output_tensor,
        report=attachment.report,
        selected_only_metrics=attachment.selected_only_metrics,
        hidden=attachment.hidden,
        scheduled=attachment.scheduled,
        teacher_seconds=attachment.pop_teacher_seconds,
        check_for_nan=check_for_nan,
        check_for_spikes=check_for_spikes,
        tensors=attachment.pop_tensors(),
        save=save,
    )
    first_step.note_losses(ours)
    *loss, logged = loss_func(output_tensor)
    return (*loss, {**logged, **ours})


def make_objective(config: DistillationConfig) -> ScheduledObjective:
    """The objective that the `distillation:` section describes."""
    given = {name: getattr(config, name) for name in SCHEDULED}
    first = {name: Schedule.of(number)(Progress()) for name, number in given.items()}
    objective = Objective(
        config.make_divergence(),
        temperature=first["temperature"],
        kd_weight=first["kd_weight"],
        lm_weight=first["lm_weight"],
        head=config.head,
        chunk_tokens=config.chunk_tokens,
        gradient_in_place=config.gradient_in_place,
        shared_vocab=config.shared_vocab,
        diagnostics=config.diagnostics,
        logit_losses=config.make_logit_losses(),
        tokens=config.tokens,
        hidden_losses=config.make_hidden_losses(),
    )
    return ScheduledObjective(objective, {name: it for name, it in given.items() if isinstance(it, Schedule)})


def kernel_of(config: Config) -> str:
    """The kernel asked for; `auto` does not take one that every step would have to be compiled for."""
    gliding = config.distillation.gliding("triton")
    if config.distillation.kernel == "auto" and config.device == "cuda" and gliding:
        logger.info("eager kernel: triton would be compiled at every step for another %s", ", ".join(gliding))
        return "eager"
    return config.distillation.kernel


def _set_progress(attachment: Attachment, training: bool) -> None:
    """Tell how far Megatron is before this step; validation keeps the numbers of the step it follows."""
    args = get_args()
    if training:
        iteration, samples = args.curr_iteration, args.consumed_train_samples
    elif attachment.progress is None:  # no step before it: what was loaded was saved after one
        iteration = max(args.iteration - 1, 0)
        samples = max(args.consumed_train_samples - get_current_running_global_batch_size(), 0)
    else:
        return
    progress = Progress(iteration, samples, samples * args.seq_length)
    attachment.set_progress(progress)
    if training:
        run_record.note_progress(args, progress, attachment.scheduled)
