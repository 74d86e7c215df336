"""Comparison of the model, vocabulary and tokenizer of a checkpoint with the configured ones."""

import filecmp
import hashlib
import json
import logging
import math
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.training.vocab_utils import calculate_padded_vocab_size

from abkd_megatron.config.pattern import layers_of_pattern, pattern_of
from abkd_megatron.errors import CheckpointError
from abkd_megatron.teacher.description import BEYOND_ARGUMENTS, Description

logger = logging.getLogger(__name__)

# Megatron arguments that define the model. Some of them (heads, rotary base, activation) do not change the shape of a
# weight, so a wrong value would load without an error.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "no_rope_freq",
    "mrope_section",
    "rope_type",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    "moe_expert_capacity_factor",
    "moe_token_drop_policy",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "experimental_attention_variant",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "dsa_indexer_topk",
    "dsa_indexer_rope_interleaved",
    "dsa_indexer_rotate_activation",
    "dsa_indexer_scoring_relu",
    "use_mup",
    "mup_width_mult",
    "mup_base_hidden_size",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_base_head_dim",
    "mup_attn_scale_power",
    "hybrid_layer_pattern",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
)

_OF_LATENT_ATTENTION = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
# Arguments that have no effect unless another one is set; Megatron may change them while it runs.
_ONLY_WITH = {
    "group_query_attention": ("num_query_groups",),
    "use_rope_scaling": ("rope_scaling_factor",),
    "num_experts": tuple(name for name in ARCHITECTURE if name.startswith("moe_")),
    "moe_expert_capacity_factor": ("moe_token_drop_policy",),
    "multi_latent_attention": ("rope_type", *_OF_LATENT_ATTENTION),
    "window_size": ("window_attn_skip_freq",),
    "use_mup": tuple(name for name in ARCHITECTURE if name.startswith("mup_")),
    "hybrid_layer_pattern": tuple(name for name in ARCHITECTURE if name.startswith("mamba_")),
}
# Settings that are also of layers of a pattern.
_OF_VARIANTS = tuple(name for name in ARCHITECTURE if name.startswith(("dsa_", "linear_")))
# Settings that count or list a GPTModel's layers. A layer of a GPTModel is two layers of a pattern.
_OF_LAYERS = ("moe_layer_freq", "no_rope_freq", "window_attn_skip_freq")
# Arguments of one kind of position embedding. Multi-latent attention uses YaRN's whatever the kind is.
_OF_POSITIONS = {
    "yarn": tuple(name for name in ARCHITECTURE if name.startswith("yarn_")),
    "mrope": ("mrope_section",),
}
_YARN_WITHOUT_PREFIX = ("rotary_scaling_factor", "mscale", "mscale_all_dim")

# Values that build the same model as None.
_AS_NONE = {
    "rotary_seq_len_interpolation_factor": (1,),
    "moe_router_topk_scaling_factor": (1,),
    "moe_router_num_groups": (0, 1),
    "moe_router_group_topk": (0, 1),
    "rope_type": ("yarn",),
}

# Share of rows that may belong to no token where the size of a vocabulary counts rows. gpt-oss has 0.5 %, DeepSeek-V3
# 0.4 %, Qwen2.5 0.3 %, the larger Pythias 0.8 %.
_RESERVED_ROWS = 0.01

# The arguments by which Megatron pads a vocabulary.
_PADDED_BY = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")


def differences(
    described: Description, args: Namespace, inherited: Mapping[str, str] | None = None
) -> tuple[int, list[str]]:
    """Compare a model as it is described with a model as it is configured.

    Args:
        described: what is saved with the weights.
        args: Megatron's arguments, validated.
        inherited: as `TeacherCheckpoint.inherited`.

    Returns:
        The number of settings that both have, and one line of text per setting that differs.
    """
    theirs, ours = (_architecture(of, getattr(args, "seq_length", None)) for of in (described.args, args))
    if (pattern := ours["hybrid_layer_pattern"]) and not theirs["hybrid_layer_pattern"] and described.is_exact:
        # A GPTModel's checkpoint, read as a HybridModel.
        del ours["hybrid_layer_pattern"]
        ours["num_layers"] = pattern.count("*")
        ours |= {name: None for name in _OF_LAYERS if ours.get(name) and not isinstance(ours[name], int)}
    both = [name for name in theirs if name in ours]
    wrong = []
    for name in both:
        if not _is_same(name, theirs, ours):
            remedy = _remedy(inherited[name], theirs[name]) if inherited and name in inherited else ""
            wrong.append(
                f"{option_name(name)}: {described.source} has {theirs[name]}, the configuration {ours[name]}{remedy}"
            )
    beyond = {} if described.is_exact else {k: v for k, v in vars(described.args).items() if k in BEYOND_ARGUMENTS}
    wrong += [
        f"{option_name(name)}: {described.source} has {value}, which no argument of Megatron's gives a GPT model"
        for name, value in beyond.items()
        if value not in BEYOND_ARGUMENTS[name]
    ]
    return len(both) + len(beyond), wrong


def check_vocabulary(
    directory: Path,
    described: Description | None,
    rows: Iterable[int],
    args: Namespace,
    vocab_size: int,
    shared_vocab: int | None,
    declared_vocab: int | None,
) -> None:
    """Reject a teacher whose vocabulary is not the student's.

    Args:
        directory: of the teacher's checkpoint, for messages.
        described: what is saved with the teacher's weights; None if nothing is.
        rows: sizes of the dimension of the vocabulary in the saved weights, padding included.
        args: Megatron's arguments of the teacher, as configured.
        vocab_size: true size of the student's vocabulary, in tokens.
        shared_vocab: `Objective.shared_vocab`.
        declared_vocab: true size of the teacher's vocabulary as the user declares it; used if `described` is None.

    Raises:
        CheckpointError: the vocabularies differ, or one is smaller than the shared part.
    """
    remedy = (
        "teacher and student must share one tokenizer: train the student with the teacher's; if only the first N "
        "tokens are the same in both, give distillation.shared_vocab=N; if it has another tokenizer, give "
        "distillation.cross_tokenizer and teacher.tokenizer-model"
    )
    teacher, student = f"the teacher in {directory}", "the student"
    saved = described.args if described is not None else Namespace()
    true_size = getattr(saved, "vocab_size", None) if described is not None else declared_vocab
    rows = list(rows)
    fewest = min(rows, default=None)
    if true_size is not None and fewest is not None and fewest < true_size:
        raise CheckpointError(
            f"{teacher} has weights of {fewest} tokens, and its description a vocabulary of {true_size}; give "
            "teacher.load a checkpoint of that model"
        )
    if shared_vocab is not None:
        theirs = true_size or getattr(saved, "padded_vocab_size", None) or fewest
        if theirs is not None and shared_vocab > min(theirs, vocab_size):
            raise CheckpointError(
                f"shared_vocab is {shared_vocab}; {teacher} has a vocabulary of {theirs} tokens, {student} one of "
                f"{vocab_size}; give at most the smaller"
            )
        logger.info(
            "vocabularies: student %d tokens, teacher %s; the divergence is over the first %d",
            vocab_size,
            true_size or f"{theirs} with its padding",
            shared_vocab,
        )
        return
    most = max(int(vocab_size * (1 + _RESERVED_ROWS)), vocab_size)
    if true_size is not None:
        counts_rows = described is not None and not described.is_exact
        if not (vocab_size == true_size or (counts_rows and vocab_size < true_size <= most)):
            raise CheckpointError(
                f"{teacher} has a vocabulary of {true_size} tokens, {student} one of {vocab_size}; {remedy}"
            )
        if true_size != vocab_size:
            logger.warning(
                "the teacher has rows for %d tokens, the student's tokenizer has %d tokens: the last %d rows are "
                "treated as padding",
                true_size,
                vocab_size,
                true_size - vocab_size,
            )
        return
    if fewest is not None and fewest < vocab_size:
        raise CheckpointError(
            f"{teacher} has weights of {fewest} tokens, {student} a vocabulary of {vocab_size}; {remedy}"
        )
    # Megatron records the padded size only. It shows whether the student's size would have been padded to the same.
    padded = getattr(saved, "padded_vocab_size", None)
    if padded is not None:
        expected = calculate_padded_vocab_size(
            vocab_size, saved.make_vocab_size_divisible_by, saved.tensor_model_parallel_size, logging_enabled=False
        )
        if padded != expected:
            raise CheckpointError(
                f"{teacher} has {padded} padded vocabulary columns; {student}'s {vocab_size} tokens would have given "
                f"{expected}; {remedy}"
            )
    elif rows:
        multiple, tensor = (getattr(args, name, 1) for name in _PADDED_BY)
        expected = calculate_padded_vocab_size(vocab_size, multiple, tensor, logging_enabled=False)
        if max(rows) > max(expected, most):
            raise CheckpointError(
                f"{teacher} has weights of {max(rows)} tokens, {student} a vocabulary of {vocab_size}, padded to "
                f"{expected}; if the rest is padding, give the true size of the teacher's vocabulary as "
                f"teacher.vocab-size; otherwise {remedy}"
            )


def same_tokenizer(theirs: str | None, ours: str | None) -> bool | None:
    """Return whether two tokenizers have the same tokens.

    Args:
        theirs: a file, or a folder of Hugging Face's; None if it is not known.
        ours: the same.

    Returns:
        None if the tokenizers cannot be compared: a file is not on this machine, or they are of two formats.
    """
    if theirs is None or ours is None:
        return None
    one, other = (_tokenizer_file(Path(of)) for of in (theirs, ours))
    if one is None or other is None or (one.suffix == ".json") != (other.suffix == ".json"):
        return None
    if one == other or filecmp.cmp(one, other, shallow=False):
        return True
    try:  # Hugging Face's special tokens are in another section and are not compared
        vocabularies = [json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"] for file in (one, other)]
    except (ValueError, KeyError, TypeError):
        return False  # not of Hugging Face, and not identical files
    return bool(vocabularies[0] == vocabularies[1])


def tokenizer_identity(args: Namespace) -> str:
    """Return the SHA-256 of the tokenizer's file; its type and name if it is not a file on this machine."""
    name = args.tokenizer_model or args.vocab_file or ""
    file = _tokenizer_file(Path(name)) if name else None
    return (
        hashlib.sha256(file.read_bytes()).hexdigest() if file is not None else f"{args.tokenizer_type} {name}".strip()
    )


def option_name(name: str) -> str:
    """Return an argument's name as options are spelled."""
    return name.replace("_", "-")


def _architecture(args: Namespace, seq_length: int | None) -> dict[str, Any]:
    """Return the arguments in `args` that have an effect on sequences of this length."""
    found = {name: getattr(args, name) for name in ARCHITECTURE if hasattr(args, name)}
    window = found.get("window_size")
    if window and (window[0] < 0 or (seq_length is not None and seq_length <= window[0] + 1)):
        found["window_size"] = None  # no sequence of this job is longer
    if found.get("group_query_attention") and found.get("num_query_groups") == found.get("num_attention_heads"):
        found["group_query_attention"] = False
    found["hybrid_layer_pattern"] = layers = layers_of_pattern(pattern_of(args) or "") or None
    without = {name for switch, names in _ONLY_WITH.items() if not found.get(switch) for name in names}
    if not found.get("experimental_attention_variant") and not set(layers or "") & set("GD"):
        without.update(_OF_VARIANTS)
    positions = found.get("position_embedding_type")
    without.update(name for kind, names in _OF_POSITIONS.items() if kind != positions for name in names)
    if positions != "yarn" and not found.get("multi_latent_attention"):
        without.update(_YARN_WITHOUT_PREFIX)
    return {name: value for name, value in found.items() if name not in without}


def _is_same(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Return whether both values of an argument make the same model."""
    values = []
    for of in (theirs, ours):
        value = of[name]
        value = list(value) if isinstance(value, tuple) else value
        if value in _AS_NONE.get(name, ()):
            value = None
        layers = of.get("num_layers")
        values.append(_by_layer(name, value, layers) if isinstance(layers, int) else value)
    a, b = values
    if all(isinstance(value, int | float) for value in values):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def _by_layer(name: str, value: Any, layers: int) -> Any:
    """Expand a pattern of layers, which Megatron's arguments may give as a period, to one value per layer."""
    if isinstance(value, list) and name == "no_rope_freq" and not any(value):
        return None
    if name == "window_attn_skip_freq" and value is None:
        return [1] * layers
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return value
    if name == "moe_layer_freq":
        return [int(layer % value == 0) for layer in range(layers)]
    if name in ("linear_attention_freq", "window_attn_skip_freq"):
        return [int((layer + 1) % value != 0) for layer in range(layers)]
    if name == "no_rope_freq":
        return [int((layer + 1) % value == 0) for layer in range(layers)]
    return value


def _remedy(inherited: str, theirs: Any) -> str:
    """Return how to set the teacher's own value of a setting that it inherits from the student.

    Args:
        inherited: the student's setting as it was written.
        theirs: the value in the checkpoint.
    """
    option, _, written = inherited.partition("=")
    if isinstance(theirs, bool):
        value = {"true": "false", "false": "true"}.get(written, str(theirs).lower())  # the option may be the opposite
    elif isinstance(theirs, list | tuple):
        value = f"'{theirs}'".replace(" ", "")
    else:
        value = "null" if theirs is None else str(theirs)
    return f", inherited from the student; set teacher.{option}={value}"


def _tokenizer_file(path: Path) -> Path | None:
    """Return the file of a tokenizer's tokens: the path, or the first candidate in Hugging Face's folder."""
    candidates = [path] if not path.is_dir() else [path / "tokenizer.json", path / "tokenizer.model"]
    return next((file for file in candidates if file.is_file()), None)
