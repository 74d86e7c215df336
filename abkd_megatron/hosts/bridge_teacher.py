"""The teacher of a Bridge job: built from a checkpoint or a Hugging Face model.

`bridge` imports this module once it has found Megatron Bridge.
"""

import pkgutil
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import load_model_config
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.training.models.base import ModelConfig

from abkd_megatron.config.model_config import model_config
from abkd_megatron.config.pattern import layers_and_pipes
from abkd_megatron.errors import CheckpointError, ConfigError, on_every_rank
from abkd_megatron.losses.objective import Objective
from abkd_megatron.preflight.live import check_files
from abkd_megatron.teacher.build import Teacher, build_teacher, random_states_kept, to_params_dtype
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.description import of_model_config
from abkd_megatron.teacher.inherited import forget_run_of

if TYPE_CHECKING:
    from abkd_megatron.hosts.bridge import DistillConfigContainer

# The teacher's layout is the student's.
_SHARED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "pipeline_dtype",
    "use_cpu_initialization",
    "attention_backend",  # environment variables of the process
)


def num_columns(model: Any) -> int:
    """Return the number of columns of the student's output layer over all tensor-parallel ranks."""
    size: int = model.vocab_size
    if not model.should_pad_vocab:
        return size
    multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
    return -(-size // multiple) * multiple


def build_bridge_teacher(
    config: "DistillConfigContainer",
    transformer: TransformerConfig,
    columns: int,
    objective: Objective,
    groups: ProcessGroupCollection,
    timeout: timedelta,
) -> Teacher:
    """Build, load and freeze this rank's part of the teacher."""
    checkpoint = None
    with on_every_rank():
        if config.teacher.hf:
            try:
                model = AutoBridge.from_hf_pretrained(config.teacher.hf).to_megatron_provider()
            except (OSError, ValueError) as error:
                raise CheckpointError(f"the teacher {config.teacher.hf} cannot be loaded: {error}") from error
            _check_vocabulary(model.vocab_size, config.model.vocab_size, objective.shared_vocab)
        else:
            checkpoint = TeacherCheckpoint.open(config.teacher.load or "", config.teacher.ckpt_step)
            _check_described(checkpoint)
            model, args = load_model_config(str(checkpoint.directory))
            if args is not None:  # of Megatron-LM's loop, which saves its arguments
                model = model_config(args)
        forget_run_of(model)
        _forget_stages_of(model, transformer.pipeline_model_parallel_size)
        settings = {name: getattr(transformer, name) for name in _SHARED}
        if getattr(model, "num_moe_experts", None):
            settings |= {name: getattr(transformer, name) for name in ("expert_model_parallel_size",)}
        settings |= {
            "seq_length": config.model.seq_length,
            # A rank holds the same ids of both models, however the teacher was padded: loading pads or drops the rest.
            "vocab_size": columns,
            "should_pad_vocab": False,
            **_resolved(config.teacher.overrides, model),
        }
        if checkpoint is not None:
            # Built as it is described; what is left to compare are the overrides and the vocabulary.
            overrides = {name: settings[name] for name in config.teacher.overrides}
            built = _as_arguments(model, overrides, config.model.seq_length)
            checkpoint.check_arguments(built, config.model.vocab_size, objective.shared_vocab)
    if checkpoint is not None:
        check_files(checkpoint, config.distillation.skip_preflight)
    dtype = transformer.params_dtype
    if isinstance(model, ModelConfig):
        assert checkpoint is not None  # AutoBridge makes providers
        precision = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
        for name, value in (precision | settings).items():
            setattr(model, name, value)
        model.finalize()
        return build_teacher(
            model, checkpoint, groups, sequence_parallel=transformer.sequence_parallel, timeout=timeout
        )
    model.apply_overrides_and_finalize(dtype=dtype, overrides=settings)
    with random_states_kept():
        (built,) = model.provide_distributed_model(
            wrap_with_ddp=False,
            mixed_precision_wrapper=None,
            pg_collection=groups,
            use_cpu_initialization=transformer.use_cpu_initialization,
        )
    if checkpoint is not None:
        wanted = built.sharded_state_dict(metadata=checkpoint.metadata(groups.dp_cp))
        built.load_state_dict(checkpoint.load(wanted, groups.dp_cp))
    return Teacher.of(to_params_dtype(built, dtype), groups)


def _forget_stages_of(model: Any, stages: int) -> None:
    """Leave multi-token prediction out of a HybridModel's layer pattern, and the stages of another layout."""
    pattern = getattr(model, "hybrid_layer_pattern", None)
    if pattern is None:
        return
    main = layers_and_pipes(pattern)
    model.hybrid_layer_pattern = main if main.count("|") + 1 == stages else main.replace("|", "")
    if hasattr(model, "mtp_hybrid_override_pattern"):  # a provider would append it again
        model.mtp_hybrid_override_pattern = None


def _check_described(checkpoint: TeacherCheckpoint) -> None:
    """Reject a checkpoint from which Bridge cannot build a model."""
    if checkpoint.common.get("args") is None and not (checkpoint.directory / "run_config.yaml").is_file():
        raise CheckpointError(
            f"expected Megatron's arguments or Bridge's run_config.yaml in {checkpoint.directory}, from which the "
            "teacher would be built, got neither; give teacher.load a checkpoint that Bridge or Megatron-LM saved, or "
            "teacher.hf the model of Hugging Face"
        )


def _as_arguments(model: Any, overrides: Mapping[str, Any], seq_length: int) -> Namespace:
    """Return the model config with overrides as Megatron's arguments, to compare with a checkpoint's."""
    transformer = getattr(model, "transformer", None)
    names = [item.name for of in (transformer, model) if of is not None for item in fields(of)]
    values = {name: getattr(model, name) for name in names if not name.startswith("_")}
    values = {name: value for name, value in values.items() if value is not transformer}
    # A builder's config reads a transformer's fields as its own.
    return Namespace(**{**of_model_config({**values, **overrides}), "seq_length": seq_length})


def _resolved(overrides: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Replace dotted paths by functions and layer specs in the overrides of a model config."""
    resolved = dict(overrides)
    for name, value in overrides.items():
        if not hasattr(model, name):
            raise ConfigError(f"teacher.overrides: a {type(model).__name__} has no {name}; remove it")
        if isinstance(value, str) and (callable(getattr(model, name)) or name.endswith("_spec")):
            try:
                resolved[name] = pkgutil.resolve_name(value)
            except (ImportError, AttributeError, ValueError) as error:
                raise ConfigError(
                    f"teacher.overrides.{name}: expected the dotted path of a function or a layer spec: {error}"
                ) from error
    return resolved


def _check_vocabulary(theirs: int, ours: int, shared: int | None) -> None:
    if shared is None and theirs != ours:
        raise CheckpointError(
            f"the teacher has a vocabulary of {theirs} tokens, the student one of {ours}; teacher and student must "
            "share one tokenizer; if only the first N tokens are the same in both, give distillation.shared_vocab=N"
        )
    if shared is not None and shared > min(theirs, ours):
        raise CheckpointError(
            f"shared_vocab is {shared}; the teacher has a vocabulary of {theirs} tokens, the student one of {ours}; "
            "give at most the smaller"
        )
