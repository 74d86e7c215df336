"""The models in configs/ are the published ones: their sizes give the published numbers of parameters."""

from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# By model: what its page on https://huggingface.co gives as its size, to the digit, and the rows of the embedding in
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
}


def parameters(model: dict[str, Any], rows: int) -> int:
    """Of a decoder with RMSNorm, grouped queries and gated MLPs."""
    hidden, heads = model["hidden-size"], model["num-attention-heads"]
    channels = model.get("kv-channels", hidden // heads)
    queries, keys = heads * channels, model["num-query-groups"] * channels
    attention = hidden * (queries + 2 * keys) + queries * hidden
    attention += (queries + 2 * keys) * bool(model.get("add-qkv-bias")) + 2 * channels * bool(model.get("qk-layernorm"))
    if experts := model.get("num-experts"):
        mlp = experts * 3 * hidden * model["moe-ffn-hidden-size"] + experts * hidden
    else:
        mlp = 3 * hidden * model["ffn-hidden-size"]
    embeddings = rows * hidden * (2 if model.get("untie-embeddings-and-output-weights") else 1)
    return model["num-layers"] * (attention + mlp + 2 * hidden) + hidden + embeddings


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*H100.yaml")), ids=lambda path: path.stem)
def test_the_models_have_their_published_sizes(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    student = config["megatron"]
    teacher = {**student, **config["teacher"]}
    for model, checkpoint in ((student, student["pretrained-checkpoint"]), (teacher, teacher["load"])):
        expected, rows = PUBLISHED[Path(checkpoint).name]
        assert parameters(model, rows) == expected, checkpoint
