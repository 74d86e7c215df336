"""Allow-list of the Megatron settings that the teacher inherits from the student.

A setting has one of three kinds:

- `MODEL`: it defines the model.
- `SHARED`: both models must or may share it (tokens, parallelism, precision, kernels).
- `STUDENT`: it concerns the student's training only (optimizer, recomputation, offloading, overlapped communication,
  fp8, virtual pipeline stages, files, logs). These are not inherited.

`tests/unit/test_inherited.py` fails if a setting of the installed Megatron has no kind.
"""

import re
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from abkd_megatron.config.pattern import PATTERN_OPTIONS
from abkd_megatron.config.values import MegatronOptions, Options
from abkd_megatron.config.yaml import dashed, flow

MODEL, SHARED, STUDENT = "model", "shared", "student"

# Regular expressions for destinations in Megatron's parser and fields of its model configurations. Each matches a
# complete name. A name has one kind only.
_NAMES = {
    MODEL: r"""
        (encoder_|decoder_)?num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
        softmax_type softmax_scale apply_residual_connection_post_layernorm apply_query_key_layer_scaling
        attention_softmax_in_fp32 normalization layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm qk_l2_norm
        add_bias_linear add_qkv_bias gated_linear_unit activation_func(_clamp_value)? glu_linear_offset
        attention_output_gate window_size window_attn_skip_freq
        position_embedding_type rotary_(base|percent|interleaved) rope_(type|scaling|scaling_factor) no_rope_freq
        mrope_section seq_len_interpolation_factor original_max_position_embeddings beta_(fast|slow)
        multi_latent_attention (q|kv)_lora_rank (qk|v|qk_pos_emb)_head_dim rotary_scaling_factor mscale(_all_dim)?
        experimental_attention_variant dsa_indexer_(?!loss_coeff|use_sparse_loss).* linear_(?!attention_freq).*
        linear_attention_freq use_mup mup_.*
        num_experts num_moe_experts moe_(shared_expert_(intermediate_size|gate|glu_interleave_size)|ffn_hidden_size)
        moe_(layer_freq|latent_size|mlp_glu_interleave_size|apply_probs_on_input|aux_loss_coeff|token_dropping)
        moe_(expert_capacity_factor|pad_expert_input_to_capacity|token_drop_policy)
        moe_router_(topk.*|num_groups|group_topk|pre_softmax|score_function|dtype|enable_expert_bias|load_balancing_type)
        is_hybrid_model hybrid_(layer|override)_pattern mamba_(state_dim|head_dim|num_groups|num_heads)
        heterogeneous_block_specs per_block_parameters spec transformer transformer_layer_spec
        share_embeddings_and_output_weights make_vocab_size_divisible_by hidden_dropout attention_dropout
        """,
    SHARED: r"""
        seq_length (en|de)coder_seq_length micro_batch_size (padded_)?vocab_size should_pad_vocab verify_integrity
        (tensor|pipeline)_model_parallel_size sequence_parallel context_parallel_size cp_comm_type
        hierarchical_context_parallel_sizes expert_(model|tensor)_parallel_size (expert_)?gtp_weight_remat_size
        (expert_)?tensor_parallel_num_weight_shards variable_seq_lengths
        fp16 bf16 (params|pipeline|autocast)_dtype enable_autocast fp32_residual_connection deterministic_mode
        disable_bf16_reduced_precision_matmul batch_invariant_mode
        transformer_impl attention_backend flash_attention_version use_flash_attn dsa_kernel_backend
        use_kitchen(_attention)? kitchen_attention_backend mla_down_proj_fusion moe_(grouped_gemm|permute_fusion)
        moe_(router_fusion|token_dispatcher_type) use_grouped_gemm_for_(dense_mlp|shared_expert)
        use_te_activation_func use_transformer_engine_op_fuser use_fused_weighted_squared_relu fused_.*
        masked_softmax_fusion bias_.*_fusion apply_rope_fusion (no_)?persist_layer_norm memory_efficient_layer_norm
        gradient_accumulation_fusion use_mamba_mem_eff_path
        use_cpu_initialization perform_initialization (output_layer_|embedding_)?init_method use_te_rng_tracker
        batch_p2p_(comm|sync) deallocate_pipeline_outputs parallel_output scatter_embedding_sequence_parallel
        use_arbitrary_attention_mask hetereogenous_dist_checkpoint (pre|post)_wrap_hooks restore_modelopt_state
        extra_checkpoint_metadata
        """,
    STUDENT: r"""
        mtp_.* pipeline_model_parallel_(layout|comm_backend) account_for_.* num_layers_in_(first|last)_pipeline_stage
        virtual_pipeline_model_parallel_size microbatch_group_size_per_vp_stage max_seqlen_per_dp_cp_rank
        hybrid_context_parallel
        recompute_.* distribute_saved_activations checkpoint_activations num_microbatches_with_partial.*
        moe_layer_recompute
        _?cpu_offloading.* fine_grained_.* .*offload(ed|_modules|_until|_bytes|_fraction).* activation_offload_fraction
        moe_paged_stash.* mlp_chunks_for_.* clone_scatter_output_in_embedding
        tp_comm_.* (ep_)?overlap_.* delay_.* defer_.* wgrad_.* high_priority_a2a_comm_stream use_ring_exchange_p2p
        moe_(shared_expert_overlap|enable_deepep|flex_.*|deepep_.*|hybridep_.*|ncclep_.*|permute_fusion_into_hybridep)
        moe_(expert_rank_capacity_factor|single_grouped_.*|pad_experts_for_cuda_graph_inference|per_layer_logging)
        moe_(z_loss_coeff|input_jitter_eps|use_upcycling|upcycling_granularity|enable_routing_replay|routing_trace_.*)
        moe_router_(padding_.*|bias_update_rate|quantile_balancing_ema|force_.*)
        fp8.* fp4.* first_last_layers_bf16 num_layers_at_(start|end)_in_bf16 tp_only_amax_red quant_recipe
        te_precision_config_file kitchen_(config_file|recipe_number) activation_func_fp8_input_store
        disable_parameter_transpose_cache reuse_grad_buf_.*
        .*cuda_graph.* inference_.* flash_decode use_inference_optimized_layers symmetric_ar_type
        nccl_all_reduce_for_prefill test_mode log_max_attention_logit config_logger_dir barrier_with_L1_time timers
        (.+_)?(grad|param|model_grads|scale|sync)_(scale_)?func
        cross_entropy_.* fp16_lm_cross_entropy calculate_per_token_loss qk_clip.*
        dsa_indexer_(loss_coeff|use_sparse_loss)
        experimental_attention_variant_loss_scale_func init_model_with_meta_device (embedding_)?init_method_std
        init_method_xavier_uniform mamba_training_ssm_states_dtype
        seed te_rng_tracker data_parallel_random_init enable_experimental yaml_cfg (megatron_)?fsdp_.* main_.*_dtype
        exp_avg_.* use_precision_aware_optimizer grad_reduce_in_bf16 .*loss_scale.* hysteresis accumulate_allreduce_.*
        global_batch_size rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed batch_size
        train_.* exit_.* manual_gc.* check_for_.* check_weight_hash.* gpu_sniff_test_interval empty_unused_memory_level
        iterations_to_skip result_rejected_tracker_filename optimizer.* use_torch_optimizer_for_cpu_offload
        dump_param_.* pin_cpu_.* dataloader_type deprecated_use_mcore_models
        """,
}
_KINDS = {kind: re.compile("|".join(f"(?:{name})" for name in names.split())) for kind, names in _NAMES.items()}

# Kinds of the remaining options, by group of Megatron's parser.
_GROUPS = {
    MODEL: ("network size", "mla", "heterogeneous architecture"),
    SHARED: ("tokenizer",),
    STUDENT: (
        *("options", "regularization", "profiling", "rl", "learning rate and weight decay", "checkpointing"),
        *("distributed init", "validation", "data and dataloader", "autoresume", "biencoder", "vision", "logging"),
        *("Logits Distillation", "straggler", "workload inspector", "inference", "one logger", "In-process restart"),
        *("ft_package", "rerun engine", "msc", "sft", "fault injector"),
    ),
}
_GROUP_KINDS = {group: kind for kind, groups in _GROUPS.items() for group in groups}

# {setting: switches}. Without one of its switches a setting has no effect or Megatron rejects it. A switch NAME=VALUE
# is on if the setting has this value.
_ROTARY = (
    "multi_latent_attention",
    "use_rotary_position_embeddings",
    *(f"position_embedding_type={kind}" for kind in ("rope", "yarn", "mrope")),
)
_ONLY_WITH = {
    ("num_experts",): r"moe_.*|expert_(model|tensor)_parallel_size|expert_tensor_parallel_num_weight_shards",
    ("multi_latent_attention",): r"(q|kv)_lora_rank|(qk|v|qk_pos_emb)_head_dim|mla_down_proj_fusion|rope_type",
    ("multi_latent_attention", "position_embedding_type=yarn"): r"rotary_scaling_factor|mscale|mscale_all_dim",
    ("position_embedding_type=yarn",): r"yarn_.*",
    ("position_embedding_type=mrope",): r"mrope_section",
    _ROTARY: r"rotary_(base|percent|interleaved|seq_len_interpolation_factor)|use_rope_scaling|rope_.*|no_rope_freq",
    ("use_rope_scaling",): r"rope_scaling_factor",
    ("group_query_attention",): r"num_query_groups",
    ("window_size",): r"window_attn_skip_freq",
    ("swiglu", "quick_geglu"): r"glu_linear_offset|activation_func_clamp_value",
    ("experimental_attention_variant", *PATTERN_OPTIONS): r"dsa_.*|linear_.*",
    PATTERN_OPTIONS: r"mamba_.*|use_mamba_mem_eff_path",
    ("use_mup",): r"mup_.*",
}
# Settings that HybridModel does not apply.
_NOT_HYBRID = ("use_rope_scaling", "rope_scaling_factor", "rotary_interleaved")
# Settings that may list a value per layer. A list does not fit a teacher with another number of layers.
_OF_LAYERS = ("moe_layer_freq", "linear_attention_freq", "no_rope_freq", "window_attn_skip_freq")
# Files that describe every layer's sizes. They do not fit a teacher of another size.
_OF_BLOCKS = re.compile(r"heterogeneous_layers_config_.*")
_LAYERS = ("num_layers", "encoder_num_layers")
_SIZES = {*_LAYERS, "hidden_size", "ffn_hidden_size", "num_attention_heads"}
# Sets of alternatives. If the teacher sets one, it does not inherit the others.
_ALTERNATIVES = (
    {"num_layers", "encoder_num_layers"},
    {"seq_length", "encoder_seq_length"},
    {"position_embedding_type", "use_rotary_position_embeddings"},
    {"multi_latent_attention", "group_query_attention"},
    {"swiglu", "squared_relu", "quick_geglu", "openai_gelu"},
    {"fp16", "bf16"},
)
# The flex dispatcher has one buffer per process, of the first model's size. alltoall gives the same outputs.
_IN_PLACE_OF = {("moe_token_dispatcher_type", "flex"): "alltoall"}

# Settings that both models share and that a checkpoint's arguments may set.
_OF_CHECKPOINT = (
    *("seq_length", "tokenizer_type", "tokenizer_model", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    "expert_model_parallel_size",
)

# Settings without an effect by themselves, to which Megatron assigns other types than their defaults have.
_DEPENDENT = (
    "recompute_modules",
    "cuda_graph_modules",
    "microbatch_group_size_per_vp_stage",
    "embedding_init_method_std",
)


def kind_of(name: str, group: str | None = None) -> str | None:
    """Return `MODEL`, `SHARED` or `STUDENT`; None for an unknown setting.

    Args:
        name: destination in Megatron's parser, or field of its model configurations.
        group: title of the option's group in Megatron's parser.
    """
    kinds = [kind for kind, names in _KINDS.items() if names.fullmatch(name)]
    assert len(kinds) < 2, f"{name} has two kinds: {kinds}"
    return kinds[0] if kinds else _GROUP_KINDS.get(group or "")


def teacher_settings(megatron: Mapping[str, Any], own: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the teacher's Megatron arguments: inherited ones, overridden by the `teacher:` section.

    Args:
        megatron: the student's arguments, see `to_argv`.
        own: arguments of the `teacher:` section.
        options: from `megatron_options`.
    """
    known = MegatronOptions(options)
    ours = {known.dest(name): value for name, value in own.items()}
    theirs = {known.dest(name): value for name, value in megatron.items()}
    left_out = {
        name
        for alternatives in _ALTERNATIVES
        if any(ours.get(name) not in (None, False) for name in alternatives)
        for name in alternatives
    }
    # A pattern is never inherited. Between models of two kinds, neither is what counts layers or specifies them.
    left_out.update((*PATTERN_OPTIONS, "mtp_hybrid_override_pattern"))
    is_hybrid = [any(of.get(name) for name in PATTERN_OPTIONS) for of in (theirs, ours)]
    if any(is_hybrid):
        left_out.update(_LAYERS)
    if is_hybrid[0] != is_hybrid[1]:
        left_out.add("spec")
    if is_hybrid[1]:
        left_out.update(_NOT_HYBRID)
    both = {**{name: value for name, value in theirs.items() if name not in left_out}, **ours}
    off = [names for switches, names in _ONLY_WITH.items() if not any(_has(both, switch) for switch in switches)]
    layers = [next((of[name] for name in _LAYERS if of.get(name) is not None), None) for of in (theirs, both)]
    groups = group_of_each(options)
    inherited = {}
    for name, value in megatron.items():
        dest = known.dest(name)
        if dest in ours or dest in left_out or any(re.fullmatch(names, dest) for names in off):
            continue
        if dest in _OF_LAYERS and (isinstance(value, list) or "[" in str(value)) and str(layers[0]) != str(layers[1]):
            continue
        if _OF_BLOCKS.fullmatch(dest) and _SIZES & ours.keys():
            continue
        if kind_of(dest, groups[dest]) in (MODEL, SHARED):
            inherited[name] = _IN_PLACE_OF.get((dest, value if isinstance(value, str) else ""), value)
    return {**inherited, **own}


def inherited_architecture(megatron: Mapping[str, Any], own: Mapping[str, Any], options: Options) -> dict[str, str]:
    """Return the inherited settings that define the teacher's model, see `TeacherCheckpoint.inherited`.

    Args:
        megatron: see `teacher_settings`.
        own: see `teacher_settings`.
        options: see `teacher_settings`.
    """
    known, groups = MegatronOptions(options), group_of_each(options)
    names = {name: known.dest(name) for name in teacher_settings(megatron, own, options) if name not in own}
    return {
        dest: f"{name}={flow(megatron[name])}"
        for name, dest in names.items()
        if kind_of(dest, groups[dest]) == MODEL and megatron[name] is not None
    }


def declared_vocabulary(own: Mapping[str, Any]) -> int | None:
    """Return the size of the teacher's vocabulary if the `teacher:` section has one."""
    return next((int(value) for name, value in own.items() if dashed(name) == "vocab-size" and value), None)


def of_checkpoint(megatron: Mapping[str, Any], student: Namespace, options: Options) -> dict[str, Any]:
    """Return the student's settings with the values that its checkpoint has set (`--use-checkpoint-args`).

    Args:
        megatron: the student's arguments, see `to_argv`.
        student: Megatron's validated arguments.
        options: from `megatron_options`.
    """
    known, groups = MegatronOptions(options), group_of_each(options)
    # Derived by Megatron's validation. A teacher of another size derives other values.
    wide = int(4 * student.hidden_size * 2 / 3 / 64) * 64 if student.swiglu else 4 * student.hidden_size
    derived = {
        *("encoder_num_layers", "encoder_seq_length"),
        *(["kv_channels"] if student.kv_channels == student.hidden_size // student.num_attention_heads else []),
        *(["ffn_hidden_size"] if student.ffn_hidden_size == wide else []),
    }
    became: dict[str, Any] = {}
    taken = set()
    for name, action in options.items():
        dest = action.dest
        if dest in derived or not (kind_of(dest, groups[dest]) == MODEL or dest in _OF_CHECKPOINT):
            continue
        value = getattr(student, dest, None)
        taken.add(dest)
        if value is None or value == action.default or dest in map(known.dest, became):
            continue
        if isinstance(action, BooleanOptionalAction):
            became[name] = value if not name.startswith("no-") else not value
        elif action.nargs == 0:
            if value == action.const:
                became[name] = True
        else:
            became[name] = value if action.nargs or not isinstance(value, list | tuple) else str(value)
    return {name: value for name, value in megatron.items() if known.dest(name) not in taken} | became


def _has(settings: Mapping[str, Any], switch: str) -> bool:
    name, _, value = switch.partition("=")
    return str(settings.get(name)) == value if value else _is_on(settings.get(name))


def _is_on(value: object) -> bool:
    return bool(value) and str(value).lower() not in ("0", "false")


def group_of_each(options: Options) -> dict[str, str]:
    """Return {destination: title of the option's group in Megatron's parser}."""
    return {action.dest: str(getattr(action, "container").title) for action in options.values()}  # noqa: B009


def forget_run_of(model: Any) -> None:
    """Reset the `STUDENT` fields of a model configuration from another run's checkpoint to Megatron's defaults.

    Args:
        model: a TransformerConfig, or a configuration with its fields; changed in place.
    """
    for item in fields(getattr(model, "transformer", model)):
        if kind_of(item.name) == STUDENT and item.name not in _DEPENDENT:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if default is not MISSING and getattr(model, item.name) != default:
                setattr(model, item.name, default)
    for (name, value), other in _IN_PLACE_OF.items():
        if getattr(model, name) == value:
            setattr(model, name, other)
