"""What is rejected of Megatron's arguments, by name, before anything is built."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping

from megatron.training.models.gpt import GPTModelConfig

from abkd_megatron.config.megatron_args import megatron_options, megatron_refusals_named
from abkd_megatron.config.model_config import model_config
from abkd_megatron.config.stages import check_stages
from abkd_megatron.config.unsupported_features import check_config
from abkd_megatron.errors import ConfigError

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
# And what this integration's own forward step and data do not do.
_OWN_STEP = "this job's forward step does not make packed_seq_params (attach() takes a forward step that does)"
UNSUPPORTED_IN_JOBS = UNSUPPORTED | {
    "sft": ("packed fine-tuning data", _OWN_STEP),
    "dataloader_inter_document_masking": ("packed pretraining data", _OWN_STEP),
    "fim_data": ("fill-in-the-middle data", "this job builds Megatron's plain GPT datasets"),
    "dataloader_type=external": ("an external data loader", "this job builds Megatron's own"),
}
# And on a CPU.
_UNSUPPORTED_ON_CPU = {
    "async_save": ("saving in the background on a CPU", "the process that writes lacks the stand-in for a GPU"),
    "record_memory_history": ("a trace of GPU memory", "there is no GPU"),
}
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
