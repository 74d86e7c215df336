"""Unsupported Megatron features and invalid combinations of arguments. Does not import megatron."""

import argparse
import importlib.util
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from abkd_megatron.config.pattern import check_pattern, pattern_of
from abkd_megatron.errors import ConfigError

# Where a feature is rejected: this package's jobs, a pretraining script, both on a CPU, Megatron Bridge, a model passed
# to `attach`, and `estimate`. MODEL reads a TransformerConfig, BRIDGE its configuration container, the others
# Megatron's arguments.
JOB, SCRIPT, ON_CPU, BRIDGE, MODEL, ESTIMATE = HOSTS = ("job", "script", "on a CPU", "bridge", "model", "estimate")
_ARGUMENTS = (JOB, SCRIPT)
_ANYWHERE = (JOB, SCRIPT, MODEL)


@dataclass(frozen=True)
class Feature:
    """An unsupported feature, off by default."""

    argument: str
    """Destination in Megatron's parser, and field of the TransformerConfig."""
    name: str
    """Name in messages."""
    reason: str
    hosts: tuple[str, ...] = _ARGUMENTS
    """Subset of `HOSTS` that reject it."""
    models: tuple[str, ...] = ("student", "teacher")
    """Models for which it is rejected."""
    value: str | None = None
    """The rejected value; None for any value that turns the feature on."""
    setting: str | None = None
    """Dotted path in Bridge's container."""
    remedy: str | None = None
    """Remedy in messages; None for "remove the argument"."""

    def error(self, who: str, host: str = JOB) -> ConfigError:
        """Return the error for a model, "student" or "teacher"."""
        name = self.setting if host == BRIDGE else self.argument.replace("_", "-")
        return ConfigError(f"{who}: {self.name} is not supported: {self.reason}; {self.remedy or f'remove {name}'}")

    def is_on(self, config: Any, host: str) -> bool:
        """Return whether a configuration turns it on.

        Args:
            config: Megatron's arguments, a TransformerConfig or Bridge's container, depending on the host.
            host: one of `HOSTS`.
        """
        given = attrgetter(self.setting or "")(config) if host == BRIDGE else getattr(config, self.argument, None)
        return str(given) == self.value if self.value else bool(given) and given != "none"


_GET_MODEL = "Megatron reads it in get_model() only, which is not used with a model config: it would be ignored"
_SCHEDULE_PLAN = "it runs a schedule plan instead of the model's forward, and the checks of a job hook the forward"
_SHARDED = "it shards the student's weights over data-parallel ranks; the loss needs the complete output layer"
_KEEPS_NONE = "a teacher keeps no activations for a backward pass"
_NO_VIRTUAL = (
    "virtual pipeline stages",
    "they help only with a backward pass, which a teacher does not have",
    _ARGUMENTS,
    ("teacher",),
)
_NO_DATA = "it cannot be estimated without data"

UNSUPPORTED = (
    # Not implemented in the forward step, or in Megatron with a model config.
    Feature("freeze_all_layers", "freezing all layers", _GET_MODEL),
    Feature("create_all_gather_group", "a separate group for all-gathers", _GET_MODEL),
    Feature(
        "logits_save_dir",
        "saving logits to disk",
        "Megatron then only writes logits, but distillation would continue to train",
    ),
    Feature(
        "full_validation",
        "Megatron's full-validation",
        "megatron-core 0.19 fails in it on ranks that read no data, with one set everywhere, and with several sets in "
        "the test after it",
        remedy="remove full-validation (in jobs of this package, validation.sets does it)",
    ),
    Feature(
        "multiple_validation_sets",
        "Megatron's multiple-validation-sets",
        "Megatron requires full-validation with them, which fails",
        remedy="remove multiple-validation-sets (in jobs of this package, validation.sets does it)",
    ),
    Feature("perform_rl_step", "reinforcement learning", "it has another loss and other data"),
    Feature("hybrid_context_parallel", "hybrid context parallelism", "untested with a teacher"),
    Feature("yaml_cfg", "Megatron's own --yaml-cfg", "the teacher's arguments are derived from the command line"),
    Feature("logits_load_dir", "Megatron's distillation from logits on disk", "it is another distillation loss"),
    # Not implemented in this package's forward step and data.
    Feature("fim_data", "fill-in-the-middle data", "this job builds Megatron's plain GPT datasets", (JOB,)),
    Feature("dataloader_type", "an external data loader", "this job builds Megatron's own", (JOB,), value="external"),
    # Bypasses the hooks, on every host.
    Feature(
        "overlap_moe_expert_parallel_comm",
        "combined 1F1B, which overlaps expert communication,",
        _SCHEDULE_PLAN,
        remedy="give such a student to attach() in a training loop of your own, or remove "
        "overlap-moe-expert-parallel-comm",
        models=("student",),
    ),
    Feature(
        "overlap_moe_expert_parallel_comm",
        "combined 1F1B, which overlaps expert communication,",
        "it runs a schedule plan of forward and backward passes, and a teacher has no backward pass",
        _ANYWHERE,
        ("teacher",),
    ),
    Feature("delay_wgrad_compute", "delaying weight gradients, a part of combined 1F1B,", _SCHEDULE_PLAN, _ANYWHERE),
    Feature(
        "cuda_graph_impl",
        "a CUDA graph",
        "it would not replay the teacher's communication and queue; untested",
        _ANYWHERE,
    ),
    Feature(
        "mtp_standalone",
        "a separate pipeline stage for multi-token prediction",
        "stages then exchange shapes first, which synchronizes the device while the teacher's messages are in flight",
        _ANYWHERE,
    ),
    Feature(
        "use_megatron_fsdp",
        "Megatron FSDP",
        "jobs read and write checkpoints of the format torch_dist, and it needs fsdp_dtensor",
        (*_ARGUMENTS, BRIDGE),
        ("student",),
        setting="dist.use_megatron_fsdp",
        remedy="give such a student to attach() in a training loop of your own, or remove use-megatron-fsdp",
    ),
    Feature("use_megatron_fsdp", "Megatron FSDP", "a frozen teacher has no gradients to shard", models=("teacher",)),
    Feature("use_torch_fsdp2", "torch FSDP2", _SHARDED, (*_ANYWHERE, BRIDGE), setting="dist.use_torch_fsdp2"),
    # Exists once per process, for the student's sizes or backward pass.
    Feature(
        "tp_comm_overlap",
        "overlapped tensor-parallel communication",
        "its buffers have the student's sizes",
        _ANYWHERE,
        ("teacher",),
    ),
    Feature("cpu_offloading_num_layers", "offloading activations", _KEEPS_NONE, _ANYWHERE, ("teacher",)),
    Feature("fine_grained_activation_offloading", "offloading activations", _KEEPS_NONE, _ANYWHERE, ("teacher",)),
    Feature(
        "mtp_num_layers",
        "multi-token prediction",
        "no loss here uses its predictions",
        _ANYWHERE,
        ("teacher",),
        remedy="remove mtp-num-layers from `teacher:` (the checkpoint may have them)",
    ),
    Feature("num_layers_per_virtual_pipeline_stage", *_NO_VIRTUAL),
    Feature("num_virtual_stages_per_pipeline_rank", *_NO_VIRTUAL),
    # Not available in the CPU backend.
    Feature(
        "async_save",
        "saving in the background on a CPU",
        "the writer process does not have the CPU backend",
        (ON_CPU,),
    ),
    Feature("record_memory_history", "a trace of GPU memory", "there is no GPU", (ON_CPU,)),
    # Untested in Bridge with a teacher.
    Feature(
        "eval_context_parallel_size",
        "separate context parallelism for validation",
        "it would move the student to other process groups than the teacher's",
        (BRIDGE,),
        setting="dist.eval_context_parallel_size",
    ),
    # Cannot run without data.
    Feature("multi_latent_attention", "multi-latent attention", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
    Feature(
        "moe_latent_size",
        "a latent mixture of experts",
        "its projections are TransformerEngine's only",
        (ESTIMATE,),
        remedy="leave moe-latent-size out here",
    ),
    Feature("fp8", "fp8", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
    Feature("fp4", "fp4", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
)


def check_features(config: Any, who: str, host: str) -> None:
    """Reject unsupported features.

    Args:
        config: see `Feature.is_on`.
        who: "student" or "teacher".
        host: one of `HOSTS`.

    Raises:
        ConfigError: with feature, reason and remedy.
    """
    for feature in UNSUPPORTED:
        if host in feature.hosts and who in feature.models and feature.is_on(config, host):
            raise feature.error(who, host)


# Settings that Megatron ignores unless another one is set; None if training of GPT models never reads them. Each with a
# condition under which it has an effect.
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


def check_layout(args: Namespace, who: str, host: str, options: Mapping[str, argparse.Action]) -> None:
    """Reject unsupported or invalid arguments before Megatron builds anything.

    Args:
        args: Megatron's arguments.
        who: "student" or "teacher".
        host: `JOB` or `SCRIPT`.
        options: from `megatron_options`.

    Raises:
        ConfigError: with feature, reason and remedy.
    """
    check_pattern(args, who)
    on_gpus = args.distributed_backend != "gloo"
    for where in (host,) if on_gpus else (host, ON_CPU):
        check_features(args, who, where)
    if args.mtp_num_layers and args.pipeline_model_parallel_layout:
        raise ConfigError(
            f"{who}: multi-token prediction is supported on the last pipeline stage only; remove "
            "pipeline-model-parallel-layout or mtp-num-layers"
        )
    if not args.pad_vocab_size and args.padded_vocab_size is None:
        raise ConfigError(
            f"{who}: expected a padded vocabulary, got no-pad-vocab-size, with which Megatron fails when it counts "
            "FLOPs; use make-vocab-size-divisible-by=1 instead"
        )
    if who == "student":
        check_effect(args, who, options)
    if who == "student" and args.eval_interval is None and not args.skip_train:
        raise ConfigError(
            "student: expected eval-interval, which sets the size of the validation data, got none; set "
            "megatron.eval-interval (above train-iters to validate only at the end)"
        )
    if who == "student" and on_gpus and args.use_cpu_initialization and not args.use_distributed_optimizer:
        raise ConfigError(
            "student: use-cpu-initialization is not supported on a GPU: Megatron leaves a model from a model config on "
            "the CPU, unless the distributed optimizer moves it; remove use-cpu-initialization, or add "
            "use-distributed-optimizer"
        )
    _check_sizes(args, who)
    if host == JOB:
        _check_packed(args, who)
    stages = args.pipeline_model_parallel_size
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
        args.account_for_embedding_in_pipeline_split or None,
        args.account_for_loss_in_pipeline_split or None,
    )
    if args.num_layers is not None and pattern_of(args) is None and not any(uneven) and args.num_layers % stages:
        raise ConfigError(
            f"{who}: {args.num_layers} layers do not divide over {stages} pipeline stages; change num-layers or "
            "pipeline-model-parallel-size, or set decoder-first-pipeline-num-layers"
        )


def check_effect(
    args: Namespace, who: str, options: Mapping[str, argparse.Action], settings: Iterable[str] = _BELONGS_TO
) -> None:
    """Reject a setting that Megatron would accept and ignore.

    Args:
        args: Megatron's arguments.
        who: "student" or "teacher".
        options: from `megatron_options`.
        settings: destinations to check.

    Raises:
        ConfigError: with the setting and the one that it depends on.
    """
    defaults = {action.dest: action.default for action in options.values()}
    for name in settings:
        belongs_to, has_effect = _BELONGS_TO.get(name, ("", lambda args: True))
        value = getattr(args, name, None)
        if value != defaults.get(name) and not has_effect(args):
            spelled = name.replace("_", "-")
            remedy = f"add {belongs_to}, or remove it" if belongs_to else "remove it"
            if name in _INSTEAD:
                remedy = f"use {_INSTEAD[name]}"
            where = f"without {belongs_to}" if belongs_to else "in training of GPT models"
            raise ConfigError(f"{who}: {spelled} {value} would be ignored: Megatron does not read it {where}; {remedy}")


def _check_packed(args: Namespace, who: str) -> None:
    """Reject packed data that a model or its job cannot read.

    Raises:
        ConfigError: with the setting and the remedy.
    """
    packed = [name for name in ("sft", "dataloader_inter_document_masking") if getattr(args, name)]
    if not packed:
        return
    option = packed[0].replace("_", "-")
    if args.transformer_impl == "local" and args.spec is None:
        raise ConfigError(
            f"{who}: expected an attention that keeps packed sequences apart, got Megatron's own, which does not; "
            f"use transformer-impl=transformer_engine on a GPU, give a layer spec, or remove {option}"
        )
    if len(packed) > 1:
        raise ConfigError(f"{who}: sft already packs its data; remove dataloader-inter-document-masking")
    sizes = {args.micro_batch_size, args.eval_micro_batch_size or args.micro_batch_size}
    if sizes != {1}:
        raise ConfigError(
            f"{who}: expected packed rows one at a time, got micro-batches of {max(sizes)}; set micro-batch-size=1 "
            "and a larger seq-length"
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"{who}: {option} with context parallelism is not supported: untested with a teacher; set "
            "context-parallel-size=1"
        )
    resets = [name for name in ("reset_position_ids", "reset_attention_mask") if getattr(args, name)]
    if resets:
        raise ConfigError(
            f"{who}: {option} starts positions and attention anew in every sequence by itself; remove "
            f"{resets[0].replace('_', '-')}"
        )
    if args.sft and importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"{who}: Megatron reads sft data with the package datasets, which is not installed; install it"
        )


def _check_sizes(args: Namespace, who: str) -> None:
    """Reject sizes that are not divisible, with a clearer message than Megatron's.

    Raises:
        ConfigError: with the sizes and the remedy.
    """
    sizes = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
    }
    if min(sizes.values()) < 1:
        return  # Megatron reports it
    ranks = math.prod(sizes.values())
    if args.world_size % ranks:
        shown = " x ".join(f"{name}-parallel {size}" for name, size in sizes.items() if size > 1)
        raise ConfigError(
            f"{who}: expected a multiple of {ranks} ranks ({shown}), got {args.world_size}; change the number "
            "of ranks or these sizes"
        )
    heads, tensor = args.num_attention_heads, args.tensor_model_parallel_size
    if heads and args.hidden_size and args.kv_channels is None and args.hidden_size % heads:
        raise ConfigError(
            f"{who}: hidden-size {args.hidden_size} does not divide over {heads} attention heads; change hidden-size "
            "or num-attention-heads, or set kv-channels, the size of a head"
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
            f"ranks; use a multiple of {micro * data}, or another micro-batch-size"
        )
