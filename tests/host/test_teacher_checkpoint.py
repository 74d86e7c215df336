"""What a teacher's saved arguments must agree in, where no shape would tell."""

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from abkd_megatron.errors import CheckpointError
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint, check_unquantized

SAVED = {
    "num_layers": 4,
    "group_query_attention": False,
    "num_query_groups": 8,
    "rotary_base": 10000,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "num_experts": None,
    "moe_router_pre_softmax": False,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 2,
    "padded_vocab_size": 512,
}


def check(
    vocab_size: int = 500, saved: dict | None = None, shared_vocab: int | None = None, **configured: object
) -> None:
    checkpoint = TeacherCheckpoint(Path("teacher"), {"args": Namespace(**{**SAVED, **(saved or {})})}, Metadata({}))
    checkpoint.check_arguments(Namespace(**{**SAVED, **configured}), vocab_size, shared_vocab)


def test_a_teacher_as_configured_is_taken() -> None:
    check()
    check(num_query_groups=1)  # without grouped queries it means nothing
    check(rope_scaling_factor=32.0, moe_router_pre_softmax=True)  # nor these without scaling and experts
    # Nor these with other positions than they belong to, nor what becomes of tokens that no expert drops.
    saved = {"yarn_beta_fast": 32.0, "mscale": 1.0, "mrope_section": [2, 1], "moe_token_drop_policy": "probs"}
    check(saved=saved, yarn_beta_fast=64.0, mscale=2.0, mrope_section=[1, 2], moe_token_drop_policy="position")
    check(saved={"vocab_size": 500})
    check(vocab_size=600, shared_vocab=500)
    check(vocab_size=600, saved={"vocab_size": 500}, shared_vocab=500)
    # Different words for one model.
    check(saved={"group_query_attention": True, "num_query_groups": 4, "num_attention_heads": 4}, num_attention_heads=4)
    check(saved={"num_experts": 4, "moe_layer_freq": 2}, num_experts=4, moe_layer_freq=[1, 0, 1, 0])
    check(saved={"window_size": (31, 0), "seq_length": 999}, window_size=None, seq_length=32)


def test_a_checkpoint_that_says_nothing_has_to_be_declared() -> None:
    checkpoint = TeacherCheckpoint(Path("teacher"), {}, Metadata({}))
    with pytest.raises(CheckpointError, match=r"teacher\.declared=true"):
        checkpoint.check_arguments(Namespace(), 500)
    assert "declared" in checkpoint.check_arguments(Namespace(), 500, declared=True)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"rotary_base": 500000}, "rotary-base: the checkpoint has 10000, the configuration 500000"),
        (
            {"saved": {"group_query_attention": True}, "group_query_attention": True, "num_query_groups": 2},
            "num-query-groups",
        ),
        (
            {"saved": {"use_rope_scaling": True}, "use_rope_scaling": True, "rope_scaling_factor": 32.0},
            "rope-scaling-factor: the checkpoint has 8.0, the configuration 32.0",
        ),
        (
            {"saved": {"num_experts": 4}, "num_experts": 4, "moe_router_pre_softmax": True},
            "moe-router-pre-softmax: the checkpoint has False, the configuration True",
        ),
        *(
            (
                {"saved": {"position_embedding_type": "yarn", name: 1.0}, "position_embedding_type": "yarn", name: 2.0},
                f"{name.replace('_', '-')}: the checkpoint has 1.0, the configuration 2.0",
            )
            for name in ("yarn_beta_fast", "yarn_original_max_position_embeddings", "rotary_scaling_factor", "mscale")
        ),
        (
            {"saved": {"num_experts": 4, "moe_expert_capacity_factor": None}, "num_experts": 4}
            | {"moe_expert_capacity_factor": 1.0},
            "moe-expert-capacity-factor: the checkpoint has None, the configuration 1.0",
        ),
        ({"saved": {"attention_output_gate": False}, "attention_output_gate": True}, "attention-output-gate"),
        (
            {"saved": {"num_experts": 4, "moe_router_enable_expert_bias": True}, "num_experts": 4}
            | {"moe_router_enable_expert_bias": False},
            "moe-router-enable-expert-bias",
        ),
        (
            {"saved": {"window_size": (15, 0)}, "window_size": None, "seq_length": 32},
            r"window-size: the checkpoint has \(15, 0\), the configuration None",
        ),
        ({"vocab_size": 600}, r"512 padded vocabulary columns.*600 tokens would have given 768"),
        ({"vocab_size": 500, "saved": {"vocab_size": 499}}, r"vocabulary of 499 tokens.*500.*one tokenizer"),
        ({"saved": {"vocab_size": 499}, "shared_vocab": 500}, r"shared_vocab is 500; .* vocabulary of 499 tokens"),
        ({"saved": {"vocab_size": 499}, "vocab_size": 300, "shared_vocab": 301}, r"301; .*499 tokens, .* one of 300"),
        ({"vocab_size": 600, "shared_vocab": 513}, r"513; .* vocabulary of 512 tokens"),
    ],
)
def test_another_teacher_is_refused(problem: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        check(**problem)


def test_weights_beside_the_layers_without_a_place_are_refused() -> None:
    other = {"untie_embeddings_and_output_weights": False}, {"position_embedding_type": "rope"}
    for key, configured in zip(("output_layer.weight", "embedding.position_embeddings.weight"), other, strict=True):
        saved = {key: TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((500, 1)), [])}
        checkpoint = TeacherCheckpoint(Path("teacher"), {}, Metadata(saved))
        checkpoint.check_arguments(Namespace(), 500, declared=True)
        with pytest.raises(CheckpointError, match=r"teacher\.(untie|position)-embedding"):
            checkpoint.check_arguments(Namespace(**configured), 500, declared=True)


def test_a_quantized_models_checkpoint_is_refused(tmp_path: Path) -> None:
    of_layer = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4,)), [])
    for name, is_quantized in (("weight", False), ("weight_quantizer._amax", True)):
        index = Metadata({f"decoder.layers.0.mlp.linear_fc1.{name}": of_layer})
        expected = pytest.raises(CheckpointError, match=r"without quantizers.*weight_quantizer\._amax; give")
        with expected if is_quantized else nullcontext():
            check_unquantized(tmp_path, index, "student")


def test_weights_without_a_place_in_the_configured_model_are_refused() -> None:
    def sized(*size: int) -> TensorStorageMetadata:
        whole = torch.Size(size)
        chunks = [ChunkStorageMetadata(torch.Size([0] * len(size)), whole)]
        return TensorStorageMetadata(TensorProperties(torch.float32), whole, chunks)

    names = [f"decoder.layers.{of}" for of in ("mlp.linear_fc1.weight", "self_attention.linear_qkv.weight")]
    elsewhere = ["optimizer.step", "mtp.layers.0.eh_proj.weight", "decoder.layers.3.mlp.router.expert_bias"]
    saved = {name: sized(4, 6) for name in (*names, *elsewhere, "decoder.layers.mlp.experts.local.weight")}

    def build(key: str, tensor: torch.Tensor, *_: object) -> dict:
        return {half: ShardedTensor.from_rank_offsets(key, part, (0, i, 2)) for i, (half, part) in halves(tensor)}

    def halves(tensor: torch.Tensor) -> enumerate:
        return enumerate(zip("gu", tensor.chunk(2), strict=True))

    wanted = {
        "fc1": ShardedTensorFactory(names[0], torch.zeros(4, 6), build, lambda parts: parts),
        "qkv": ShardedTensor.from_rank_offsets(names[1], torch.zeros(4, 6)),
    }
    TeacherCheckpoint(Path("teacher"), {}, Metadata(saved)).check_tensors(wanted)
    bias = {**saved, "decoder.layers.self_attention.linear_qkv.bias": sized(4)}
    inherited = {"add_bias_linear": "disable-bias-linear=true"}
    with pytest.raises(CheckpointError, match=r"linear_qkv\.bias.*\n.*disable-bias-linear=true"):
        TeacherCheckpoint(Path("teacher"), {}, Metadata(bias), inherited).check_tensors(wanted)
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight: .*\(4, 6\).*\(4, 5\)"):
        TeacherCheckpoint(Path("teacher"), {}, Metadata({**saved, names[0]: sized(4, 5)})).check_tensors(wanted)


def test_a_tokenizer_of_the_same_size_may_be_another(tmp_path: Path) -> None:
    for name, text in (("theirs", "a"), ("copied", "a"), ("other", "b")):
        (tmp_path / name).write_text(text)
    saved = Namespace(**SAVED, tokenizer_model=str(tmp_path / "theirs"))
    checkpoint = TeacherCheckpoint(Path("teacher"), {"args": saved}, Metadata({}))
    for fine in ("theirs", "copied", "not here"):
        checkpoint.check_tokenizer(str(tmp_path / fine))
    checkpoint.check_tokenizer(None)
    with pytest.raises(CheckpointError, match=r"theirs.*other"):
        checkpoint.check_tokenizer(str(tmp_path / "other"))
