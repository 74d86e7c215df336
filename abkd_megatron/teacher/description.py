"""Descriptions of the model in a torch_dist checkpoint, in terms of Megatron's arguments.

Megatron saves its arguments with the tensors. Megatron Bridge saves run_config.yaml instead, and a conversion may leave
Hugging Face's config.json next to the tensors. Both files are only read: no class or function that they name is
imported or called.
"""

import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from abkd_megatron.errors import CheckpointError

# Arguments that a complete description has; the last one only of a model with rotary embeddings.
_ESSENTIAL = ("num_layers", "hidden_size", "num_attention_heads", "layernorm_epsilon", "rotary_base")

# Features of other models that Megatron's GPT model does not have, and the values that turn them off.
_NO_COUNTERPART: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "clip_qkv": (None,),
    "use_parallel_residual": (None, False),
    "parallel_attn": (None, False),
}
# Fields that Megatron's arguments cannot set, and their values in a model built from arguments.
BEYOND_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "activation_func": (None,),
    "softmax_scale": (None,),
    "rope_scaling_type": (None,),
    "original_max_position_embeddings": (None, 4096),
    "beta_fast": (None, 32),
    "beta_slow": (None, 1),
    "moe_router_topk_limited_devices": (None,),
    **_NO_COUNTERPART,
}

# {field of Bridge's model configurations: Megatron's argument} if the names differ.
_RENAMED = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}
# Fields whose None means a number derived from other fields.
_DERIVED = ("kv_channels", "ffn_hidden_size", "rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")

# {Megatron's argument: its names in Hugging Face's configurations}.
_HUGGING_FACE = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "ffn_hidden_size": ("intermediate_size", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "kv_channels": ("head_dim",),
    "layernorm_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "rotary_percent": ("partial_rotary_factor", "rotary_pct"),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_head_dim": ("qk_nope_head_dim",),
    "qk_pos_emb_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "moe_router_topk": ("num_experts_per_tok", "num_experts_per_token"),
    "moe_router_score_function": ("scoring_func",),
    "moe_router_topk_scaling_factor": ("routed_scaling_factor",),
    "moe_router_num_groups": ("n_group",),
    "moe_router_group_topk": ("topk_group",),
    "hybrid_layer_pattern": ("hybrid_override_pattern",),
    "mamba_state_dim": ("ssm_state_size",),
    "mamba_head_dim": ("mamba_head_dim",),
    "mamba_num_groups": ("n_groups",),
    "mamba_num_heads": ("mamba_num_heads",),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "yarn_correction_range_round_to_int",
}
# Parameters of Llama 3's scaling that are constants in Megatron.
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
# Letters of a layer pattern, by the names in Nemotron-H's list of layers.
_LETTERS = {
    **{"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"},
    **{"mlp": "-", "moe": "E"},
}
# Model types whose configurations may omit a rotary base of 10000.
_ROTARY_BASE = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Description:
    """The description of a model that is saved with its weights."""

    source: str
    """For messages: "the checkpoint" for Megatron's arguments, otherwise the file's name."""
    args: Namespace
    """Megatron's arguments, as far as they are known."""
    is_exact: bool = True
    """Whether these are Megatron's own arguments. Their vocabulary size counts tokens. In the files it counts rows,
    some of which may belong to no token."""

    def left_open(self, args: Namespace) -> list[str]:
        """Return the arguments that a complete description of the model configured by `args` has and this one lacks."""
        if self.is_exact:
            return []
        rotary = getattr(args, "multi_latent_attention", False) or getattr(args, "position_embedding_type", "rope") in (
            "rope",
            "yarn",
            "mrope",
        )
        return [name for name in _ESSENTIAL[: None if rotary else -1] if getattr(self.args, name, None) is None]


def describe(directory: Path, args: Namespace | None) -> Description | None:
    """Return the description of a checkpoint's model: Megatron's arguments, else run_config.yaml, else config.json.

    Args:
        directory: of the iteration.
        args: Megatron's arguments in the common state; None if there are none.

    Returns:
        None if there is no description.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if args is not None:
        return Description("the checkpoint", args)
    is_iteration = directory.name == "release" or directory.name.startswith("iter_")
    folders = [directory, *([directory.parent] if is_iteration else [])]
    file = next((path for folder in folders if (path := folder / "run_config.yaml").is_file()), None)
    if file is not None and (found := of_run_config(_read(file, _load_yaml))):
        return Description(file.name, Namespace(**found), is_exact=False)
    for folder in (of for place in folders for of in (place, place / "hf")):
        file = folder / "config.json"
        if file.is_file() and (found := of_hugging_face(_read(file, json.loads))):
            return Description(file.name, Namespace(**found), is_exact=False)
    return None


def of_run_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert Bridge's run_config.yaml to Megatron's arguments; empty if it describes no model.

    Args:
        config: the file's content: sections `model`, `tokenizer` and others.
    """
    model, tokenizer = config.get("model"), config.get("tokenizer")
    if not isinstance(model, Mapping):
        return {}
    found = of_model_config(model)
    if isinstance(tokenizer, Mapping) and isinstance(tokenizer.get("tokenizer_model"), str):
        found["tokenizer_model"] = tokenizer["tokenizer_model"]
    return found


def of_model_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a model configuration of Bridge or Megatron to Megatron's arguments.

    Args:
        model: its fields; the transformer's fields may be in `transformer`.
    """
    within = model.get("transformer")
    fields = {**(within if isinstance(within, Mapping) else {}), **model}
    fields.pop("transformer", None)
    found = {_RENAMED.get(name, name): _plain(fields[name]) for name in sorted(fields) if not name.startswith("_")}
    # If both spellings are there, the later in sorted order is the one that YaRN uses.
    for name in _DERIVED:
        if found.get(name, 0) is None:
            del found[name]
    for name in [name for name in found if name.startswith("yarn_") and found[name] is None]:
        del found[name]
    if (tied := found.pop("share_embeddings_and_output_weights", None)) is not None:
        found["untie_embeddings_and_output_weights"] = not tied
    heads, groups = found.get("num_attention_heads"), found.pop("num_query_groups", None)
    found |= _groups(heads, groups)
    if found.get("num_experts"):
        found.pop("ffn_hidden_size", None)  # unused if all layers have experts
    if not found.get("multi_latent_attention"):
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            found.pop(name, None)
    if _is_default_scale(found):
        del found["softmax_scale"]
    activation = found.pop("activation_func", None)
    return found | _activation(_last_name(activation), bool(found.pop("gated_linear_unit", False)))


def of_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert Hugging Face's config.json to Megatron's arguments; empty if it describes no model."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    is_hybrid = config.get("model_type") == "nemotron_h"
    config = _as_others(config) if is_hybrid else config
    found: dict[str, Any] = {}
    for name, theirs in _HUGGING_FACE.items():
        value = next((config[key] for key in theirs if config.get(key) is not None), None)
        if value is not None:
            found[name] = _plain(value)
    if not isinstance(found.get("num_layers"), int):
        return {}
    if isinstance(config.get("vocab_size"), int):
        found["vocab_size"] = config["vocab_size"]
    is_latent = config.get("kv_lora_rank") is not None
    found["multi_latent_attention"] = is_latent
    if is_latent:
        found.pop("kv_channels", None)
    elif "num_key_value_heads" in config:
        found |= _groups(found.get("num_attention_heads"), config["num_key_value_heads"])
    if "tie_word_embeddings" in config:
        found["untie_embeddings_and_output_weights"] = not config["tie_word_embeddings"]
    if "layernorm_epsilon" in found:
        found["normalization"] = "RMSNorm" if "rms_norm_eps" in config else "LayerNorm"
    activation = next((config[key] for key in ("hidden_act", "hidden_activation") if config.get(key)), None)
    if activation in ("silu", "swish", "relu2"):  # silu always has a gate
        found |= _activation(_last_name(activation), activation != "relu2")
    if config.get("query_pre_attn_scalar"):
        found["softmax_scale"] = config["query_pre_attn_scalar"] ** -0.5
    elif config.get("attention_multiplier"):
        found["softmax_scale"] = config["attention_multiplier"]
    if _is_default_scale(found):
        del found["softmax_scale"]
    found |= {name: config[name] for name in _NO_COUNTERPART if name in config}
    found |= _positions(config, is_latent)
    found |= _experts(config, found)
    found |= _window(config, found["num_layers"])
    if is_hybrid:
        found |= {"normalization": "RMSNorm", "moe_router_score_function": "sigmoid"}
    if found.get("num_experts"):
        found.pop("ffn_hidden_size", None)
    return found


def _as_others(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Nemotron-H's configuration with the fields of other models.

    It has fields of layers that its pattern lacks, and of rotary embeddings, which its attention does not have.
    """
    layers = config.get("layers_block_type")
    pattern = config.get("hybrid_override_pattern")
    if pattern is None and isinstance(layers, list) and set(layers) <= set(_LETTERS):
        pattern = "".join(_LETTERS[layer] for layer in layers)
    known = {key: value for key, value in config.items() if not key.startswith(("rope_", "partial_rotary"))}
    if isinstance(pattern, str):
        known |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
        if "E" not in pattern:
            known = {key: value for key, value in known.items() if key not in _EXPERTS}
    return {**known, "hidden_act": config.get("mlp_hidden_act"), "position_embedding_type": "none"}


def _positions(config: Mapping[str, Any], is_latent: bool) -> dict[str, Any]:
    """Return the arguments of rotary embeddings, from rope_theta and rope_scaling or the newer rope_parameters."""
    if config.get("position_embedding_type") == "none":
        return {"position_embedding_type": "none"}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return {}  # different for each type of layer
    base = config.get("rope_theta", rope.get("rope_theta", config.get("rotary_emb_base")))
    if base is None and config.get("model_type") in _ROTARY_BASE:
        base = 10000
    if base is None:
        return {"position_embedding_type": "learned_absolute"} if "n_positions" in config else {}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    found: dict[str, Any] = {"rotary_base": base, "position_embedding_type": "rope", "use_rope_scaling": False}
    found["rotary_seq_len_interpolation_factor"] = None
    if kind == "llama3":
        found |= {"use_rope_scaling": True, "rope_scaling_factor": rope.get("factor", 8.0)}
        other = {name: rope[name] for name, value in _LLAMA3.items() if rope.get(name, value) != value}
        if other:
            found["rope_scaling_type"] = f"llama3 with {other}"
    elif kind == "linear":
        found["rotary_seq_len_interpolation_factor"] = rope.get("factor")
    elif kind == "yarn":
        given = {name: ours for name, ours in _YARN.items() if rope.get(name) is not None}
        found |= {name if is_latent and name in BEYOND_ARGUMENTS else ours: rope[name] for name, ours in given.items()}
        found["position_embedding_type"] = "rope" if is_latent else "yarn"
    elif kind not in ("default", "dynamic", "mrope"):  # the last two equal the first for text up to the trained length
        found["rope_scaling_type"] = kind
    return found


def _experts(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a mixture of experts, as far as they are certain."""
    number = next((config[key] for key in _EXPERTS if config.get(key)), None)
    if number is None:
        return {"num_experts": None}
    experts: dict[str, Any] = {"num_experts": number}
    if "decoder_sparse_step" in config:
        dense, step = config.get("mlp_only_layers") or [], config["decoder_sparse_step"]
        layers = range(found["num_layers"])
        experts["moe_layer_freq"] = [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]
        if "norm_topk_prob" in config:
            experts["moe_router_pre_softmax"] = not config["norm_topk_prob"]
    elif "first_k_dense_replace" in config:
        first, step = config["first_k_dense_replace"], config.get("moe_layer_freq", 1)
        layers = range(found["num_layers"])
        experts["moe_layer_freq"] = [int(layer >= first and layer % step == 0) for layer in layers]
    return experts


def _window(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the arguments of sliding-window attention."""
    width = config.get("sliding_window")
    if width is None or config.get("use_sliding_window") is False:
        return {"window_size": None}
    kinds = config.get("layer_types")
    if isinstance(kinds, Sequence) and len(kinds) == num_layers:
        pattern = [int(kind == "sliding_attention") for kind in kinds]
    elif config.get("use_sliding_window") and "max_window_layers" in config:
        pattern = [int(layer >= config["max_window_layers"]) for layer in range(num_layers)]
    else:
        pattern = [1] * num_layers
    if not any(pattern):
        return {"window_size": None}
    return {"window_size": [width - 1, 0], "window_attn_skip_freq": pattern}


def _groups(heads: Any, groups: Any) -> dict[str, Any]:
    """Return the arguments of grouped-query attention; one group per head means none."""
    if groups is None or groups == heads:
        return {"group_query_attention": False}
    return {"group_query_attention": True, "num_query_groups": groups}


def _is_default_scale(found: Mapping[str, Any]) -> bool:
    """Return whether there is a softmax scale and it is Megatron's default."""
    scale, size = found.get("softmax_scale"), found.get("kv_channels")
    if size is None and found.get("num_attention_heads") and found.get("hidden_size"):
        size = found["hidden_size"] / found["num_attention_heads"]
    return isinstance(scale, float) and size is not None and math.isclose(scale, size**-0.5, rel_tol=1e-6)


def _activation(name: str | None, gated: bool) -> dict[str, Any]:
    """Return the arguments of an activation function; `activation_func` if no argument sets it."""
    if name is None:
        return {}
    flags = {"swiglu": ("silu", True), "squared_relu": ("squared_relu", False), "quick_geglu": ("quick_gelu", True)}
    found: dict[str, Any] = {flag: (name, gated) == of for flag, of in flags.items()}
    if not any(found.values()) and (name, gated) != ("gelu", False):
        found["activation_func"] = f"{name} with a gate" if gated else name
    return found


def _last_name(value: Any) -> str | None:
    """Return the name of a function that YAML gives as a name or dotted path; None if it is unknown."""
    if not isinstance(value, str):
        value = getattr(value, "__name__", None)
    name = value.rpartition(".")[2] if isinstance(value, str) else None
    name = {"relu2": "squared_relu", "swish": "silu", "fast_gelu": "gelu"}.get(name or "", name)
    return None if name == "builtin_function_or_method" else name


def _plain(value: Any) -> Any:
    """Convert a value of YAML: a tuple to a list, an enum member to its value, a function to its dotted path."""
    if isinstance(value, Mapping):
        args = value.get("_args_")
        return _plain(args[0]) if isinstance(args, list) and len(args) == 1 else value.get("_target_")
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-5 as text
        except ValueError:
            return value
    return value


class _Loader(yaml.SafeLoader):
    """YAML loader that ignores unknown tags and constructs nothing from them."""


def _untagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("", _untagged)
_load_yaml = partial(yaml.load, Loader=_Loader)


def _read(file: Path, parse: Any) -> Mapping[str, Any]:
    """Read the mapping in a file.

    Raises:
        CheckpointError: the file cannot be read or has no mapping.
    """
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except Exception as error:  # a damaged file can raise anything
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"expected a readable description of the model in {file}, got {type(error).__name__}: {why}; copy it "
            "again, or remove it, and declare a teacher without another description: teacher.declared=true"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"expected a description of the model in {file}, got a {type(content).__name__}; copy it again, or "
            "remove it, and declare a teacher without another description: teacher.declared=true"
        )
    return content
