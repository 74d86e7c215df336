"""Megatron's features that are not supported, and arguments that cannot be together. Does not import Megatron."""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from abkd_megatron.config.pattern import check_pattern, pattern_of
from abkd_megatron.errors import ConfigError

# Where a feature is rejected: in this package's jobs, in a pretraining script, in both on a CPU, in Megatron Bridge, in
# a model that is given to `attach`, and in `estimate`. All read Megatron's arguments but for the model, which has a
# TransformerConfig, and Bridge, which has a container of configurations.
JOB, SCRIPT, ON_CPU, BRIDGE, MODEL, ESTIMATE = HOSTS = ("job", "script", "on a CPU", "bridge", "model", "estimate")
_ARGUMENTS = (JOB, SCRIPT)
_ANYWHERE = (JOB, SCRIPT, MODEL)


@dataclass(frozen=True)
class Feature:
    """A feature that is off by default, and not supported."""

    argument: str
    """Destination in Megatron's parser, and the name in a TransformerConfig that has it."""
    name: str
    """What a message calls it."""
    reason: str
    hosts: tuple[str, ...] = _ARGUMENTS
    """Where it is rejected, of `HOSTS`."""
    models: tuple[str, ...] = ("student", "teacher")
    """Of which model it is rejected."""
    value: str | None = None
    """The one value that is rejected; None: any that turns the feature on."""
    setting: str | None = None
    """Dotted, in Bridge's container."""
    remedy: str | None = None
    """What to change; None: remove the argument."""

    def error(self, who: str, host: str = JOB) -> ConfigError:
        """Return the error that rejects it of a model, "student" or "teacher"."""
        name = self.setting if host == BRIDGE else self.argument.replace("_", "-")
        return ConfigError(f"{who}: {self.name} is not supported: {self.reason}; {self.remedy or f'remove {name}'}")

    def is_on(self, config: Any, host: str) -> bool:
        """Return whether a configuration asks for it.

        Args:
            config: what the host has: arguments, a TransformerConfig or Bridge's container.
            host: one of `HOSTS`.
        """
        given = attrgetter(self.setting or "")(config) if host == BRIDGE else getattr(config, self.argument, None)
        return str(given) == self.value if self.value else bool(given) and given != "none"


_GET_MODEL = "Megatron reads it in get_model() alone, which builds no model from a model config: it would be ignored"
_OWN_STEP = "this job's forward step does not make packed_seq_params (attach() takes a forward step that does)"
_SCHEDULE_PLAN = "it runs a schedule plan in place of the model's forward, past the teacher"
_SHARDED = "it shards the student's weights over data-parallel ranks; the loss reads the output layer's as one"
_KEEPS_NONE = "a teacher keeps no activations for a backward pass"
_NO_VIRTUAL = (
    "virtual pipeline stages",
    "they shorten the wait for a backward pass, and a teacher has none",
    _ARGUMENTS,
    ("teacher",),
)
_NO_DATA = "a job with it cannot be estimated without data"

UNSUPPORTED = (
    # What no forward step here does, or Megatron does not do with a model config.
    Feature("freeze_all_layers", "freezing all layers", _GET_MODEL),
    Feature("create_all_gather_group", "a group of its own for all-gathers", _GET_MODEL),
    Feature(
        "logits_save_dir",
        "saving logits to disk",
        "Megatron then trains on no loss and only writes logits, and the loss beside a teacher would go on training",
    ),
    Feature(
        "full_validation", "validation on whole datasets", "megatron-core 0.19 fails in it, or in the test after it"
    ),
    Feature("multiple_validation_sets", "several validation sets", "Megatron takes them with full-validation alone"),
    Feature("perform_rl_step", "reinforcement learning", "it is another loss, on data of its own"),
    Feature(
        "hybrid_context_parallel", "hybrid context parallelism", "a teacher was never run on batches that are split so"
    ),
    Feature(
        "yaml_cfg", "Megatron's own --yaml-cfg", "the teacher's arguments are derived from those of the command line"
    ),
    Feature("logits_load_dir", "Megatron's distillation from logits on disk", "it is another loss beside this one"),
    # What this package's own forward step and data do not do.
    Feature("sft", "packed fine-tuning data", _OWN_STEP, (JOB,)),
    Feature("dataloader_inter_document_masking", "packed pretraining data", _OWN_STEP, (JOB,)),
    Feature("fim_data", "fill-in-the-middle data", "this job builds Megatron's plain GPT datasets", (JOB,)),
    Feature("dataloader_type", "an external data loader", "this job builds Megatron's own", (JOB,), value="external"),
    # What goes around the hooks, whoever builds the models.
    Feature(
        "overlap_moe_expert_parallel_comm",
        "combined 1F1B, which overlaps expert communication,",
        _SCHEDULE_PLAN,
        _ANYWHERE,
    ),
    Feature("delay_wgrad_compute", "delaying weight gradients, a part of combined 1F1B,", _SCHEDULE_PLAN, _ANYWHERE),
    Feature(
        "cuda_graph_impl",
        "a CUDA graph",
        "it would not replay the teacher's messages and its queue, and it was never run",
        _ANYWHERE,
    ),
    Feature(
        "mtp_standalone",
        "a pipeline stage of its own for multi-token prediction",
        "stages then exchange shapes first, and synchronize the device while the teacher's messages are open",
        _ANYWHERE,
    ),
    Feature("use_megatron_fsdp", "Megatron FSDP", _SHARDED, (*_ANYWHERE, BRIDGE), setting="dist.use_megatron_fsdp"),
    Feature("use_torch_fsdp2", "torch FSDP2", _SHARDED, (*_ANYWHERE, BRIDGE), setting="dist.use_torch_fsdp2"),
    # What a process has one of, made for the student's sizes or its backward pass.
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
        "its layers predict what no loss here compares",
        _ANYWHERE,
        ("teacher",),
        remedy="remove mtp-num-layers from `teacher:` (the checkpoint may have them)",
    ),
    Feature("num_layers_per_virtual_pipeline_stage", *_NO_VIRTUAL),
    Feature("num_virtual_stages_per_pipeline_rank", *_NO_VIRTUAL),
    # What the stand-in for a GPU does not have.
    Feature(
        "async_save",
        "saving in the background on a CPU",
        "the process that writes lacks the stand-in for a GPU",
        (ON_CPU,),
    ),
    Feature("record_memory_history", "a trace of GPU memory", "there is no GPU", (ON_CPU,)),
    # What of Bridge was never run with a teacher.
    Feature("peft", "an adapter", "it changes the layers that the loss reads", (BRIDGE,), setting="peft"),
    Feature(
        "eval_context_parallel_size",
        "context parallelism of its own for validation",
        "it would move the student to other process groups than the teacher's",
        (BRIDGE,),
        setting="dist.eval_context_parallel_size",
    ),
    # What does not run without data.
    Feature("num_experts", "a mixture of experts", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
    Feature("multi_latent_attention", "multi-latent attention", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
    Feature("fp8", "fp8", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
    Feature("fp4", "fp4", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
    Feature("mtp_num_layers", "multi-token prediction", _NO_DATA, (ESTIMATE,), remedy="leave it out here"),
)


def check_features(config: Any, who: str, host: str) -> None:
    """Reject what is on of the features that are not supported.

    Args:
        config: what the host has: arguments, a TransformerConfig or Bridge's container.
        who: "student" or "teacher".
        host: one of `HOSTS`.

    Raises:
        ConfigError: naming the feature, the reason and what to change.
    """
    for feature in UNSUPPORTED:
        if host in feature.hosts and who in feature.models and feature.is_on(config, host):
            raise feature.error(who, host)


# Settings of a model that Megatron takes and does not build, where the one that they belong to is not set: None for
# those that nothing in its training of GPT models reads. With each, when it has an effect all the same.
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
    """Reject what cannot be run, by name, before Megatron builds anything.

    Args:
        args: Megatron's arguments.
        who: "student" or "teacher".
        host: `JOB` or `SCRIPT`.
        options: as `megatron_options` returns them.

    Raises:
        ConfigError: naming the feature, the reason and what to change.
    """
    check_pattern(args, who)
    on_gpus = args.distributed_backend != "gloo"
    for where in (host,) if on_gpus else (host, ON_CPU):
        check_features(args, who, where)
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
    if who == "student":
        check_effect(args, who, options)
    if who == "student" and args.eval_interval is None and not args.skip_train:
        raise ConfigError(
            "student: expected eval-interval, by which Megatron sizes the validation data, got nothing; set "
            "megatron.eval-interval, beyond train-iters to validate at the end alone"
        )
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
    if args.num_layers is not None and pattern_of(args) is None and not any(uneven) and args.num_layers % stages:
        raise ConfigError(
            f"{who}: {args.num_layers} layers do not divide over {stages} pipeline stages; change num-layers or "
            "pipeline-model-parallel-size, or say decoder-first-pipeline-num-layers"
        )


def check_effect(
    args: Namespace, who: str, options: Mapping[str, argparse.Action], settings: Iterable[str] = _BELONGS_TO
) -> None:
    """Reject a setting that would be taken, and change nothing of what is built.

    Args:
        args: Megatron's arguments.
        who: "student" or "teacher".
        options: as `megatron_options` returns them.
        settings: by destination, the ones to look at.

    Raises:
        ConfigError: naming the setting, and the one that it belongs to.
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
            where = f"without {belongs_to}" if belongs_to else "in its training of GPT models"
            raise ConfigError(f"{who}: {spelled} {value} would be ignored: Megatron does not read it {where}; {remedy}")


def _check_sizes(args: Namespace, who: str) -> None:
    """Reject sizes that do not divide, of which Megatron says the names of its variables, or nothing.

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
