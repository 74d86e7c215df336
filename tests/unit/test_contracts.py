"""What this package takes of Megatron, by name: where a release moves something, the message says what and who uses it.

A call is held against `inspect.signature` with the arguments that we give. What only running shows is in `tests/host`.
"""

import ast
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.training")

from megatron.core.package_info import __version__

import abkd_megatron

PACKAGE = Path(abkd_megatron.__file__).parent


@dataclass(frozen=True)
class Call:
    """A function, a class or a method (`module:Class.method`), and how it is called."""

    target: str
    user: str
    """The file that calls it."""
    positional: tuple[str, ...] = ()
    """What we give by position, as Megatron names it."""
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.target


PREFLIGHT, RULES = "preflight/live.py", "preflight/rules.py"
WRAPPERS, PLANNED = "student/wrappers.py", "student/planned.py"
FAULTS, ATTACH, HEAD = "student/loss_guard.py", "student/attach.py", "student/head.py"
SAFE_LOAD, COMPATIBILITY = "teacher/safe_load.py", "teacher/compatibility.py"
CHECKPOINT, TEACHER, RUNNER = "teacher/checkpoint.py", "teacher/build.py", "teacher/runner.py"
MODEL, LOCAL_SPEC = "teacher/model.py", "local_hybrid_spec.py"
HIDDEN, PROJECTORS, MIXING = "student/hidden.py", "student/projectors.py", "student/mixing.py"
ADD, JOB, SCRIPT, BRIDGE = (f"hosts/{name}.py" for name in ("add_teacher", "megatron_lm", "script", "bridge"))
MODE, SAMPLER, OWN_TEXT = (f"rollouts/{name}.py" for name in ("mode", "sampler", "own_text"))
GENERATE, EVALUATION = "hosts/generate_job.py", "hosts/evaluation.py"
HELD_OUT = "hosts/held_out.py"
CACHE_JOB, ROUGE_JOB, BATCHES = "hosts/cache_job.py", "hosts/rouge_job.py", "hosts/batches.py"
MEGATRON_ARGS, UNSUPPORTED = "config/megatron_args.py", "config/unsupported.py"
TEACHER_ARGS = "teacher/args.py"
PROVENANCE, MODEL_CONFIG = "preflight/run_record.py", "config/model_config.py"
STAGES = "config/stages.py"
STUDENT = "preflight/student_checkpoint.py"
CPU = "cpu_backend.py"
DRY, META_RUN = "tools/dry_run.py", "tools/meta_run.py"
GPT = "megatron.core.models.gpt:GPTModel"
HYBRID = "megatron.core.models.hybrid.hybrid_model:HybridModel"
HYBRID_BUILDER = "megatron.training.models.hybrid:HybridModelBuilder"
INTEROP = "megatron.core.dist_checkpointing.gpt_checkpoint_interop"
LINEAR = "megatron.core.tensor_parallel:ColumnParallelLinear"
CHECKPOINTS = "megatron.core.dist_checkpointing"
STRATEGIES = f"{CHECKPOINTS}.strategies"
BUILDER = "megatron.training.models.gpt:GPTModelBuilder"
INDEXED = "megatron.core.datasets.indexed_dataset:"
OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

CALLS = [
    # The student and the teacher.
    *(
        call
        for model, config, builder in ((GPT, "GPTModelConfig", BUILDER), (HYBRID, "HybridModelConfig", HYBRID_BUILDER))
        for call in (
            Call(
                f"{model}.forward",
                JOB,
                ("self", "input_ids", "position_ids", "attention_mask"),
                ("labels", "loss_mask"),
            ),
            Call(
                f"{model}.forward",
                RUNNER,
                ("self", "input_ids", "position_ids", "attention_mask"),
                ("packed_seq_params", "padding_mask"),
            ),
            Call(f"{model}.set_input_tensor", RUNNER, ("self", "input_tensor")),
            Call(f"{model}.sharded_state_dict", TEACHER, ("self",), ("metadata",)),
            Call(f"{model}.shared_embedding_or_output_weight", f"{TEACHER}, {MODEL}", ("self",)),
            Call(f"{model}._scale_logits", f"{TEACHER}, {MODEL}", ("self", "logits")),
            Call(f"megatron.training.models:{config}.get_builder_cls", TEACHER, ("self",)),
            Call(builder, TEACHER, ("model_config",)),
            Call(
                f"{builder}.build_distributed_models",
                TEACHER,
                ("self", "pg_collection"),
                ("wrap_with_ddp", "mixed_precision_wrapper"),
            ),
        )
    ),
    Call(
        f"{GPT}.forward",
        MODEL,
        ("self", "input_ids", "position_ids", "attention_mask"),
        ("output_processor", "output_processor_context"),
    ),
    Call(
        f"{GPT}.build_schedule_plan",
        PLANNED,
        ("self", "input_ids", "position_ids", "attention_mask"),
        ("labels", "loss_mask", "packed_seq_params", "output_processor", "output_processor_context"),
    ),
    Call(
        "megatron.core.transformer.multi_token_prediction:process_mtp_loss",
        MODEL,
        (),
        (
            *("hidden_states", "labels", "loss_mask", "output_layer", "output_weight", "runtime_gather_output"),
            *("is_training", "compute_language_model_loss", "config", "cp_group", "tp_group", "packed_seq_params"),
            *("scale_logits_fn", "input_ids"),
        ),
    ),
    Call(f"{INTEROP}:gpt_compatible_layer_maps", MODEL, ("hybrid_layer_pattern",)),
    Call(f"{INTEROP}:retarget_sharded_state_dict_to_gpt_checkpoint", MODEL, ("sharded_state_dict", "layer_maps")),
    # Layers of a HybridModel without TransformerEngine.
    Call(
        "megatron.core.models.hybrid.hybrid_block:HybridStack",
        LOCAL_SPEC,
        ("config", "submodules"),
        ("pre_process", "layer_type_list", "pp_layer_offset", "post_layer_norm", "post_process", "pg_collection"),
    ),
    Call(
        "megatron.core.models.gpt.moe_module_specs:get_moe_module_spec",
        LOCAL_SPEC,
        (),
        ("use_te", "num_experts", "moe_grouped_gemm"),
    ),
    Call("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", LOCAL_SPEC, ("cls", "config", "hidden_size")),
    Call("megatron.core.utils:unwrap_model", WRAPPERS, ("model",)),
    Call("megatron.core.utils:get_model_config", BRIDGE, ("model",)),
    # The output layer.
    Call(
        LINEAR,
        TEACHER,
        ("input_size", "output_size"),
        ("config", "init_method", "bias", "gather_output", "tp_group"),
    ),
    Call(f"{LINEAR}.forward", HEAD, ("self", "input_"), ("weight",)),
    Call(f"{LINEAR}.sharded_state_dict", TEACHER, ("self", "prefix"), ("metadata",)),
    Call("megatron.core.tensor_parallel:copy_to_tensor_model_parallel_region", HEAD, ("input_",), ("group",)),
    Call("megatron.core.tensor_parallel:gather_from_sequence_parallel_region", HEAD, ("input_",), ("group",)),
    # The teacher's checkpoint.
    Call(f"{CHECKPOINTS}:check_is_distributed_checkpoint", CHECKPOINT, ("checkpoint_dir",)),
    Call(f"{CHECKPOINTS}:load_common_state_dict", SAFE_LOAD, ("checkpoint_dir",)),
    Call(f"{CHECKPOINTS}.validation:verify_integrity_manifest", CHECKPOINT, ("checkpoint_dir",)),
    Call(f"{CHECKPOINTS}:check_is_distributed_checkpoint", PROVENANCE, ("checkpoint_dir",)),
    Call(f"{CHECKPOINTS}:check_is_distributed_checkpoint", STUDENT, ("checkpoint_dir",)),
    Call(f"{CHECKPOINTS}:load_content_metadata", CHECKPOINT, (), ("preloaded_state_dict",)),
    Call(
        f"{CHECKPOINTS}:load",
        CHECKPOINT,
        ("sharded_state_dict", "checkpoint_dir", "sharded_strategy"),
        ("validate_access_integrity",),
    ),
    Call(
        f"{STRATEGIES}.fully_parallel:FullyParallelLoadStrategyWrapper",
        CHECKPOINT,
        ("strategy", "parallelization_group"),
    ),
    Call(f"{STRATEGIES}.torch:TorchDistLoadShardedStrategy", CHECKPOINT, (), ("cache_metadata",)),
    Call(
        f"{STRATEGIES}.torch:TorchDistLoadShardedStrategy.load",
        CHECKPOINT,
        ("self", "sharded_state_dict", "checkpoint_dir"),
    ),
    Call(f"{STRATEGIES}.cached_metadata_filesystem_reader:CachedMetadataFileSystemReader", CHECKPOINT, ("path",)),
    Call(
        f"{STRATEGIES}.cached_metadata_filesystem_reader:CachedMetadataFileSystemReader.clear_metadata_cache",
        CHECKPOINT,
    ),
    Call(f"{CHECKPOINTS}.dict_utils:nested_values", CHECKPOINT, ("x",)),
    Call(f"{CHECKPOINTS}.mapping:ShardedTensorFactory.build", CHECKPOINT, ("self",)),
    Call(
        "megatron.training.vocab_utils:calculate_padded_vocab_size",
        COMPATIBILITY,
        ("vocab_size", "make_vocab_size_divisible_by", "tensor_model_parallel_size"),
        ("logging_enabled",),
    ),
    Call("megatron.core.tensor_parallel:get_cuda_rng_tracker", TEACHER),
    Call("megatron.core.tensor_parallel.random:CudaRNGStatesTracker.get_states", TEACHER, ("self",)),
    Call("megatron.core.tensor_parallel.random:CudaRNGStatesTracker.set_states", TEACHER, ("self", "states")),
    Call(
        "megatron.core.process_groups_config:ProcessGroupCollection",
        TEACHER,
        (),
        ("tp", "pp", "cp", "dp", "dp_cp", "embd", "pos_embd"),
    ),
    # Losses.
    Call("megatron.core.rerun_state_machine:get_rerun_state_machine", FAULTS),
    Call(
        "megatron.core.rerun_state_machine:RerunStateMachine.validate_result",
        FAULTS,
        ("self",),
        ("result", "rejection_func", "message", "tolerance", "fatal"),
    ),
    Call("megatron.core.rerun_state_machine:RerunStateMachine.get_mode", FAULTS, ("self",)),
    Call(
        "megatron.core.rerun_state_machine:RerunStateMachine.is_unexpectedly_large",
        FAULTS,
        ("self", "result"),
        ("threshold", "context"),
    ),
    # Losses between layers.
    Call("megatron.core.num_microbatches_calculator:get_num_microbatches", f"student/added.py, {MIXING}"),
    Call(
        "megatron.core.transformer.multi_token_prediction:roll_tensor",
        "student/ahead.py",
        ("tensor",),
        ("cp_group", "packed_seq_params"),
    ),
    Call("megatron.core.utils:make_viewless_tensor", HIDDEN, ("inp", "requires_grad", "keep_graph")),
    Call(
        "megatron.core.transformer.utils:make_sharded_tensors_for_checkpoint",
        PROJECTORS,
        ("state_dict", "prefix", "tensor_parallel_layers_axis_map", "sharded_offsets"),
        ("tp_group", "dp_cp_group"),
    ),
    Call("megatron.training.checkpointing:checkpoint_exists", f"{PROVENANCE}, {STUDENT}", ("checkpoints_path",)),
    # Arguments and the training loop.
    Call(f"{CHECKPOINTS}.strategies.filesystem_async:get_write_results_queue", JOB),
    Call("megatron.training.arguments:add_megatron_arguments", MEGATRON_ARGS, ("parser",)),
    Call("megatron.training.arguments:parse_args", TEACHER_ARGS),
    # Sampling.
    Call("megatron.core.inference.utils:InferenceMode.active", MODE),
    Call(
        "megatron.core.rerun_state_machine:RerunStateMachine.should_run_forward_backward",
        OWN_TEXT,
        ("self", "data_iterator"),
    ),
    Call("megatron.core.num_microbatches_calculator:get_num_microbatches", OWN_TEXT),
    Call(
        "megatron.training.checkpointing:load_checkpoint",
        GENERATE,
        ("ddp_model", "optimizer", "opt_param_scheduler"),
    ),
    Call(
        "megatron.core.inference.contexts:StaticInferenceContext",
        SAMPLER,
        ("max_batch_size", "max_sequence_length"),
    ),
    # The teacher alone.
    Call("megatron.core.pipeline_parallel:get_forward_backward_func", f"{CACHE_JOB}, {SAMPLER}"),
    Call("megatron.training.initialize:initialize_megatron", CACHE_JOB),
    Call(
        "megatron.training.datasets.data_samplers:build_pretraining_data_loader",
        f"{CACHE_JOB}, {EVALUATION}",
        ("dataset", "consumed_samples"),
    ),
    # Validation before the first step, and the best checkpoint.
    Call(
        "megatron.training.training:evaluate_and_print_results",
        EVALUATION,
        (
            *("prefix", "forward_step_func", "data_iterator", "model", "iteration", "process_non_loss_data_func"),
            "config",
        ),
    ),
    Call("megatron.training.training:disable_forward_pre_hook", EVALUATION, ("model_chunks",), ("param_sync",)),
    Call("megatron.training.training:enable_forward_pre_hook", EVALUATION, ("model_chunks",)),
    Call("megatron.training.training:should_disable_forward_pre_hook", EVALUATION, ("args",)),
    Call("megatron.training.async_utils:maybe_finalize_async_save", EVALUATION, (), ("blocking",)),
    Call("megatron.training.training:cyclic_iter", EVALUATION, ("iterable",)),
    Call("megatron.training.training:get_moe_metrics_tracker", EVALUATION),
    Call("megatron.core.utils:get_model_config", EVALUATION, ("model",)),
    Call("megatron.core.rerun_state_machine:RerunDataIterator", EVALUATION, ("iterable",)),
    Call(
        "megatron.training.checkpointing:save_checkpoint",
        EVALUATION,
        ("iteration", "model", "optimizer", "opt_param_scheduler", "num_floating_point_operations_so_far"),
    ),
    Call(
        "megatron.training.checkpointing:get_checkpoint_name",
        EVALUATION,
        ("checkpoints_path", "iteration"),
        ("return_base_dir",),
    ),
    Call("megatron.training.training:get_train_valid_test_num_samples", f"{CACHE_JOB}, {ROUGE_JOB}"),
    Call(
        "megatron.training.training:build_train_valid_test_datasets",
        f"{CACHE_JOB}, {ROUGE_JOB}",
        ("build_train_valid_test_datasets_provider", "train_valid_test_num_samples"),
    ),
    Call(
        "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
        CACHE_JOB,
        (),
        (
            *("forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length", "micro_batch_size"),
            "forward_only",
        ),
    ),
    Call("megatron.training.arguments:parse_and_validate_args", SCRIPT, (), ("extra_args_provider", "args_defaults")),
    Call("megatron.training.arguments:validate_args", TEACHER_ARGS, ("args",)),
    Call("megatron.training.argument_utils:gpt_config_from_args", MODEL_CONFIG, ("args",)),
    Call("megatron.training.argument_utils:hybrid_config_from_args", MODEL_CONFIG, ("args",)),
    Call("megatron.training.argument_utils:pretrain_cfg_container_from_args", JOB, ("args", "model_cfg")),
    Call(
        "megatron.training:pretrain",
        JOB,
        ("cfg_container", "train_valid_test_dataset_provider", "model_type", "forward_step_func"),
        ("non_loss_data_func",),
    ),
    Call("megatron.training.training:get_optimizer_param_scheduler", JOB, ("optimizer",)),
    *(Call(f"megatron.training:get_{name}", JOB) for name in ("args", "tensorboard_writer", "timers", "tokenizer")),
    Call("megatron.training:print_rank_0", f"{ADD}, {RULES}", ("message",)),
    Call("megatron.core.num_microbatches_calculator:get_current_running_global_batch_size", ADD),
    Call("megatron.core.utils:get_attr_wrapped_model", ADD, ("model", "attr")),
    # A job without its ranks and its GPU.
    *(
        Call(f"megatron.core.transformer.{name}", STAGES, ("config", "vp_stage", "pp_rank"))
        for name in ("transformer_block:get_num_layers_to_build", "transformer_layer:get_transformer_layer_offset")
    ),
    Call("megatron.training.checkpointing:load_args_from_checkpoint", DRY, ("args",), ("load_arg",)),
    Call(
        "megatron.core.num_microbatches_calculator:init_num_microbatches_calculator",
        DRY,
        (),
        (
            *("rank", "global_batch_size", "micro_batch_size", "data_parallel_size", "decrease_batch_size_if_needed"),
            *("step_batch_size_schedule", "seq_length"),
        ),
    ),
    Call("megatron.core.num_microbatches_calculator:destroy_num_microbatches_calculator", DRY),
    Call("megatron.core.utils:get_te_version", DRY),
    # In whose place `_downloaded` stands.
    Call(
        "megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer:MegatronHFTokenizer._download",
        DRY,
        ("self", "path", "url"),
    ),
    # A rank without data.
    Call(
        "megatron.training:training.train_step",
        META_RUN,
        (
            *("forward_step_func", "data_iterator", "model", "optimizer", "opt_param_scheduler", "config"),
            "forward_backward_func",
        ),
    ),
    Call("megatron.training:training.get_num_microbatches", META_RUN),
    Call(f"{CHECKPOINTS}.dict_utils:dict_list_map_outplace", META_RUN, ("f", "x")),
    Call(
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_local_spec",
        META_RUN,
        (),
        ("qk_layernorm", "normalization"),
    ),
    Call(
        "megatron.core.models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec",
        META_RUN,
        ("config", "use_transformer_engine", "normalization"),
        ("vp_stage",),
    ),
    Call(
        "megatron.core.transformer.moe.experts:SequentialMLP.forward",
        META_RUN,
        ("self", "permuted_local_hidden_states", "tokens_per_expert", "permuted_probs"),
    ),
    # Batches and data.
    Call(
        "megatron.core.transformer.multi_token_prediction:mtp_on_this_rank",
        BATCHES,
        ("layout", "mtp_num_layers"),
        ("ignore_virtual", "vp_stage"),
    ),
    Call("megatron.training.utils:is_first_or_last_pipeline_stage", BATCHES, ("vp_stage",)),
    Call(
        "megatron.core.utils:get_batch_on_this_tp_rank",
        BATCHES,
        ("batch",),
        (
            *("has_cu_seqlens", "is_hybrid_cp", "create_attention_mask_in_dataloader", "broadcast_src_rank"),
            *("broadcast_group", "cp_size", "tp_rank", "micro_batch_size", "seq_length", "mtp_on_this_rank"),
            *("pipeline_model_parallel_size", "is_pipeline_first_stage", "is_pipeline_last_stage"),
        ),
    ),
    Call("megatron.core.utils:flatten_batch_for_packed_sequences", BATCHES, ("batch",)),
    Call("megatron.training.training:update_seqlen_stats_from_cu_seqlens", BATCHES, ("cu_seqlens",)),
    Call(
        "megatron.core.packed_seq_params:PackedSeqParams",
        BATCHES,
        (),
        ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    ),
    Call("megatron.core.utils:get_batch_on_this_cp_rank", BATCHES, ("batch",), ("is_hybrid_cp", "cp_group")),
    *(
        Call(f"megatron.core:mpu.{name}", BATCHES)
        for name in (
            *("get_tensor_model_parallel_rank", "get_tensor_model_parallel_src_rank", "is_pipeline_first_stage"),
            *("get_tensor_model_parallel_group", "get_context_parallel_group", "is_pipeline_last_stage"),
        )
    ),
    Call("megatron.core.utils:StragglerDetector.__call__", JOB, ("self",), ("bdata",)),
    Call("megatron.training.utils:get_blend_and_blend_per_split", BATCHES, ("args",)),
    Call(
        "megatron.core.datasets.blended_megatron_dataset_builder:BlendedMegatronDatasetBuilder",
        BATCHES,
        ("cls", "sizes", "is_built_on_rank", "config"),
    ),
    Call(
        "megatron.core.datasets.gpt_dataset:GPTDatasetConfig",
        BATCHES,
        (),
        (
            *("random_seed", "sequence_length", "blend", "blend_per_split", "split", "multiple_validation_sets"),
            *("full_validation", "num_dataset_builder_threads", "path_to_cache", "mmap_bin_files", "tokenizer"),
            *("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask"),
            *("object_storage_cache_path", "mid_level_dataset_surplus", "allow_ambiguous_pad_tokens"),
            *("context_parallel_size", "data_parallel_size", "sequence_parallel_size"),
        ),
    ),
    Call("megatron.core.tokenizers.utils.build_tokenizer:build_tokenizer", "data/prepare.py", ("args",)),
    Call(f"{INDEXED}DType.dtype_from_code", "data/indexed.py", ("value",)),
    Call("megatron.core.datasets.object_storage_utils:is_object_storage_path", "data/indexed.py", ("path",)),
    Call("megatron.training.utils:get_blend_and_blend_per_split", "data/indexed.py", ("args",)),
    Call(f"{INDEXED}DType.optimal_dtype", "data/prepare.py", ("cardinality",)),
    Call(f"{INDEXED}IndexedDatasetBuilder", "data/prepare.py", ("bin_path",), ("dtype",)),
    Call(f"{INDEXED}IndexedDatasetBuilder.add_item", "data/prepare.py", ("self", "tensor")),
    Call(f"{INDEXED}IndexedDatasetBuilder.end_document", "data/prepare.py", ("self",)),
    Call(f"{INDEXED}IndexedDatasetBuilder.finalize", "data/prepare.py", ("self", "idx_path")),
    # What the stand-in for a GPU puts something else in place of.
    Call(f"{OPTIMIZER}.sharded_state_dict", CPU, ("self", "model_sharded_state_dict", "is_loading")),
    Call(f"{OPTIMIZER}.load_state_dict", CPU, ("self", "state_dict")),
    Call(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        CPU,
        ("cls", "config", "hidden_size"),
    ),
    Call("megatron.core.datasets.utils:compile_helpers", CPU),
    Call("megatron.core.tensor_parallel.random:_lazy_call", CPU, ("callable",)),
    Call("megatron.core.tensor_parallel.random:_lazy_init", CPU),
]

# What we read or write of objects: fields of dataclasses, methods, and what their classes set on self.
ATTRIBUTES: list[tuple[str, str, tuple[str, ...]]] = [
    ("megatron.core.transformer.enums:LayerType", STAGES, ("decoder",)),
    (
        "megatron.core.transformer.pipeline_parallel_layer_layout:PipelineParallelLayerLayout",
        STAGES,
        ("layout",),
    ),
    (
        "megatron.training.models.gpt:GPTModelConfig",
        MODEL_CONFIG,
        ("transformer", "rope_scaling", "rope_scaling_factor"),
    ),
    (
        "megatron.training.models:HybridModelConfig",
        f"{MODEL_CONFIG}, {TEACHER}",
        (
            *("transformer", "hybrid_layer_pattern", "hybrid_stack_spec", "vocab_size", "post_wrap_hooks"),
            *("share_embeddings_and_output_weights", "pre_wrap_hooks"),
        ),
    ),
    (f"{INTEROP}:GPTCompatLayerMaps", MODEL, ("fresh_init", "num_gpt_layers")),
    ("megatron.core.datasets.utils:Split", HELD_OUT, ("valid",)),
    ("megatron.core.extensions.transformer_engine", MODEL_CONFIG, ("HAVE_TE",)),
    ("megatron.core.ssm.mamba_mixer", MODEL_CONFIG, ("HAVE_MAMBA_SSM", "HAVE_EINOPS")),
    ("megatron.core.ssm.gated_delta_net", MODEL_CONFIG, ("HAVE_FLA",)),
    *(
        (target, LOCAL_SPEC, names)
        for target, names in {
            "megatron.core.fusions.fused_bias_dropout:get_bias_dropout_add": (),
            "megatron.core.models.hybrid.hybrid_block:HybridStackSubmodules": (
                *("mamba_layer", "gdn_layer", "attention_layer", "mlp_layer", "moe_layer", "mtp_block_spec"),
            ),
            "megatron.core.models.hybrid.hybrid_block:HybridStack": ("final_norm", "post_layer_norm", "post_process"),
            "megatron.core.ssm.gated_delta_net:GatedDeltaNet": (),
            "megatron.core.ssm.gated_delta_net.common:GatedDeltaNetSubmodules": ("in_proj", "out_norm", "out_proj"),
            "megatron.core.ssm.mamba_layer:MambaLayer": (),
            "megatron.core.ssm.mamba_layer:MambaLayerSubmodules": (
                *("norm", "mixer", "mamba_bda", "sharded_state_dict_keys_map"),
            ),
            "megatron.core.ssm.mamba_mixer:MambaMixer": (),
            "megatron.core.ssm.mamba_mixer:MambaMixerSubmodules": ("in_proj", "out_proj"),
            "megatron.core.ssm.mlp_layer:MLPLayer": (),
            "megatron.core.tensor_parallel:RowParallelLinear": (),
            "megatron.core.transformer.attention:SelfAttention": (),
            "megatron.core.transformer.attention:SelfAttentionSubmodules": (
                *("linear_qkv", "core_attention", "linear_proj"),
            ),
            "megatron.core.transformer.dot_product_attention:DotProductAttention": (),
            "megatron.core.transformer.enums:AttnMaskType": ("causal",),
            "megatron.core.transformer.mlp:MLP": ("as_mlp_submodule",),
            "megatron.core.transformer.mlp:MLPSubmodules": ("linear_fc1", "linear_fc2"),
            "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionBlock": (),
            "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionBlockSubmodules": ("layer_specs",),
            "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionLayer": (),
            "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionLayerSubmodules": (
                *("enorm", "hnorm", "eh_proj", "mtp_model_layer", "layer_norm"),
            ),
            "megatron.core.transformer.transformer_layer:MoETransformerLayer": (),
            "megatron.core.transformer.transformer_layer:TransformerLayerSubmodules": (
                *("input_layernorm", "self_attention", "self_attn_bda", "pre_mlp_layernorm", "mlp", "mlp_bda"),
                "sharded_state_dict_keys_map",
            ),
        }.items()
    ),
    (f"{CHECKPOINTS}.core:CheckpointingException", CHECKPOINT, ()),
    ("megatron.core.distributed:TorchFullyShardedDataParallel", WRAPPERS, ()),
    ("megatron.core.distributed.fsdp:mcore_fsdp_adapter", WRAPPERS, ("FullyShardedDataParallel",)),
    ("megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp:MegatronFSDP", WRAPPERS, ()),
    ("megatron.core.transformer.moe.router:Router", "teacher/weights.py", ()),
    (
        "megatron.core.transformer.moe.router:TopKRouter",
        f"{TEACHER}, {BRIDGE}",
        ("_maintain_float32_expert_bias",),
    ),
    (
        "megatron.core.rerun_state_machine:RerunStateMachine",
        FAULTS,
        ("first_iteration_complete", "current_iteration", "state"),
    ),
    ("megatron.core.rerun_state_machine:RerunMode", f"{FAULTS}, {JOB}", ("VALIDATE_RESULTS",)),
    ("megatron.core.rerun_state_machine:RerunState", FAULTS, ("INITIAL_RUN",)),
    *(
        (
            model,
            f"{ATTACH}, {TEACHER}, {RUNNER}, {MODEL}, {MIXING}",
            (
                *("config", "pre_process", "post_process", "share_embeddings_and_output_weights", "decoder"),
                "embedding",
                *(
                    "output_layer",
                    "compute_language_model_loss",
                    "pg_collection",
                    "vp_stage",
                    "mtp_process",
                    "tp_group",
                ),
            ),
        )
        for model in (GPT, HYBRID)
    ),
    (HYBRID, MODEL, ("hybrid_layer_pattern",)),
    ("megatron.core.model_parallel_config:ModelParallelConfig", PREFLIGHT, ("finalize_model_grads_func",)),
    ("megatron.core.transformer.transformer_block:TransformerBlock", RUNNER, ("input_tensor",)),
    ("megatron.core.models.hybrid.hybrid_block:HybridStack", f"{RUNNER}, {HIDDEN}", ("input_tensor", "layers")),
    ("megatron.core.ssm.mamba_layer:MambaLayer", f"{HIDDEN}, {PROJECTORS}", ("layer_number",)),
    ("megatron.core.transformer.transformer_block:TransformerBlock", f"{HIDDEN}, {PROJECTORS}", ("layers",)),
    ("megatron.core.transformer.transformer_layer:TransformerLayer", f"{HIDDEN}, {PROJECTORS}", ("layer_number",)),
    (
        "megatron.core.packed_seq_params:PackedSeqParams",
        ATTACH,
        ("cu_seqlens_q", "cu_seqlens_q_padded", "cp_group"),
    ),
    (
        LINEAR,
        f"{HEAD}, {ATTACH}",
        (
            *("weight", "bias", "config", "gather_output", "sequence_parallel", "gradient_accumulation_fusion"),
            *("output_size_per_partition", "gtp_remat_size"),
        ),
    ),
    (
        "megatron.core.transformer:TransformerConfig",
        f"{ATTACH}, {HEAD}, {TEACHER}, {RUNNER}",
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
            *("expert_tensor_parallel_size", "sequence_parallel", "num_moe_experts", "hidden_size", "params_dtype"),
            *("init_method", "variable_seq_lengths", "mtp_num_layers", "defer_embedding_wgrad_compute"),
            *("_cpu_offloading_context", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "cuda_graph_impl"),
        ),
    ),
    (
        "megatron.training.models:GPTModelConfig",
        f"{TEACHER}, {JOB}",
        ("transformer", "vocab_size", "share_embeddings_and_output_weights", "post_wrap_hooks"),
    ),
    (
        "megatron.core.process_groups_config:ProcessGroupCollection",
        f"{ATTACH}, {TEACHER}",
        ("tp", "pp", "cp", "dp", "dp_cp", "ep", "expt_tp", "tp_ep", "expt_dp", "expt_dp_gtp_remat"),
    ),
    (f"{CHECKPOINTS}.mapping:ShardedTensor", CHECKPOINT, ("key", "global_shape", "allow_shape_mismatch")),
    ("megatron.training.models.base:ModelConfig", BRIDGE, ("post_wrap_hooks",)),
    ("megatron.core.enums:ModelType", JOB, ("encoder_or_decoder",)),
    (OPTIMIZER, CPU, ("optimizer", "config", "init_state_fn")),
    ("megatron.core.utils", DRY, ("_te_version",)),
    (
        "megatron.core.tokenizers.text.libraries.megatron_hf_tokenizer:MegatronHFTokenizer",
        DRY,
        ("_download",),
    ),
    ("megatron.core.models.common.embeddings.rope_utils", DRY, ("fused_apply_rotary_pos_emb",)),
    ("megatron.core.transformer.moe.moe_utils", DRY, ("fused_permute", "fused_unpermute")),
    ("megatron.core.utils:log_single_rank", "student/supported.py", ()),  # two signatures: *args, or level and msg
    ("megatron.core.transformer:transformer_block", META_RUN, ("LayerNormImpl",)),
    ("megatron.core.models.gpt.gpt_layer_specs:LNImpl", META_RUN, ()),
    ("megatron.core.ssm:mamba_context_parallel", META_RUN, ("HAVE_EINOPS",)),
    (
        "megatron.core.ssm:mamba_mixer",
        META_RUN,
        ("HAVE_MAMBA_SSM", "HAVE_EINOPS", "mamba_split_conv1d_scan_combined", "ExtendedRMSNorm"),
    ),
    ("megatron.core.ssm.gated_delta_net:common", META_RUN, ("HAVE_FLA", "l2norm")),
    ("megatron.core.ssm.gated_delta_net:gdn", META_RUN, ("causal_conv1d", "chunk_gated_delta_rule")),
    ("megatron.core.transformer.moe.experts:SequentialMLP", META_RUN, ("forward",)),
    ("megatron.core.transformer.spec_utils:ModuleSpec", META_RUN, ("submodules",)),
    ("megatron.training.models:GPTModelConfig", META_RUN, ("transformer",)),
    ("megatron.core.datasets.gpt_dataset:GPTDataset", BATCHES, ()),
    ("megatron.training.datasets.sft_dataset:SFTDataset", BATCHES, ()),
    ("megatron.core.datasets.gpt_dataset:MockGPTDataset", BATCHES, ()),
]


def found(target: str, user: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"megatron-core {__version__}: {target} is gone ({error}); abkd_megatron/{user} uses it")


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_it_can_be_called_as_we_do(call: Call) -> None:
    target = found(call.target, call.user)
    signature = inspect.signature(target)
    told = f"megatron-core {__version__}: {call.target}{signature}; abkd_megatron/{call.user}"
    first = tuple(signature.parameters)[: len(call.positional)]
    assert first == call.positional, f"{told} gives {call.positional} by position"
    try:
        signature.bind(*call.positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        pytest.fail(f"{told} calls it with {call.positional} and {call.keywords}: {error}")


def test_the_wrappers_are_classes() -> None:
    from abkd_megatron.student.wrappers import _MEGATRON_FSDP, _WRAPPERS

    assert _MEGATRON_FSDP and all(isinstance(wrapper, type) for wrapper in _WRAPPERS)


def assigned(kind: type) -> Iterator[str]:
    """What the methods of a class and of its bases in Megatron set on self."""
    for base in getattr(kind, "__mro__", ()):  # a module has none
        if base.__module__.startswith("megatron."):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    yield node.attr


@pytest.mark.parametrize(("target", "user", "names"), ATTRIBUTES, ids=lambda it: it if isinstance(it, str) else "")
def test_it_has_what_we_look_at(target: str, user: str, names: tuple[str, ...]) -> None:
    kind = found(target, user)
    has = {
        *dir(kind),
        *(assigned(kind) if isinstance(kind, type) else ()),
        *(item.name for item in (fields(kind) if is_dataclass(kind) else ())),
    }
    missing = [name for name in names if name not in has]
    assert not missing, f"megatron-core {__version__}: {target} has no {missing}; abkd_megatron/{user} uses them"


def test_the_model_gives_the_head_what_it_takes() -> None:
    from abkd_megatron.student.attach import Attachment

    parameters = inspect.signature(Attachment._head).parameters.values()
    taken = {it.name for it in parameters if it.kind is it.KEYWORD_ONLY}
    source = ast.parse(textwrap.dedent(inspect.getsource(found(GPT, MODEL))))
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call)]
    given = [
        {word.arg for word in call.keywords}
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "output_processor"
    ]
    assert given, f"megatron-core {__version__}: GPTModel calls no output_processor; abkd_megatron/{ATTACH} is one"
    for words in given:
        assert taken <= words, (
            f"megatron-core {__version__}: GPTModel does not give its output_processor {sorted(taken - words)}; "
            f"abkd_megatron/{ATTACH} takes them"
        )


@pytest.mark.parametrize("method", [f"{GPT}._postprocess", f"{HYBRID}.forward"])
def test_without_post_process_a_forward_returns_hidden_states(method: str) -> None:
    """After the layers of multi-token prediction, and before their losses."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(found(method, MODEL)))).body
    lines: dict[str, list[int]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            lines.setdefault(ast.unparse(node.func), []).append(node.lineno)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "not self.post_process":
            assert ast.unparse(node.body) == "return hidden_states"
            lines.setdefault("return", []).append(node.lineno)
    (returned,) = lines["return"]
    assert max(lines["self.mtp"]) < returned < min(lines["process_mtp_loss"])


def test_what_is_given_to_the_head_is_what_gpt_gives() -> None:
    from abkd_megatron.student.attach import Attachment
    from abkd_megatron.teacher import model

    given = {node.value for node in ast.walk(ast.parse(inspect.getsource(model))) if isinstance(node, ast.Constant)}
    parameters = inspect.signature(Attachment._head).parameters.values()
    assert {it.name for it in parameters if it.kind is it.KEYWORD_ONLY} <= {*given, "context"}


def test_megatron_has_the_arguments_we_read() -> None:
    """As options of its command line, or as what its own code derives from them."""
    from megatron.training import arguments, global_vars, training

    from abkd_megatron.config import megatron_args, model_config, unsupported
    from abkd_megatron.teacher import args
    from abkd_megatron.teacher.compatibility import ARCHITECTURE

    derived = {
        node.attr
        for module in (arguments, global_vars, training)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    options = {action.dest for action in megatron_args.megatron_options().values()}
    read = {
        (user, node.attr)
        for user in (ADD, JOB, PROVENANCE, RULES, STUDENT, UNSUPPORTED, TEACHER_ARGS)
        for node in ast.walk(ast.parse((PACKAGE / user).read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("args", "student")
    }
    read |= {(TEACHER_ARGS, name) for name in args._SHARED}
    read |= {(UNSUPPORTED, it.argument) for it in unsupported.UNSUPPORTED if set(it.hosts) - {unsupported.BRIDGE}}
    read |= {(UNSUPPORTED, name) for name in unsupported._BELONGS_TO}
    read |= {(MODEL_CONFIG, name) for name in model_config._LEFT_OUT}
    read |= {(COMPATIBILITY, name) for name in ARCHITECTURE}
    assert len(read) > 40
    known = options | derived | {"padded_vocab_size"}
    missing = [f"args.{name}, which abkd_megatron/{user} reads" for user, name in sorted(read) if name not in known]
    assert not missing, f"megatron-core {__version__} has no " + "; no ".join(missing)


def imported() -> set[tuple[str, str]]:
    """What this package imports from Megatron, dotted, and where; of Bridge see `test_bridge_contracts.py`."""
    names = set()
    for source in PACKAGE.rglob("*.py"):
        user = str(source.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names |= {(alias.name, user) for alias in node.names if alias.name.startswith("megatron")}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
                names |= {(f"{node.module}.{alias.name}", user) for alias in node.names}
    return {(name, user) for name, user in names if not name.startswith("megatron.bridge")}


def test_all_that_is_imported_has_a_contract() -> None:
    targets = [call.target.replace(":", ".") for call in CALLS] + [it[0].replace(":", ".") for it in ATTRIBUTES]
    for name, user in sorted(imported()):
        covered = any(target == name or target.startswith(f"{name}.") for target in targets)
        assert covered, f"abkd_megatron/{user} imports {name}: add what is used of it to CALLS or ATTRIBUTES"
