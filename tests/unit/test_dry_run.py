"""Megatron's arguments of a job whose ranks and GPUs are not here."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core.tokenizers.text.libraries import megatron_hf_tokenizer
from megatron.training import global_vars

from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.errors import ConfigError, DataError
from abkd_megatron.tools.dry_run import megatron_arguments, smallest_world_size

SETTINGS = {
    "tensor-model-parallel-size": 4,
    "pipeline-model-parallel-size": 2,
    "num-layers": 4,
    "hidden-size": 512,
    "num-attention-heads": 8,
    "seq-length": 1024,
    "max-position-embeddings": 1024,
    "bf16": "true",
    "micro-batch-size": 1,
    "global-batch-size": 32,
    "train-iters": 10,
    "eval-interval": 10,
    "lr": 0.001,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 5000,
    "mock-data": "true",
    "no-create-attention-mask-in-dataloader": "true",
    "position-embedding-type": "rope",
}
TEACHER = ["teacher.num-layers=8", "teacher.hidden-size=1024", "teacher.pipeline-model-parallel-size=4"]


def config(*more: str):
    given = [f"megatron.{key}={value}" for key, value in SETTINGS.items()]
    return load_config(None, ["device=cuda", *given, *more], megatron_options())


def test_both_models_at_64_ranks_and_no_trace_of_it() -> None:
    environment, outside = dict(os.environ), torch.cuda.get_device_capability
    student, teacher = megatron_arguments(config(*TEACHER), 64)
    assert teacher is not None
    assert (student.world_size, student.data_parallel_size, teacher.data_parallel_size) == (64, 8, 4)
    assert (student.num_layers, student.hidden_size, student.params_dtype) == (4, 512, torch.bfloat16)
    assert (teacher.num_layers, teacher.hidden_size) == (8, 1024)
    assert student.vocab_size == 5000
    assert student.padded_vocab_size == teacher.padded_vocab_size == 5120  # a multiple of 128 x 4
    assert dict(os.environ) == environment and torch.cuda.get_device_capability is outside
    assert not torch.distributed.is_initialized() and global_vars._GLOBAL_ARGS is None


def test_without_a_teacher() -> None:
    assert megatron_arguments(config(), 8)[1] is None


def test_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert megatron_arguments(config(*TEACHER))[0].world_size == 16
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert megatron_arguments(config(*TEACHER))[0].world_size == 32
    assert megatron_arguments(config(*TEACHER), 64)[0].world_size == 64
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE, got 'two'"):
        megatron_arguments(config(*TEACHER))


def sizes(tensor=1, pipeline=1, context=1, experts=None, expert=1, expert_tensor=None) -> Namespace:
    return Namespace(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        num_experts=experts,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )


@pytest.mark.parametrize(
    ("student", "teacher", "ranks"),
    [
        (sizes(), None, 1),
        (sizes(2, 3, 4), None, 24),
        (sizes(2), sizes(8), 8),
        (sizes(2, 2), sizes(4, 3), 24),
        (sizes(2, 4), sizes(2, 1), 8),
        (sizes(experts=8, expert=4), None, 4),
        (sizes(2, 2, experts=8, expert=4, expert_tensor=1), sizes(2, 2, experts=8, expert=2), 8),
        (sizes(2), sizes(3), 2),  # which no number allows
    ],
)
def test_the_fewest_ranks(student: Namespace, teacher: Namespace | None, ranks: int) -> None:
    assert smallest_world_size(student, teacher) == ranks


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["megatron.num-attention-heads=6"], "student: hidden-size 512 does not divide over 6 attention heads; change"),
        (["megatron.bf16=true", "megatron.fp16=true"], "Megatron rejects these arguments: assert not args.(bf|fp)16"),
        (
            ["megatron.attention-backend=local"],
            r"Megatron fails with these arguments: TypeError: .*`assert args.spec\[0\] == 'local'",
        ),
        (
            ["megatron.init-method-xavier-uniform=true"],
            "Megatron fails with these arguments: TypeError: .*'scaled_init_method'",
        ),
        (
            ["teacher.init-method-xavier-uniform=true"],
            "Megatron fails with these arguments: TypeError: .*'scaled_init_method'",
        ),
        (["megatron.no-pad-vocab-size=true"], "student: expected a padded vocabulary, got no-pad-vocab-size"),
        (["megatron.checkpoint-activations=true"], "checkpoint-activations is no longer valid"),
        (["teacher.tensor-model-parallel-size=2"], "multiple of the student's 4"),
        (["megatron.num-experts=16", "megatron.expert-model-parallel-size=16"], r"world_size \(64\).*expert"),
    ],
)
def test_what_a_job_refuses(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        megatron_arguments(config(*settings), 64)


def test_a_tokenizer_that_is_not_here() -> None:
    absent = config("megatron.tokenizer-type=SentencePieceTokenizer", "megatron.tokenizer-model=/nowhere")
    assert megatron_arguments(absent, 8)[0].padded_vocab_size == 5120  # of the size that is given
    del absent.megatron["vocab-size"]
    with pytest.raises(DataError, match=r"SentencePieceTokenizer /nowhere .*megatron\.vocab-size"):
        megatron_arguments(absent, 8)


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "BertWordPieceCase"])
def test_a_tokenizer_that_megatron_would_download(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(megatron_hf_tokenizer, "MEGATRON_CACHE", str(cache))
    download = megatron_hf_tokenizer.MegatronHFTokenizer._download
    absent = config(f"megatron.tokenizer-type={kind}")
    del absent.megatron["vocab-size"]
    with pytest.raises(DataError, match=f"{kind} .*FileNotFoundError"):
        megatron_arguments(absent, 8)
    assert not cache.exists()
    assert megatron_hf_tokenizer.MegatronHFTokenizer._download is download


def test_data_that_are_not_here(tmp_path: Path) -> None:
    given = config()
    for name in ("tokenizer-type", "vocab-size", "mock-data"):
        del given.megatron[name]
    given.data.dir, given.data.vocab_size = str(tmp_path / "absent"), 3000
    assert megatron_arguments(given, 8)[0].vocab_size == 3000
