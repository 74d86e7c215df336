"""Megatron arguments of the teacher, and the comparison of its checkpoint with them."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import validate_args
from megatron.training.vocab_utils import calculate_padded_vocab_size

from abkd_megatron.cache.manifest import Identity, read_manifest
from abkd_megatron.config.cross_tokenizer import check_cross_tokenizer
from abkd_megatron.config.megatron_args import (
    checked_model_config,
    megatron_errors_as_config_error,
    megatron_options,
    parse_model,
)
from abkd_megatron.config.model_config import ModelConfig
from abkd_megatron.config.pattern import PATTERN_OPTIONS
from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import check_effect
from abkd_megatron.config.values import MegatronOptions
from abkd_megatron.data.indexed import positions_of
from abkd_megatron.errors import AbkdError, ConfigError, DataError
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.inherited import declared_vocabulary, inherited_architecture, of_checkpoint, teacher_settings
from abkd_megatron.teacher.layout import sharing_group_shape

# Must be equal for teacher and student: a rank passes the same tokens to both, or another tokenizer's of the same text.
_SHARED = ("context_parallel_size", "micro_batch_size")
_OF_TOKENS = ("seq_length", "tokenizer_type", "tokenizer_model")


def teacher_arguments(
    megatron: Mapping[str, Any],
    own: Mapping[str, Any],
    student: Namespace,
    host: str,
    *,
    cross_tokenizer: bool = False,
) -> tuple[Namespace, ModelConfig]:
    """Return Megatron's validated arguments of the teacher and its model configuration.

    Args:
        megatron: the student's arguments, see `to_argv`. `teacher_settings` selects those that the teacher inherits.
        own: arguments of the `teacher:` section.
        student: Megatron's validated arguments of the student, with the `padded_vocab_size`.
        host: see `check_layout`.
        cross_tokenizer: whether the teacher has its own tokenizer, and its own `seq_length`. Its arguments then have
            its true `vocab_size`.

    Raises:
        ConfigError: Megatron rejects the arguments, or the teacher does not fit this student.
        DataError: its own tokenizer cannot be loaded on this machine.
    """
    options = megatron_options()
    if student.use_checkpoint_args:
        megatron = of_checkpoint(megatron, student, options)
    inherited = inherited_architecture(megatron, own, options)
    if student.hybrid_layer_pattern is not None:
        _check_layers_given(own, options)
    with _inheritance_named(inherited):
        args = parse_model(teacher_settings(megatron, own, options), "teacher", host)
        check_effect(args, "teacher", options, map(MegatronOptions(options).dest, own))
        validate_args(args)
    for name in _SHARED if cross_tokenizer else (*_SHARED, *_OF_TOKENS):
        theirs, ours = getattr(args, name), getattr(student, name)
        if theirs != ours:
            raise ConfigError(
                f"teacher.{name.replace('_', '-')} is {theirs}, the student's is {ours}; they must be the same: "
                "remove it from `teacher:`" + ", or set distillation.cross_tokenizer" * name.startswith("tokenizer")
            )
    students, teachers = ((of.tensor_model_parallel_size, of.pipeline_model_parallel_size) for of in (student, args))
    sharing_group_shape(students, student.data_parallel_size, teachers, has_experts=args.num_experts is not None)
    if student.create_attention_mask_in_dataloader and students != teachers:
        raise ConfigError(
            "a teacher with another layout is sent tokens, not attention masks; set "
            "megatron.no-create-attention-mask-in-dataloader=true, or use the student's layout"
        )
    # A rank has the same ids of both models. Loading drops the teacher's other padding or fills with zeros.
    args.padded_vocab_size = student.padded_vocab_size
    if cross_tokenizer:
        check_cross_tokenizer(student, args)
        args.vocab_size = build_tokenizer_of(args).vocab_size
        args.padded_vocab_size = calculate_padded_vocab_size(
            *(args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size),
            logging_enabled=False,
        )
    tensor, whose = args.tensor_model_parallel_size, "teacher" if cross_tokenizer else "student"
    if args.padded_vocab_size % tensor:
        raise ConfigError(
            f"the {whose}'s vocabulary is padded to {args.padded_vocab_size} columns, which {tensor} tensor-parallel "
            f"ranks of the teacher do not divide; set megatron.make-vocab-size-divisible-by to a multiple of {tensor}"
        )
    if args.sequence_parallel and args.seq_length // args.context_parallel_size % tensor:
        raise ConfigError(
            f"sequences of {args.seq_length} tokens do not divide over {tensor} tensor-parallel ranks of the teacher; "
            "change seq-length, or set teacher.sequence-parallel=false"
        )
    with _inheritance_named(inherited):
        return args, checked_model_config(args, "teacher", host)


def build_tokenizer_of(args: Namespace) -> Any:
    """Return the tokenizer that Megatron builds from a teacher's arguments.

    Raises:
        DataError: it cannot be loaded on this machine.
    """
    try:
        return build_tokenizer(args)
    except Exception as error:  # tokenizer libraries raise anything
        raise DataError(
            f"expected the teacher's tokenizer {args.tokenizer_type} {args.tokenizer_model or ''} on this machine, got "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; set teacher.tokenizer-model to its path "
            "(and teacher.tokenizer-type)"
        ) from error


def _check_layers_given(own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Reject a hybrid student's teacher without layers: what the student has of them is not inherited."""
    given = {MegatronOptions(options).dest(name) for name, value in own.items() if value is not None}
    if not given & {"num_layers", "encoder_num_layers", "heterogeneous_layers_config_path", *PATTERN_OPTIONS}:
        raise ConfigError(
            "expected the teacher's layers, which are not inherited from a student with a hybrid-layer-pattern; set "
            "teacher.hybrid-layer-pattern of a HybridModel, or teacher.num-layers of a GPTModel"
        )


@contextmanager
def _inheritance_named(inherited: Mapping[str, str]) -> Iterator[None]:
    """Convert Megatron's errors about the teacher's arguments to a ConfigError with the inherited arguments."""
    try:
        with megatron_errors_as_config_error():
            yield
    except ConfigError as error:
        if error.__cause__ is None or not inherited:
            raise
        raise ConfigError(
            f"{error}; this is about the teacher, which inherits from the student unless set under `teacher:`: "
            + ", ".join(sorted(inherited.values()))
        ) from error


@dataclass(frozen=True, kw_only=True)
class OtherTeacher:
    """A teacher of some data sources. None for what is not known or not on this machine."""

    name: str
    """In messages."""
    sources: tuple[int, ...]
    """Positions of its datasets."""
    config: Config
    """The job's, with this teacher as the only one."""
    args: Namespace | None = None
    """Megatron's arguments, validated."""
    model: ModelConfig | None = None
    checkpoint: TeacherCheckpoint | None = None
    identity: Identity | None = None
    """Of its cache."""

    @property
    def cache(self) -> Path | None:
        """Directory of its cache; None for a live teacher."""
        directory = self.config.distillation.cache
        return Path(directory).expanduser() if directory is not None else None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the teacher in errors of the block, and its entry in the list in place of the section `teacher`."""
        try:
            yield
        except AbkdError as error:
            text = str(error).replace("under `teacher:`", "in its entry of the list `teachers`")
            text = text.replace("`teacher:`", "its entry in the list `teachers`")
            raise type(error)(f"{self.name}: {text}") from error

    def opened(self, megatron: Mapping[str, Any], student: Namespace, host: str) -> "OtherTeacher":
        """Return it with arguments, model and checkpoint, see `teacher_arguments` and `open_teacher`; or its identity.

        Raises:
            AbkdError: naming the teacher.
        """
        if self.cache is not None:
            return replace(self, identity=self.identity_here())
        args, model = self.arguments(megatron, student, host)
        return replace(self, args=args, model=model, checkpoint=self.checkpoint_here(megatron))

    def arguments(self, megatron: Mapping[str, Any], student: Namespace, host: str) -> tuple[Namespace, ModelConfig]:
        """Return its arguments and model, see `teacher_arguments`."""
        with self.named():
            return teacher_arguments(megatron, self.config.teacher.megatron, student, host)

    def identity_here(self) -> Identity:
        """Read the identity of its cache."""
        assert self.cache is not None
        with self.named():
            return read_manifest(self.cache)

    def checkpoint_here(self, megatron: Mapping[str, Any]) -> TeacherCheckpoint:
        """Open its checkpoint, see `open_teacher`."""
        with self.named():
            return open_teacher(self.config, megatron)


def other_teachers(config: Config, student: Namespace) -> list[OtherTeacher]:
    """Return the job's `teachers`, not yet opened.

    Args:
        config: of the job.
        student: Megatron's validated arguments of the student.

    Raises:
        ConfigError: a dataset is not in the blend for training, or has two teachers; see `positions_of`.
    """
    found: list[OtherTeacher] = []
    for entry in config.teachers:
        sources = tuple(positions_of(entry.sources, student, "teachers"))
        taken = {source: of.name for of in found for source in of.sources}
        if twice := [source for source in sources if source in taken]:
            raise ConfigError(
                f"teachers: expected one teacher per source, got {taken[twice[0]]} and {entry.name} for the dataset at "
                f"position {twice[0]}; remove one of them"
            )
        found.append(OtherTeacher(name=entry.name, sources=sources, config=config.with_teacher(entry)))
    return found


def open_teacher(config: Config, megatron: Mapping[str, Any]) -> TeacherCheckpoint:
    """Open the teacher's checkpoint, see `TeacherCheckpoint.open`.

    Args:
        config: `teacher` is used.
        megatron: the student's Megatron arguments, see `to_argv`.
    """
    inherited = inherited_architecture(megatron, config.teacher.megatron, megatron_options())
    return TeacherCheckpoint.open(config.teacher.load or "", config.teacher.ckpt_step, inherited)


def check_teacher(config: Config, checkpoint: TeacherCheckpoint, args: Namespace, vocab_size: int) -> str:
    """Reject a checkpoint that is not the configured teacher, see `TeacherCheckpoint.check_arguments`.

    Args:
        config: `teacher` and `distillation` are used.
        checkpoint: of the teacher.
        args: Megatron's arguments of the configured teacher.
        vocab_size: true size of the student's vocabulary; with another tokenizer, that of `args` counts.
    """
    if config.distillation.cross_tokenizer is not None:
        vocab_size = args.vocab_size
    return checkpoint.check_arguments(
        args,
        vocab_size,
        config.distillation.shared_vocab,
        declared=config.teacher.declared,
        declared_vocab=declared_vocabulary(config.teacher.megatron),
    )
