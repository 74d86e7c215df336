"""Teacher of a run of Megatron-LM's training loop: hooks of the student's model config, and the forward step."""

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, unwrap_model
from megatron.training import get_args, get_tokenizer, print_rank_0

from abkd_megatron.config.model_config import check_layers_here
from abkd_megatron.config.rollouts import OnPolicy
from abkd_megatron.config.schema import PREFLIGHT, Config
from abkd_megatron.config.unsupported import SCRIPT
from abkd_megatron.data.indexed import with_positions
from abkd_megatron.errors import from_rank_0, on_every_rank
from abkd_megatron.hosts.align import aligner_of
from abkd_megatron.losses.objective import ScheduledObjective
from abkd_megatron.losses.schedule import Progress
from abkd_megatron.preflight import run_record
from abkd_megatron.preflight.live import check_files, check_loaded, check_models
from abkd_megatron.preflight.rounding import is_measured, measure
from abkd_megatron.preflight.rules import RESUME, TEACHER_CHECKS, Setup, run_checks
from abkd_megatron.rollouts.own_text import OwnText, Sizes, load_function
from abkd_megatron.rollouts.sampler import Sampler
from abkd_megatron.student.attach import Attachment, attach
from abkd_megatron.student.cached import CachedTeacher
from abkd_megatron.student.projectors import add_projectors
from abkd_megatron.student.report import LossChecks
from abkd_megatron.student.step import DistilledStep
from abkd_megatron.teacher.args import OtherTeacher, open_teacher, other_teachers, teacher_arguments
from abkd_megatron.teacher.build import Teacher, build_teacher
from abkd_megatron.teacher.teachers import Teachers
from abkd_megatron.teacher.weights import DEVICE, Stored, store_weights

logger = logging.getLogger(__name__)


def add_teacher(
    config: Config,
    megatron: Mapping[str, Any],
    args: Namespace,
    model_config: Any,
    forward_step: Callable[..., tuple[Any, Any]],
    host: str = SCRIPT,
) -> DistilledStep:
    """Add a teacher to the student that Megatron is about to build.

    Args:
        config: checked for "distill"; `device`, `teacher` and `distillation` are used.
        megatron: the student's Megatron arguments as `to_argv` takes them, from which the teacher's are derived.
        args: Megatron's validated arguments of the student, with the true `vocab_size`.
        model_config: the student's GPTModelConfig or HybridModelConfig. It gets hooks that add projectors, build and
            attach the teacher, and add a record of the distillation to `args` (`run_record.RECORD`), which Megatron
            saves in checkpoints.
        forward_step: calls the model with labels and the loss mask.
        host: of the teacher's arguments, see `check_layout`.

    Returns:
        The forward step for `pretrain`.

    Raises:
        AbkdError: on every rank, for a job that cannot run; without torch.distributed, on the ranks that detect it.

    Collectives: one all_gather_object and one broadcast_object_list if torch.distributed is initialized, else the
    second in the hooks. In the hooks those of `TeacherCheckpoint.verify` for --verify-integrity, `check_files`,
    `build_teacher`, `attach` and `check_models`.
    """
    execution = config.distillation.make_execution()
    vocab_size, timeout = args.vocab_size, timedelta(minutes=args.distributed_timeout_minutes)
    with on_every_rank():
        scheduled = objective_of_job(config, args)
        objective = scheduled.objective
        own_tokens = objective.cross_tokenizer is not None
        teacher_args, teacher_config = teacher_arguments(
            megatron, config.teacher.megatron, args, host, cross_tokenizer=own_tokens
        )
        check_layers_here(teacher_config, "teacher")
        checkpoint = open_teacher(config, megatron)
        others = [other.opened(megatron, args, host) for other in other_teachers(config, args)]
        setup = Setup(
            config=config,
            job="distill",
            student=args,
            vocab_size=vocab_size,
            teacher=teacher_args,
            checkpoint=checkpoint,
            others=others,
            objective=objective,
            execution=execution,
        )
        findings = run_checks(TEACHER_CHECKS, setup)
        aligner = aligner_of(get_tokenizer(), teacher_args) if own_tokens else None
    step = DistilledStep(forward_step, MegatronHost(), needs_input_ids=objective.shares_part_of(vocab_size))
    step.aligner = aligner

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
        if others:
            print_rank_0(findings["teachers by source"].text)
        for name, schedule in scheduled.schedules.items():
            print_rank_0(f"scheduled {name}: {schedule}")
        record = early or from_rank_0(recorded)
        setattr(args, run_record.RECORD, record)
        pg_collection = get_attr_wrapped_model(student[0], "pg_collection")
        default = OtherTeacher(
            name="teacher", sources=(), config=config, args=teacher_args, model=teacher_config, checkpoint=checkpoint
        )
        live = [default, *(other for other in others if other.cache is None)]
        shared = min(objective.shared_vocab or vocab_size, vocab_size)
        skip = PREFLIGHT if args.skip_train else config.distillation.skip_preflight

        measured: dict[int, Stored] = {}

        def store(of: OtherTeacher, teacher: Teacher) -> None:
            name, how, of_ours = f"the {of.name}", of.config.teacher.weights, config.distillation.skip_preflight
            check_loaded(teacher, name=name, vocab_size=shared, tp_group=pg_collection.tp, skip=of_ours)
            is_kept = is_measured(student, how, pg_collection, skip)
            stored = store_weights(teacher, how, keep_plain=is_kept)
            print_rank_0(f"{name}: {stored}" if others else str(stored))
            if is_kept:
                measured[id(teacher)] = stored

        built = _build_teachers(live, record, student, pg_collection, args.sequence_parallel, timeout, store)
        tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
        cached = [other for other in others if other.identity is not None]
        cache = None
        if cached:
            assert cached[0].identity is not None
            cache = CachedTeacher(cached[0].identity.layout, config.distillation.on_miss)
        of_sources = tuple(zip((of.sources for of in live[1:]), built[1:], strict=True))
        teachers = Teachers(built[0], of_sources, tuple(source for of in cached for source in of.sources))
        step.attachment = attach(
            student,
            teachers,
            scheduled,
            vocab_size=vocab_size,
            pg_collection=pg_collection,
            timeout=timeout,
            execution=execution,
            tokens=tokens,
            seed=args.seed,
            cache=cache,
        )
        if config.distillation.on_policy is not None:
            chats = bool(megatron.get("sft"))
            step.own_text = own_text_of(config.distillation.on_policy, student, step.attachment, args, chats)
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
        for number, teacher in enumerate(teachers.distinct):
            if (stored := measured.get(id(teacher))) is not None:
                of_one = {"vocab_size": vocab_size, "tp_group": pg_collection.tp, "number": number}
                measure(student, step.attachment, stored, **of_one)
        return student

    if objective.hidden_losses:
        model_config.pre_wrap_hooks.append(with_projectors)
    model_config.post_wrap_hooks.append(attach_teacher)
    return step


def _build_teachers(
    given: Sequence[OtherTeacher],
    record: Mapping[str, Any],
    student: Sequence[torch.nn.Module],
    pg_collection: ProcessGroupCollection,
    sequence_parallel: bool,
    timeout: timedelta,
    store: Callable[[OtherTeacher, Teacher], None],
) -> list[Teacher]:
    """Check the files of teachers, the default first, and build them; equal ones once.

    `store` is called with each one whose weights are not to stay on the device, before the next one is loaded.

    Collectives: those of `check_files`, `build_teacher` and `store`, for each teacher that differs from those before.
    """
    built: list[Teacher] = []
    identities = [record["teacher"]["sha256"]]
    identities += [record["teachers"][str(of.sources[0])]["sha256"] for of in given[1:]]
    kinds = [(identity, of.args, of.config.teacher.weights) for identity, of in zip(identities, given, strict=True)]
    for number, of in enumerate(given):
        assert of.args is not None and of.model is not None and of.checkpoint is not None
        if (first := kinds.index(kinds[number])) < number:
            print_rank_0(f"{of.name}: the same as the {given[first].name}, held once")
            built.append(built[first])
            continue
        # Megatron leaves a model on the device where it was initialized.
        of.model.transformer.use_cpu_initialization = next(student[0].parameters()).device.type == "cpu"
        with of.named() if number else nullcontext():
            if of.args.verify_integrity:
                of.checkpoint.verify()
            check_files(of.checkpoint, of.config.distillation.skip_preflight)
            built.append(
                build_teacher(
                    of.model,
                    of.checkpoint,
                    pg_collection,
                    sequence_parallel=sequence_parallel,
                    timeout=timeout,
                    vocab_size=of.args.vocab_size if of.config.distillation.cross_tokenizer is not None else None,
                )
            )
            if of.config.teacher.weights != DEVICE:
                store(of, built[-1])
    return built


def objective_of_job(config: Config, args: Namespace) -> ScheduledObjective:
    """Return the objective, with the positions of sources that are given by their paths.

    Raises:
        AbkdError: see `with_positions`.
    """
    scheduled = config.distillation.make_objective()
    sources = with_positions(scheduled.objective.sources, args)
    return replace(scheduled, objective=replace(scheduled.objective, sources=sources))


def own_text_of(
    settings: OnPolicy, student: list[torch.nn.Module], attachment: Attachment, args: Namespace, chats: bool
) -> OwnText:
    """Let a student with a teacher train on its own text in some steps.

    Args:
        settings: of `distillation.on_policy`.
        student: this rank's model as Megatron built it.
        attachment: of that student.
        args: Megatron's, with the true `vocab_size`.
        chats: whether the data are conversations.

    Raises:
        ConfigError: a source that cannot be imported, or a model from which this package does not sample.
    """
    pg_collection, end = get_attr_wrapped_model(student[0], "pg_collection"), getattr(get_tokenizer(), "eod", None)
    sampler = Sampler(
        *(unwrap_model(student), pg_collection, args.vocab_size),
        new_tokens=settings.new_tokens,
        end=end,
        paused=attachment.paused,
    )
    with on_every_rank():
        source, reward = (
            load_function(path, key) if (path := getattr(settings, key)) is not None else None
            for key in ("source", "reward")
        )
    sizes = Sizes(args.micro_batch_size, args.seq_length, args.vocab_size, chats)
    print_rank_0(f"training on the student's own text: {settings}")
    return OwnText(
        *(settings, sampler, source, reward, get_tokenizer().detokenize, sizes, end, pg_collection),
        progress=lambda: MegatronHost().progress(training=True),
    )


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
        lengths = {"iterations": args.train_iters, "total_samples": args.train_samples}
        return Progress.of_run(iteration, samples, args.seq_length, **lengths)

    def loss_checks(self) -> LossChecks:
        """Return what Megatron's arguments ask for."""
        args = get_args()
        return LossChecks(nan=args.check_for_nan_in_loss_and_grad, spikes=args.check_for_spiky_loss, save=args.save)

    def log(self, progress: Progress, scheduled: Mapping[str, float]) -> None:
        """Put the position of the schedules into the record that the next checkpoint saves."""
        run_record.note_progress(get_args(), progress, scheduled)
