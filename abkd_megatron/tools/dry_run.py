"""Megatron's arguments of a job as its ranks would have them, without GPU, other ranks or output files.

The job's own functions parse, check and derive the arguments, so errors are the same as in a job. torch.distributed is
not initialized, Megatron's global variables are not set, and Megatron's printout is dropped. One process may check
several configurations. The first with `device: cpu` installs the CPU backend (`abkd_megatron.cpu_backend`) permanently.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core.utils
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer import MegatronHFTokenizer
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import get_te_version
from megatron.training.arguments import validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.vocab_utils import calculate_padded_vocab_size
from packaging.version import Version

from abkd_megatron import cpu_backend
from abkd_megatron.config.megatron_args import (
    checked_model_config,
    job_arguments,
    megatron_errors_as_config_error,
    megatron_options,
    parse,
    parse_model,
)
from abkd_megatron.config.schema import Config
from abkd_megatron.config.unsupported import JOB
from abkd_megatron.data.prepare import data_arguments
from abkd_megatron.errors import ConfigError, DataError
from abkd_megatron.hosts.megatron_lm import job_config_from_args
from abkd_megatron.teacher.args import teacher_arguments
from abkd_megatron.teacher.build import check_experts
from abkd_megatron.teacher.inherited import teacher_settings
from abkd_megatron.teacher.layout import sharing_group_shape

# Assumed without a GPU (an H100) and without TransformerEngine (the newest version that megatron-core 0.19 checks for).
COMPUTE_CAPABILITY = (9, 0)
TRANSFORMER_ENGINE = "2.14.0"


def megatron_arguments(config: Config, world_size: int | None = None) -> tuple[Namespace, Namespace | None]:
    """Return Megatron's validated arguments of student and teacher, for rank 0.

    Without a GPU, `device: cuda` is validated as on an H100 with TransformerEngine. Without the prepared data, the
    vocabulary has `data.vocab_size` tokens. May be called several times per process, see the module.

    Args:
        config: checked for its job (`Config.check`).
        world_size: ranks of the job; None for $WORLD_SIZE, or else `smallest_world_size`.

    Returns:
        The student's, with the true `vocab_size` and the `padded_vocab_size`; and the teacher's, or None without
        `teacher.load` and `teacher:` arguments.

    Raises:
        AbkdError: the job would fail before it builds a model. Also DataError if the tokenizer cannot be loaded here
            and `megatron.vocab-size` is not set.

    Collectives: none.
    """
    megatron = arguments_with_data(config)
    with as_in_a_job(config, ranks_of(config, megatron, world_size)):
        student = student_arguments(megatron)
        set_vocabulary(student)
        teacher = None
        if describes_teacher(config):
            own_tokens = config.distillation.cross_tokenizer is not None
            teacher, _ = teacher_arguments(megatron, config.teacher.megatron, student, JOB, cross_tokenizer=own_tokens)
        check_models(student, teacher)
    return student, teacher


def describes_teacher(config: Config) -> bool:
    """Return whether the configuration has a teacher."""
    return config.teacher.load is not None or bool(config.teacher.megatron)


def arguments_with_data(config: Config) -> dict[str, Any]:
    """Return the job's Megatron arguments; before `prepare`, as `arguments_without_data`.

    Raises:
        DataError: `data.dir` exists but is not prepared data.
    """
    if config.data.dir is not None and not Path(config.data.dir).expanduser().exists():
        return arguments_without_data(config)
    return job_arguments(config, data_arguments(config.data))


def arguments_without_data(config: Config) -> dict[str, Any]:
    """Return the job's Megatron arguments with a placeholder tokenizer of `data.vocab_size` tokens."""
    return job_arguments(config, {"tokenizer-type": "NullTokenizer", "vocab-size": config.data.vocab_size})


def ranks_of(config: Config, megatron: Mapping[str, Any], world_size: int | None) -> int:
    """Return the number of ranks: `world_size`, else $WORLD_SIZE, else the fewest that both layouts allow.

    Raises:
        ConfigError: Megatron's parser rejects an argument, or $WORLD_SIZE is not a positive integer.
    """
    if world_size is not None:
        return world_size
    if (given := os.environ.get("WORLD_SIZE")) is not None:
        if not given.isdecimal() or int(given) < 1:
            raise ConfigError(f"expected a positive integer in WORLD_SIZE, got {given!r}; unset or correct it")
        return int(given)
    models = [megatron]
    if describes_teacher(config):
        models.append(teacher_settings(megatron, config.teacher.megatron, megatron_options()))
    with as_in_a_job(config, 1):
        return smallest_world_size(*map(parse, models))


def smallest_world_size(student: Namespace, teacher: Namespace | None = None) -> int:
    """Return the fewest ranks that the layouts of both models allow; if none fits both, the student's.

    Args:
        student: Megatron's parsed arguments.
        teacher: the same; None without a teacher.
    """
    shares = (student.tensor_model_parallel_size, student.pipeline_model_parallel_size)
    ranks = math.prod(shares) * student.context_parallel_size
    multiples = [ranks]
    for model in (student, teacher):
        if model is not None and model.num_experts:
            tensor = model.expert_tensor_parallel_size or model.tensor_model_parallel_size
            multiples.append(tensor * model.expert_model_parallel_size * model.pipeline_model_parallel_size)
    if teacher is not None:
        teachers = (teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size)
        # Yields the number of DP replicas per teacher. Layouts that no number fits are rejected later.
        with contextlib.suppress(ConfigError):
            multiples.append(
                ranks * math.prod(sharing_group_shape(shares, 0, teachers, has_experts=bool(teacher.num_experts)))
            )
    return math.lcm(*multiples)


@contextmanager
def as_in_a_job(config: Config, world_size: int) -> Iterator[None]:
    """Make Megatron believe that it runs on rank 0 of the job on the configured device; suppress its output.

    Raises:
        HostError: `device: cpu` on a machine with a GPU.
        ConfigError: Megatron's parser exited.
    """
    if config.device == "cpu":
        cpu_backend.install()
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        for logger in map(logging.getLogger, ("megatron", "abkd_megatron")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        stack.callback(os.environ.update, dict(os.environ))
        # Megatron requires CUDA_DEVICE_MAX_CONNECTIONS for TP on an H100. This machine's value does not matter.
        wanted = {"WORLD_SIZE": str(world_size), "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        for name, value in wanted.items():
            if name not in os.environ:
                stack.callback(os.environ.pop, name)
            os.environ[name] = value
        _replace(stack, MegatronHFTokenizer, "_download", _downloaded)
        if config.device == "cuda":
            _pretend_gpu(stack)
        try:
            yield
        except SystemExit as end:
            last = said.getvalue().strip().rpartition("\n")[2]
            raise ConfigError(f"Megatron rejects these arguments: {last}") from end


def _downloaded(_: MegatronHFTokenizer, path: str, url: str | None) -> str | None:
    """Return a tokenizer's downloaded file; replaces the download itself."""
    if url is not None and not Path(path).exists():
        raise FileNotFoundError(f"{path}, which a job would download from {url}; give megatron.vocab-file")
    return path if url is not None else None


def _pretend_gpu(stack: contextlib.ExitStack) -> None:
    if cpu_backend.is_installed() or not torch.cuda.is_available():
        major, minor = COMPUTE_CAPABILITY
        _replace(stack, torch.cuda, "get_device_capability", lambda *_: COMPUTE_CAPABILITY)
        _replace(stack, torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=major, minor=minor))
    if not has_transformer_engine():
        _replace(stack, megatron.core.utils, "_te_version", Version(TRANSFORMER_ENGINE))
        for module in (rope_utils, moe_utils):  # None means that a kernel is absent
            for name in [name for name, value in vars(module).items() if name.startswith("fused_") and value is None]:
                _replace(stack, module, name, object())


def has_transformer_engine() -> bool:
    """Return whether Megatron finds TransformerEngine."""
    return bool(get_te_version() > Version("0.0.0"))


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def student_arguments(megatron: Mapping[str, Any]) -> Namespace:
    """Return Megatron's validated arguments of the student, without the vocabulary. Call within `as_in_a_job`.

    Raises:
        ConfigError: a job would reject them.
    """
    args = parse_model(megatron, "student", JOB)
    with megatron_errors_as_config_error():
        if args.use_checkpoint_args:  # as parse_and_validate_args does
            load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(args)
        validate_args(args)
        # Rejects a global batch that is not a multiple of micro-batch size times DP.
        try:
            init_num_microbatches_calculator(
                rank=1,  # rank 0 would log
                global_batch_size=args.global_batch_size,
                micro_batch_size=args.micro_batch_size,
                data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
                decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
                step_batch_size_schedule=args.step_batch_size_schedule,
                seq_length=args.seq_length,
            )
        finally:
            destroy_num_microbatches_calculator()
    return args


def set_vocabulary(args: Namespace) -> str | None:
    """Set `vocab_size` and `padded_vocab_size` from the tokenizer, or from `--vocab-size` if it cannot be loaded.

    Returns:
        The reason why the tokenizer cannot be loaded; None if it was.

    Raises:
        DataError: there is no tokenizer on this machine and no `--vocab-size`.
        ConfigError: no tokenizer is configured.
    """
    given = args.vocab_size
    if args.tokenizer_type is None:
        with megatron_errors_as_config_error():
            build_tokenizer(args)
    try:
        args.vocab_size = build_tokenizer(args).vocab_size
    except Exception as error:  # tokenizer libraries raise anything
        name = f"{args.tokenizer_type} {args.tokenizer_model or args.vocab_file or ''}".strip()
        why = (
            f"expected the tokenizer {name} on this machine, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        )
        if given is None:
            remedy = "copy it here, or set megatron.vocab-size"
            raise DataError(f"{why}; {remedy}") from error
        set_padded_vocabulary(args, given)
        return why
    return None


def set_padded_vocabulary(args: Namespace, vocab_size: int) -> None:
    """Set `vocab_size` and Megatron's `padded_vocab_size`."""
    args.vocab_size = vocab_size
    if args.padded_vocab_size is None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
        )


def check_models(student: Namespace, teacher: Namespace | None) -> None:
    """Check the process groups and model configurations that Megatron would build.

    Args:
        student: Megatron's validated arguments.
        teacher: from `teacher_arguments`; None without a teacher.

    Raises:
        ConfigError: with Megatron's message.
    """
    experts = student.expert_tensor_parallel_size * student.expert_model_parallel_size
    experts *= student.pipeline_model_parallel_size * student.expert_gtp_weight_remat_size
    if student.world_size % experts:  # Megatron checks this after torch.distributed is initialized
        raise ConfigError(
            f"Megatron rejects these arguments: world_size ({student.world_size}) is not divisible by "
            f"expert_tensor_model_pipeline_parallel size ({experts})"
        )
    job_config_from_args(student, checked_model_config(student, "student", JOB))
    if teacher is not None and teacher.num_experts:
        check_experts(
            teacher.world_size // teacher.pipeline_model_parallel_size,
            teacher.expert_model_parallel_size,
            teacher.expert_tensor_parallel_size,
        )
