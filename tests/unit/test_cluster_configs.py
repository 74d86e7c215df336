"""The models in configs/ are the published ones: their sizes give the published numbers of parameters."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.errors import CheckpointError
from abkd_megatron.teacher.args import check_teacher
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.tools.dry_run import megatron_arguments

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# By model: what its page on https://huggingface.co gives as its size, and the rows of the embedding in
# its config.json.
PUBLISHED = {
    "llama-3.1-8b": (8_030_261_248, 128256),
    "llama-3.1-70b": (70_553_706_496, 128256),
    "llama-3.2-1b": (1_235_814_400, 128256),
    "llama-3.2-3b": (3_212_749_824, 128256),
    "qwen2.5-1.5b": (1_543_714_304, 151936),
    "qwen2.5-7b": (7_615_616_512, 152064),
    "qwen3-1.7b": (1_720_574_976, 151936),
    "qwen3-8b": (8_190_735_360, 151936),
    "qwen3-30b-a3b": (30_532_122_624, 151936),
    # Three digits: its page, and https://arxiv.org/abs/2512.20848.
    "nemotron-3-nano-4b": (3.97e9, 131072),
    "nemotron-3-nano-30b-a3b": (31.6e9, 131072),
}


def parameters(model: dict[str, Any], rows: int) -> int:
    """Of a decoder with RMSNorm and grouped queries, gated MLPs unless it has squared ReLU."""
    hidden, heads = model["hidden-size"], model["num-attention-heads"]
    channels, matrices = model.get("kv-channels", hidden // heads), 2 if model.get("squared-relu") else 3
    queries, keys = heads * channels, model["num-query-groups"] * channels
    attention = hidden * (queries + 2 * keys) + queries * hidden
    attention += (queries + 2 * keys) * bool(model.get("add-qkv-bias")) + 2 * channels * bool(model.get("qk-layernorm"))
    layers = {"*": attention, "-": matrices * hidden * model.get("ffn-hidden-size", 0)}
    if experts := model.get("num-experts"):
        layers["E"] = experts * matrices * hidden * model["moe-ffn-hidden-size"] + experts * hidden
        layers["E"] += matrices * hidden * model.get("moe-shared-expert-intermediate-size", 0)
    if heads := model.get("mamba-num-heads"):
        inner, states = heads * model["mamba-head-dim"], model["mamba-num-groups"] * model["mamba-state-dim"]
        convolved = inner + 2 * states
        layers["M"] = hidden * (inner + convolved + heads) + 5 * convolved + 3 * heads + inner + inner * hidden
    pattern = model.get("hybrid-layer-pattern") or ("*E" if experts else "*-") * model["num-layers"]
    embeddings = rows * hidden * (2 if model.get("untie-embeddings-and-output-weights") else 1)
    return sum(layers[letter] + hidden for letter in pattern) + hidden + embeddings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*H100.yaml")), ids=lambda path: path.stem)
def test_the_models_have_their_published_sizes(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    student = config["megatron"]
    teacher = {**student, **config["teacher"]}
    for model, checkpoint in ((student, student["pretrained-checkpoint"]), (teacher, teacher["load"])):
        expected, rows = PUBLISHED[Path(checkpoint).name]
        found = parameters(model, rows)
        assert found == (expected if isinstance(expected, int) else pytest.approx(expected, rel=0.002)), checkpoint


# What the teachers' config.json has on https://huggingface.co, apart from what no model is built from.
LLAMA = {
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA_SCALING = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN3 = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OF_HUGGING_FACE: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {
        **LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "rope_scaling": {**LLAMA_SCALING, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-70b": {
        **{name: value for name, value in LLAMA.items() if name != "head_dim"},
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "rope_scaling": {**LLAMA_SCALING, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen3-8b": {
        **QWEN3,
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        **QWEN3,
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    },
    "nemotron-3-nano-30b-a3b": {
        "model_type": "nemotron_h",
        "attention_bias": False,
        "chunk_size": 128,
        "conv_kernel": 4,
        "expand": 2,
        "head_dim": 128,
        "hidden_size": 2688,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "intermediate_size": 1856,
        "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": 64,
        "mamba_num_heads": 64,
        "max_position_embeddings": 262144,
        "mlp_hidden_act": "relu2",
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "n_group": 1,
        "n_groups": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 52,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 1.0,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "ssm_state_size": 128,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "vocab_size": 131072,
    },
}


def rows(number: int) -> TensorStorageMetadata:
    size = torch.Size((number, 1))
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), size)
    return TensorStorageMetadata(TensorProperties(torch.float32), size, [chunk])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*H100.yaml")), ids=lambda path: path.stem)
def test_the_teachers_are_those_of_hugging_face(path: Path, tmp_path: Path) -> None:
    """As a job compares a converted checkpoint, without its weights."""
    settings = ["megatron.tokenizer-type=NullTokenizer", "megatron.tokenizer-model=null"]
    config = load_config(path, settings, megatron_options())
    student, teacher = megatron_arguments(config)
    assert isinstance(teacher, argparse.Namespace)
    described = OF_HUGGING_FACE[Path(str(config.teacher.load)).name]

    def compare(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**described, **changes}))
        norm = "final_norm" if teacher.hybrid_layer_pattern else "final_layernorm"
        index = Metadata(
            {"embedding.word_embeddings.weight": rows(described["vocab_size"]), f"decoder.{norm}.weight": rows(1)}
        )
        return check_teacher(config, TeacherCheckpoint(tmp_path, {}, index), teacher, student.vocab_size)

    assert "config.json" in compare()
    other: list[dict[str, Any]] = [{"num_attention_heads": 16}, {"vocab_size": 100000}]
    if described["model_type"] == "nemotron_h":
        other += [{"hybrid_override_pattern": "ME*" * 17 + "M"}, {"ssm_state_size": 64}, {"mlp_hidden_act": "silu"}]
    else:
        rope_scaling = {"rope_type": "linear", "factor": 4.0}
        other += [{"rope_theta": 10000.0}, {"rms_norm_eps": 1e-4}, {"rope_scaling": rope_scaling}]
    for changes in other:
        with pytest.raises(CheckpointError):
            compare(**changes)
