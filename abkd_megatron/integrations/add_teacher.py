"""A teacher for the student that Megatron is about to build: its arguments, its objective, its place in the step."""

import argparse
import functools
import linecache
import logging
import math
import re
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.models.gpt import GPTModelConfig

from abkd_megatron.config import SCHEDULED, Config, DistillationConfig
from abkd_megatron.config_file import to_argv
from abkd_megatron.config_values import MegatronOptions
from abkd_megatron.distillation import (
    Attachment,
    HiddenLoss,
    Objective,
    Progress,
    Schedule,
    ScheduledObjective,
    TeacherCheckpoint,
    add_projectors,
    attach,
    build_teacher,
)
from abkd_megatron.distillation.attach import check_config, check_tokens
from abkd_megatron.distillation.checkpoint import tensor_shapes
from abkd_megatron.distillation.hidden import PROJECTORS
from abkd_megatron.distillation.layout import neighbours_of
from abkd_megatron.distillation.preflight import FirstStep, check_files, check_models
from abkd_megatron.distillation.stages import check_stages
from abkd_megatron.distillation.step import masked_loss
from abkd_megatron.errors import AbkdError, ConfigError, HostError, from_rank_0, on_every_rank
from abkd_megatron.integrations import provenance
from abkd_megatron.integrations.inherited import (
    declared_vocabulary,
    inherited_architecture,
    of_checkpoint,
    teacher_settings,
)
from abkd_megatron.integrations.model_config import model_config

logger = logging.getLogger(__name__)

# What teacher and student share: they see the same tokens, each on the rank that holds them.
_SHARED = ("context_parallel_size", "seq_length", "micro_batch_size", "tokenizer_type", "tokenizer_model")

_GET_MODEL = "Megatron reads it in get_model() alone, which builds no model from a model config: it would be ignored"
# What no forward step here does, or Megatron does not do with a model config: (feature, reason), by the argument, or by
# ARGUMENT=VALUE where one of its values is meant. Each is off by default.
UNSUPPORTED = {
    "freeze_all_layers": ("freezing all layers", _GET_MODEL),
    "create_all_gather_group": ("a group of its own for all-gathers", _GET_MODEL),
    "logits_save_dir": (
        "saving logits to disk",
        "Megatron then trains on no loss and only writes logits, and the loss beside a teacher would go on training",
    ),
    "full_validation": ("validation on whole datasets", "megatron-core 0.19 fails in it, or in the test after it"),
    "multiple_validation_sets": ("several validation sets", "Megatron takes them with full-validation alone"),
    "perform_rl_step": ("reinforcement learning", "it is another loss, on data of its own"),
    "hybrid_context_parallel": ("hybrid context parallelism", "a teacher was never run on batches that are split so"),
    "yaml_cfg": ("Megatron's own --yaml-cfg", "the teacher's arguments are derived from those of the command line"),
    "logits_load_dir": ("Megatron's distillation from logits on disk", "it is another loss beside this one"),
}
# Beside these on a CPU.
_UNSUPPORTED_ON_CPU = {
    "async_save": ("saving in the background on a CPU", "the process that writes lacks the stand-in for a GPU"),
    "record_memory_history": ("a trace of GPU memory", "there is no GPU"),
}
# Settings of a model that Megatron takes and does not build, where the one that they belong to is not set: None for
# those that nothing in its training of GPT models reads. Beside each what it may be all the same.
_MLA, _YARN = "multi-latent-attention", "position-embedding-type yarn"
_BELONGS_TO: dict[str, tuple[str | None, Callable[[Namespace], bool]]] = {
    "num_query_groups": (
        "group-query-attention",
        lambda args: (
            args.group_query_attention
            or args.multi_latent_attention
            or args.num_query_groups == args.num_attention_heads
        ),
    ),
    "rope_scaling_factor": ("use-rope-scaling", lambda args: args.use_rope_scaling),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        (_MLA, lambda args: args.multi_latent_attention),
    ),
    **dict.fromkeys(
        ("rotary_scaling_factor", "mscale", "mscale_all_dim"),
        (f"{_MLA} or {_YARN}", lambda args: args.multi_latent_attention or args.position_embedding_type == "yarn"),
    ),
    **dict.fromkeys(
        ("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
        (_YARN, lambda args: args.position_embedding_type == "yarn"),
    ),
    **dict.fromkeys(
        (
            *("openai_gelu", "decoder_num_layers", "relative_attention_num_buckets", "relative_attention_max_distance"),
            *("apply_residual_connection_post_layernorm", "rampup_batch_size", "vocab_extra_ids"),
        ),
        (None, lambda args: False),
    ),
}
_INSTEAD = {"rampup_batch_size": "step-batch-size-schedule", "decoder_num_layers": "num-layers"}


@functools.cache
def megatron_options() -> Mapping[str, argparse.Action]:
    """Every argument of the installed Megatron, by its spelling without the leading dashes."""
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}


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
            attached, and `args` get a record of the distillation, `provenance.RECORD`, which Megatron saves with the
            checkpoint.
        forward_step: of Megatron's kind, with a model that is called with labels and the loss mask.
        unsupported: as `check_layout` takes it, for the teacher.

    Returns:
        The forward step for `pretrain`.

    Raises:
        AbkdError: on every rank, when something cannot be run; without torch.distributed, on those that see it.

    Collectives: one all_gather_object and one broadcast_object_list where torch.distributed is initialised, else the
    second in the hooks; there those of `TeacherCheckpoint.verify` for --verify-integrity, `check_files`,
    `build_teacher`, `attach` and `check_models`.
    """
    scheduled = make_objective(config.distillation)
    objective = scheduled.objective
    vocab_size, timeout = args.vocab_size, timedelta(minutes=args.distributed_timeout_minutes)
    with on_every_rank():
        check_tokens(objective, vocab_size)
        teacher_args = teacher_arguments(megatron, config.teacher.megatron, options, args, unsupported)
        teacher_config = checked_model_config(teacher_args, "teacher", unsupported)
        checkpoint = open_teacher(config, megatron, options)
        compared = check_teacher(config, checkpoint, teacher_args, vocab_size)
        if objective.shared_vocab is None:
            checkpoint.check_tokenizer(args.tokenizer_model)
        absent = absent_projectors(args, objective.hidden_losses)
    step = DistilledStep(forward_step, needs_input_ids=objective.shares_part_of(vocab_size))

    def recorded() -> tuple[dict[str, Any], str | None]:
        record = provenance.record(config, checkpoint)
        return record, provenance.check_resumed(args, record, config.distillation.on_change)

    # Rank 0 reads and tells the others: now if it can, else once Megatron has initialised torch.distributed.
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
        setattr(args, provenance.RECORD, record)
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
            tokens=tokens,
            kernel=kernel_of(config),
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


def open_teacher(
    config: Config, megatron: Mapping[str, Any], options: Mapping[str, argparse.Action]
) -> TeacherCheckpoint:
    """Find the teacher's checkpoint, see `TeacherCheckpoint.open`.

    Args:
        config: `teacher` is used.
        megatron: the student's Megatron arguments, as `to_argv` takes them.
        options: as `megatron_options` returns them.
    """
    inherited = inherited_architecture(megatron, config.teacher.megatron, options)
    return TeacherCheckpoint.open(config.teacher.load or "", config.teacher.ckpt_step, inherited)


def check_teacher(config: Config, checkpoint: TeacherCheckpoint, args: Namespace, vocab_size: int) -> str:
    """Reject a teacher that is not the configured one, see `TeacherCheckpoint.check_arguments`.

    Args:
        config: `teacher` and `distillation` are used.
        checkpoint: the teacher's.
        args: Megatron's arguments of the teacher, as configured.
        vocab_size: true size of the student's vocabulary.
    """
    return checkpoint.check_arguments(
        args,
        vocab_size,
        config.distillation.shared_vocab,
        declared=config.teacher.declared,
        declared_vocab=declared_vocabulary(config.teacher.megatron),
    )


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
        of_selected=attachment.of_selected,
        hidden=attachment.hidden,
        scheduled=attachment.scheduled,
        teacher_seconds=attachment.take_teacher_seconds,
        check_for_nan=check_for_nan,
        check_for_spikes=check_for_spikes,
        tensors=attachment.take_tensors(),
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
        provenance.note_progress(args, progress, attachment.scheduled)


def absent_projectors(args: Namespace, losses: Sequence[HiddenLoss]) -> list[str]:
    """The projectors that the student's checkpoint does not have, as one of plain training; allowed to begin with.

    Raises:
        ConfigError: if Megatron would also resume the optimizer from it, which has no state of theirs.
    """
    wanted = [loss.pair for loss in losses if loss.projector]
    directory, goes_on = provenance.checkpoint_to_load(args)
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


def teacher_arguments(
    megatron: Mapping[str, Any],
    own: Mapping[str, Any],
    options: Mapping[str, argparse.Action],
    student: Namespace,
    unsupported: Mapping[str, tuple[str, str]] = UNSUPPORTED,
) -> Namespace:
    """Megatron's validated arguments of the teacher.

    Args:
        megatron: of the student, as `to_argv` takes them; what a teacher has no use for is not inherited.
        own: of the `teacher:` section.
        options: as `megatron_options` returns them.
        student: validated, with the `padded_vocab_size`.
        unsupported: as `check_layout` takes it.

    Raises:
        ConfigError: what Megatron refuses of them, or a teacher that cannot lie beside this student.
    """
    if student.use_checkpoint_args:
        megatron = of_checkpoint(megatron, student, options)
    inherited = inherited_architecture(megatron, own, options)
    with _inheritance_named(inherited), command_line(to_argv(teacher_settings(megatron, own, options), options)):
        args = parse_args()
        check_layout(args, "teacher", unsupported)
        check_effect(args, "teacher", map(MegatronOptions(options).dest, own))
        validate_args(args)
    for name in _SHARED:
        theirs, ours = getattr(args, name), getattr(student, name)
        if theirs != ours:
            raise ConfigError(
                f"teacher.{name.replace('_', '-')} is {theirs}, the student's is {ours}; they must be the same: "
                "remove it from `teacher:`"
            )
    students, teachers = ((of.tensor_model_parallel_size, of.pipeline_model_parallel_size) for of in (student, args))
    neighbours_of(students, student.data_parallel_size, teachers, has_experts=args.num_experts is not None)
    if student.create_attention_mask_in_dataloader and students != teachers:
        raise ConfigError(
            "a teacher in a layout of its own is sent tokens, not attention masks; give "
            "megatron.no-create-attention-mask-in-dataloader=true, or the teacher the student's layout"
        )
    # A rank holds the same ids of both models, however the teacher was padded: loading drops or zeroes what differs.
    args.padded_vocab_size = student.padded_vocab_size
    tensor = args.tensor_model_parallel_size
    if args.padded_vocab_size % tensor:
        raise ConfigError(
            f"the student's vocabulary is padded to {args.padded_vocab_size} columns, which {tensor} tensor-parallel "
            f"ranks of the teacher do not divide; give megatron.make-vocab-size-divisible-by a multiple of {tensor}"
        )
    if args.sequence_parallel and args.seq_length // args.context_parallel_size % tensor:
        raise ConfigError(
            f"sequences of {args.seq_length} tokens do not divide over {tensor} tensor-parallel ranks of the teacher; "
            "change seq-length, or give teacher.sequence-parallel=false"
        )
    with _inheritance_named(inherited):
        model_config(args)
    return args


def check_layout(args: Namespace, who: str, unsupported: Mapping[str, tuple[str, str]]) -> None:
    """Refuse what cannot be run, by name, before Megatron builds anything.

    Args:
        args: Megatron's arguments.
        who: "student" or "teacher".
        unsupported: {argument: (feature, reason)} that the forward step does not do.

    Raises:
        ConfigError: naming the feature, the reason and what to change.
    """
    check_config(args, who, unsupported)
    check_config(args, who)
    if args.mtp_num_layers and args.pipeline_model_parallel_layout:
        raise ConfigError(
            f"{who}: multi-token prediction is only fed on the last pipeline stage; remove "
            "pipeline-model-parallel-layout or mtp-num-layers"
        )
    if not args.pad_vocab_size and args.padded_vocab_size is None:
        raise ConfigError(
            f"{who}: expected a padded vocabulary, got no-pad-vocab-size, with which Megatron leaves the number of "
            "columns unset and fails when it counts FLOPs; give make-vocab-size-divisible-by=1 instead"
        )
    virtual = (args.num_layers_per_virtual_pipeline_stage, args.num_virtual_stages_per_pipeline_rank)
    if who == "teacher" and virtual != (None, None):
        raise ConfigError(
            "teacher: virtual pipeline stages shorten the wait for a backward pass, and a teacher has none; remove "
            "num-layers-per-virtual-pipeline-stage and num-virtual-stages-per-pipeline-rank from `teacher:`"
        )
    if who == "student":
        check_effect(args, who)
    if who == "student" and args.eval_interval is None and not args.skip_train:
        raise ConfigError(
            "student: expected eval-interval, by which Megatron sizes the validation data, got nothing; set "
            "megatron.eval-interval, beyond train-iters to validate at the end alone"
        )
    on_gpus = args.distributed_backend != "gloo"
    if not on_gpus:
        check_config(args, who, _UNSUPPORTED_ON_CPU)
    if who == "student" and on_gpus and args.use_cpu_initialization and not args.use_distributed_optimizer:
        raise ConfigError(
            "student: use-cpu-initialization is not supported on a GPU: Megatron leaves a model on the CPU that it "
            "builds from a model config, unless its distributed optimizer moves it; remove use-cpu-initialization, or "
            "add use-distributed-optimizer"
        )
    _check_sizes(args, who)
    stages = args.pipeline_model_parallel_size
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
        args.account_for_embedding_in_pipeline_split or None,
        args.account_for_loss_in_pipeline_split or None,
    )
    if args.num_layers is not None and not any(uneven) and args.num_layers % stages:
        raise ConfigError(
            f"{who}: {args.num_layers} layers do not divide over {stages} pipeline stages; change num-layers or "
            "pipeline-model-parallel-size, or say decoder-first-pipeline-num-layers"
        )


def check_effect(args: Namespace, who: str, settings: Iterable[str] = _BELONGS_TO) -> None:
    """Reject a setting that would be taken, and change nothing of what is built.

    Args:
        args: Megatron's arguments.
        who: "student" or "teacher".
        settings: by destination, the ones to look at.

    Raises:
        ConfigError: naming the setting, and the one that it belongs to.
    """
    defaults = {action.dest: action.default for action in megatron_options().values()}
    for name in settings:
        belongs_to, has_effect = _BELONGS_TO.get(name, ("", lambda args: True))
        value = getattr(args, name, None)
        if value != defaults.get(name) and not has_effect(args):
            spelled = name.replace("_", "-")
            remedy = f"add {belongs_to}, or remove it" if belongs_to else "remove it"
            if name in _INSTEAD:
                remedy = f"use {_INSTEAD[name]}"
            where = f"without {belongs_to}" if belongs_to else "in its training of GPT models"
            raise ConfigError(f"{who}: {spelled} {value} would be ignored: Megatron does not read it {where}; {remedy}")


def checked_model_config(args: Namespace, who: str, unsupported: Mapping[str, tuple[str, str]]) -> GPTModelConfig:
    """The model configuration of validated arguments.

    They are looked at once more: Megatron's validation, and `use-checkpoint-args`, rewrite some of them.

    Raises:
        ConfigError: as `check_layout` and `check_stages`, and what Megatron rejects of them.
    """
    check_layout(args, who, unsupported)
    with megatron_refusals_named():
        config = model_config(args)
        check_stages(config.transformer, who)
    return config


def _check_sizes(args: Namespace, who: str) -> None:
    """Of sizes that do not divide Megatron says the names of its variables, or nothing.

    Raises:
        ConfigError: naming them, and what to change.
    """
    sizes = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
    }
    if min(sizes.values()) < 1:
        return  # Megatron says so
    ranks = math.prod(sizes.values())
    if args.world_size % ranks:
        shown = " x ".join(f"{name}-parallel {size}" for name, size in sizes.items() if size > 1)
        raise ConfigError(
            f"{who}: expected a multiple of {ranks} ranks ({shown}), got {args.world_size}; start that many, or "
            "change these sizes"
        )
    heads, tensor = args.num_attention_heads, args.tensor_model_parallel_size
    if heads and args.hidden_size and args.kv_channels is None and args.hidden_size % heads:
        raise ConfigError(
            f"{who}: hidden-size {args.hidden_size} does not divide over {heads} attention heads; change hidden-size "
            "or num-attention-heads, or give kv-channels, the size of a head"
        )
    if heads and heads % tensor:
        raise ConfigError(
            f"{who}: {heads} attention heads do not divide over {tensor} tensor-parallel ranks; change "
            "num-attention-heads or tensor-model-parallel-size"
        )
    micro, batch, data = args.micro_batch_size, args.global_batch_size, args.world_size // ranks
    divides = not (micro and batch and micro > 0) or batch % (micro * data) == 0
    if not divides and not args.decrease_batch_size_if_needed:
        raise ConfigError(
            f"{who}: global-batch-size {batch} does not divide into micro-batches of {micro} on {data} data-parallel "
            f"ranks; give a multiple of {micro * data}, or another micro-batch-size"
        )


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[None]:
    """Megatron's parser reads sys.argv and nothing else."""
    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        yield
    finally:
        sys.argv = saved


@contextmanager
def megatron_refusals_named() -> Iterator[None]:
    """Pass on why Megatron rejects arguments, without the traceback, whichever of Python's exceptions it does it with.

    An exception that is no rejection, such as the TypeError of a setting that Megatron's validation does not expect,
    is named together with the line that raised it.
    """
    try:
        yield
    except AbkdError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error) or assertion(error)
        raise ConfigError(f"Megatron refuses these arguments: {reason}") from error
    except Exception as error:
        raise ConfigError(
            f"Megatron cannot take these arguments, its own code fails: {type(error).__name__}: {error}, in "
            f"`{assertion(error)}`; remove the setting that leads there"
        ) from error


@contextmanager
def _inheritance_named(inherited: Mapping[str, str]) -> Iterator[None]:
    """The same of a teacher's arguments, with those that it has from the student."""
    try:
        with megatron_refusals_named():
            yield
    except ConfigError as error:
        if error.__cause__ is None or not inherited:
            raise
        raise ConfigError(
            f"{error}; these are the teacher's, which inherits from the student what is not set under `teacher:`: "
            + ", ".join(sorted(inherited.values()))
        ) from error


def assertion(error: BaseException) -> str:
    """The line of an assertion that says no word, and the numbers and names that it compares."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    last = traceback.extract_tb(error.__traceback__)[-1]
    numbers = range(last.lineno or 0, (last.end_lineno or last.lineno or 0) + 1)
    line = " ".join(filter(None, (linecache.getline(last.filename, number).strip() for number in numbers)))
    given = []
    for holder, name in dict.fromkeys(re.findall(r"\b(\w+)\.(\w+)\b(?!\()", line)):
        value = getattr(frame.f_locals.get(holder), name, ...)
        if value is None or isinstance(value, bool | int | float | str):
            given.append(f"{name.replace('_', '-') if holder == 'args' else name} is {value}")
    line = line or type(error).__name__
    return f"{line} ({', '.join(given)})" if given else line
