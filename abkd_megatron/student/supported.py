"""Properties of a student and a teacher that attachment depends on."""

import logging
from argparse import Namespace
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import log_single_rank

from abkd_megatron.config.stages import check_stages
from abkd_megatron.config.unsupported import MODEL, check_features
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.student.added import check_scaling
from abkd_megatron.student.cached import CachedTeacher
from abkd_megatron.student.wrappers import check_wrappers, unwrapped
from abkd_megatron.teacher.build import Teacher
from abkd_megatron.teacher.model import Model, pattern_of_model, takes_output_processor
from abkd_megatron.teacher.teachers import Teachers
from abkd_megatron.vocab_parallel.execution import Execution
from abkd_megatron.vocab_parallel.teacher_records import check_recorded

logger = logging.getLogger(__name__)


def check_shared_vocab(objective: Objective, vocab_size: int, context_parallel: int) -> None:
    """Reject a shared vocabulary larger than the student's, or a part of it with context parallelism.

    All input tokens of a sequence are needed to find those that the teacher cannot read.

    Raises:
        ConfigError: naming both numbers.
    """
    shared = objective.shared_vocab
    if shared is not None and shared > vocab_size:
        raise ConfigError(f"shared_vocab is {shared}, the student has {vocab_size} tokens; give at most that")
    if not objective.shares_part_of(vocab_size):
        return
    if context_parallel > 1:
        raise ConfigError(
            f"shared_vocab {shared} of the student's {vocab_size} tokens is not supported with context parallelism, "
            "which spreads a sequence over ranks; set context-parallel-size to 1"
        )


def check_tokens(objective: Objective, vocab_size: int) -> None:
    """Reject a token selection for a student with tokens that the teacher does not know.

    Raises:
        ConfigError: naming both.
    """
    if objective.tokens is not None and objective.shares_part_of(vocab_size):
        raise ConfigError(
            f"a selection of tokens ({objective.tokens}) is not supported with shared_vocab {objective.shared_vocab} "
            f"of the student's {vocab_size} tokens; remove the selection"
        )


def check_cacheable(objective: ScheduledObjective, num_draws: int) -> None:
    """Reject an objective that needs more of a teacher than a cache has.

    Args:
        objective: of the job.
        num_draws: of a token's record, which some divergences do not suit.

    Raises:
        ConfigError: naming the setting.
    """
    now = objective.objective
    found = {
        "hidden_losses": bool(now.hidden_losses),
        f"the losses {', '.join(now.names_of_logit_losses)}": bool(now.logit_losses),
        "a scheduled temperature": "temperature" in objective.schedules,
        "shared_vocab": now.shared_vocab is not None,
        "mix": now.mix is not None,
        "mtp_weight": now.mtp_weight > 0,
        "tokens: {select: disagreement}": now.tokens is not None and now.tokens.select == "disagreement",
    }
    for name, is_on in found.items():
        if is_on:
            raise ConfigError(
                f"expected a loss that a teacher cache has records for, got {name}, which needs a live teacher; remove "
                "it, or give a live teacher (load) in place of the cache"
            )
    for divergence in objective.divergences() if num_draws else ():
        check_recorded(divergence, num_draws)


def check_predictions_ahead(objective: Objective, config: TransformerConfig) -> None:
    """Reject what does not fit a student with multi-token prediction, or one without.

    Args:
        objective: with or without `mix` and `mtp_weight`.
        config: the student's.

    Raises:
        ConfigError: naming the setting.
    """
    if objective.mix is not None and config.mtp_num_layers:
        raise ConfigError(
            "distillation.mix is not supported with multi-token prediction, which embeds later tokens again, unmixed; "
            "remove mix or mtp-num-layers"
        )
    if objective.mtp_weight and not config.mtp_num_layers:
        raise ConfigError(
            f"distillation.mtp_weight {objective.mtp_weight:g}: expected a student with multi-token prediction, got "
            "none; set mtp-num-layers, or remove mtp_weight"
        )
    if objective.mtp_weight:
        check_scaling(config, "losses of multi-token prediction")


def check_mixed_batches(objective: Objective, args: Namespace) -> None:
    """Reject mixed sequences where there is nothing to mix, or where two sequences have different boundaries.

    Args:
        objective: with or without `mix`.
        args: Megatron's validated arguments.

    Raises:
        ConfigError: naming the argument.
    """
    if objective.mix is None:
        return
    if args.micro_batch_size < 2:
        raise ConfigError(
            f"distillation.mix: expected megatron.micro-batch-size 2 or more, got {args.micro_batch_size}; raise it, "
            "or remove mix"
        )
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(args, name):
            raise ConfigError(
                f"distillation.mix is not supported with megatron.{name.replace('_', '-')}: the documents of two "
                "sequences end at different tokens; turn it off, or remove mix"
            )


def check_own_vocabulary(objective: Objective, teachers: Teachers | CachedTeacher) -> None:
    """Reject a teacher with its own vocabulary without a loss of chunks, and such a loss without one, or in a layout.

    Raises:
        ConfigError: naming the setting.
    """
    teacher = teachers.default if isinstance(teachers, Teachers) else None
    size = teacher.vocab_size if teacher is not None else None
    if (objective.cross_tokenizer is None) != (size is None):
        raise ConfigError(
            f"expected Objective(cross_tokenizer=...) and a Teacher with its own vocab_size, or neither, got "
            f"{objective.cross_tokenizer} and {size}; give both, or remove one"
        )
    if size is not None:
        assert isinstance(teachers, Teachers) and teacher is not None
        if len(teachers.distinct) > 1:
            raise ConfigError("cross_tokenizer: expected one teacher, got several; remove the section `teachers`")
        if teacher.layout.student_stages > 1 or not teacher.layout.matches_student:
            raise ConfigError(
                "cross_tokenizer is not supported over pipeline stages or with independent teacher parallelism: its "
                "messages have the student's length; use one stage, and the student's tensor parallelism"
            )


def check_sharded_output(layer: torch.nn.Module, who: str) -> None:
    """Reject an output layer that gathers its logits over the tensor-parallel ranks.

    Args:
        layer: an output layer.
        who: "student" or "teacher".

    Raises:
        ConfigError: naming the setting. On one tensor-parallel rank there is nothing to gather.
    """
    whole, here = getattr(layer, "output_size", None), getattr(layer, "output_size_per_partition", None)
    if getattr(layer, "gather_output", False) and whole != here:
        raise ConfigError(
            f"{who}: parallel_output=False is not supported with tensor parallelism: the output layer gathers {whole} "
            f"columns on every rank, and the loss takes this rank's {here}; build the model with parallel_output=True"
        )


def check_positions(objective: Objective) -> None:
    """Reject weights of a dataset that is given by its path, as no micro-batch has it.

    Raises:
        ConfigError: with the path.
    """
    for of in objective.sources:
        if of.source is None:
            raise ConfigError(
                f"expected sources with positions, got {of.path}; give SourceWeights(source=...), or take those of "
                "`abkd_megatron.data.indexed.with_positions`"
            )


def check_several_teachers(objective: Objective, number: int) -> None:
    """Reject an objective that does not go with several teachers.

    Args:
        objective: of the job.
        number: of teachers.

    Raises:
        ConfigError: naming the setting.
    """
    found = {
        "hidden_losses": bool(objective.hidden_losses),
        "mix": objective.mix is not None,
        "mtp_weight": objective.mtp_weight > 0,
    }
    for name, is_on in found.items():
        if is_on and number > 1:
            raise ConfigError(
                f"expected no distillation.{name} with several teachers, which is of one teacher's layers or of mixed "
                "sequences; remove it, or the section `teachers`"
            )


def check_partly_cached(
    objective: ScheduledObjective,
    teachers: Teachers,
    cache: CachedTeacher | None,
    execution: Execution,
    context_parallel: int,
) -> None:
    """Reject a cache of some sequences without them, or them without it, and what does not go with both.

    Raises:
        ConfigError: naming the setting.
    """
    if bool(teachers.cached) != (cache is not None):
        raise ConfigError(
            f"expected a cache and the sources of it in Teachers(cached=...), or neither, got {cache} and "
            f"{teachers.cached}; give both"
        )
    if cache is not None:
        check_mixed_forms(objective, cache.layout.draws, context_parallel, execution.diagnostics)


def check_mixed_forms(objective: ScheduledObjective, num_draws: int, context_parallel: int, diagnostics: bool) -> None:
    """Reject what does not go with live teachers of some sequences and a cache of others.

    Args:
        objective: of the job.
        num_draws: of the cache, see `check_cacheable`.
        context_parallel: size of the group.
        diagnostics: see `Execution`.

    Raises:
        ConfigError: naming the setting.
    """
    check_cacheable(objective, num_draws)
    found = {
        "context parallelism, with which it was not run": context_parallel > 1,
        "distillation.diagnostics, which need every teacher's logits": diagnostics,
    }
    for name, is_on in found.items():
        if is_on:
            raise ConfigError(
                f"expected live teachers only, or a cache only, got a cache in the list `teachers` with {name}; remove "
                "one of them"
            )


def check_sources_given(objective: Objective, sources: torch.Tensor | None) -> None:
    """Reject a micro-batch without the datasets of its sequences where weights depend on them.

    Raises:
        ConfigError: naming what to set.
    """
    if objective.sources and sources is None:
        raise ConfigError(
            "weights by source need the dataset of each sequence (`dataset_id` of Megatron's BlendedDataset), and this "
            "forward step has not given it; set attachment.sources before the model runs, use `abkd-megatron "
            "distill`, or remove distillation.sources"
        )


def check_text(objective: Objective, is_own: bool) -> None:
    """Reject a training step on data with a loss that estimates a divergence from tokens that the student drew.

    Raises:
        ConfigError: naming the losses.
    """
    if objective.estimators and not is_own:
        raise ConfigError(
            f"{', '.join(objective.estimators)}: expected training steps on text that the student drew, got a step on "
            "data; set distillation.on_policy with share 1, or take reverse_kl, which is exact on any text"
        )


def checked_student(
    student: torch.nn.Module | Sequence[torch.nn.Module],
    teachers: Teachers | CachedTeacher,
    objective: Objective,
    pg_collection: ProcessGroupCollection,
) -> list[Model]:
    """Return this rank's chunks of a student, unwrapped.

    Raises:
        ConfigError: see `check_wrappers` and `check_student`.
    """
    wrapped = list(student) if isinstance(student, Sequence) else [student]
    check_wrappers(wrapped, objective, pg_collection, teachers.count if isinstance(teachers, Teachers) else 1)
    chunks = unwrapped(wrapped)
    for teacher in teachers.distinct if isinstance(teachers, Teachers) else (None,):
        check_student(chunks, teacher)
    return chunks


def check_student(chunks: Sequence[Model], teacher: Teacher | None) -> None:
    """Reject a student or teacher with a feature, a layout or an output layer that is not supported.

    Args:
        chunks: this rank's chunks of the student, unwrapped.
        teacher: this rank's share; None for a cache.

    Raises:
        ConfigError: naming the setting.
    """
    models = {"student": chunks[0]} | ({"teacher": teacher.model} if teacher is not None else {})
    for who, model in models.items():
        check_features(model.config, who, MODEL)
        check_stages(model.config, who, pattern_of_model(model))
    if chunks[0].config.fine_grained_activation_offloading and not takes_output_processor(chunks[-1]):
        raise ConfigError(
            "student: fine_grained_activation_offloading is not supported with a HybridModel, which would offload the "
            "output layer's parameters; turn it off"
        )
    last = chunks[-1]
    if last.post_process:
        check_sharded_output(last.output_layer, "student")
    if teacher is None:
        return
    if teacher.layout.num_dp_replicas > 1 and chunks[0].config.variable_seq_lengths:
        raise ConfigError(
            "variable_seq_lengths is not supported with a teacher that spans several DP replicas, whose micro-batches "
            "it runs together: turn it off, or give the teacher the student's tensor parallelism"
        )
    if chunks[0].config.variable_seq_lengths and teacher.layout.student_stages > 1:
        if not teacher.layout.matches_student:
            raise ConfigError(
                "variable_seq_lengths over pipeline stages is not supported with independent teacher parallelism: its "
                "messages pass stages that do not know their length; pad micro-batches to one length, or remove the "
                "teacher's tensor and pipeline parallelism"
            )
        if len(chunks) > 1:
            raise ConfigError(
                "variable_seq_lengths is not supported with a teacher and virtual pipeline stages: a stage cannot tell "
                "in time which activations a message of the teacher comes with; pad micro-batches to one length, or "
                "remove the virtual stages"
            )
    if last.post_process:
        assert teacher.head is not None
        check_sharded_output(teacher.head, "teacher")
        ours, theirs = last.output_layer.output_size_per_partition, teacher.head.output_size_per_partition
        if ours != theirs and teacher.vocab_size is None:
            raise ConfigError(
                f"student and teacher must pad the vocabulary alike: {ours} columns per rank against {theirs}; "
                "give both configs the same vocab_size, or make_vocab_size_divisible_by"
            )


def log_restrictions(objective: Objective, vocab_size: int) -> None:
    """Log on which tokens, and on what sequences, the divergence is trained, unless on the text as it is."""
    if objective.tokens is not None:
        logger.info("the divergence is trained on some tokens: %s", objective.tokens)
    if objective.cross_tokenizer is not None:
        logger.info(
            "the teacher has its own tokenizer: the divergence is of the likelihoods of chunks, at temperature %g",
            objective.cross_tokenizer.temperature,
        )
    if objective.mix is not None:
        logger.info("both models see mixed sequences, with shares of Beta(%g, %g)", *[objective.mix.alpha] * 2)
    if objective.shares_part_of(vocab_size):
        logger.info(
            "the teacher does not know tokens %d .. %d: in a sequence the divergence is 0 from the first of them on",
            objective.shared_vocab,
            vocab_size - 1,
        )


def warn_of_mtp_losses(config: TransformerConfig, ranks: dist.ProcessGroup | None) -> None:
    """Warn of Megatron's normalization of multi-token prediction losses over several ranks.

    Args:
        config: the student's.
        ranks: its data- and context-parallel group.
    """
    if config.mtp_num_layers and ranks is not None and ranks.size() > 1:
        log_single_rank(
            logger,
            logging.WARNING,
            "Megatron divides the losses of multi-token prediction by the number of tokens of each rank and micro-"
            f"batch: over {ranks.size()} data- and context-parallel ranks, their gradients are means over all tokens "
            "only where loss masks leave out equally many",
        )
