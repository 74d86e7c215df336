"""docs/migration.md: what ModelOpt's losses do on two tensor-parallel ranks, beside ours."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed

from abkd_megatron import vocab_parallel_divergence
from abkd_megatron.losses import ClippedKL, forward_kl
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_logit_loss


def compare(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """The gradient's error beside ours, and the ratio of their norms, over this rank's columns."""
    import modelopt.torch.distill.plugins.megatron as plugin
    from megatron.core import parallel_state

    config = SimpleNamespace(tensor_model_parallel_size=world_size, sequence_parallel=False)
    shard = VocabShard.megatron(32, dist.group.WORLD)

    def local() -> tuple[torch.Tensor, torch.Tensor]:
        both = 2 * torch.randn(2, 6, 3, 32 * world_size, generator=torch.Generator().manual_seed(0))
        student, teacher = (whole.chunk(world_size, dim=-1)[rank].contiguous() for whole in both)
        return student.requires_grad_(), teacher

    def gradient(compute) -> torch.Tensor:
        student, teacher = local()
        compute(student, teacher).sum().backward()
        return student.grad

    def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_divergence(student, teacher, forward_kl(), tp_group=dist.group.WORLD)

    def top_k(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_logit_loss(student, teacher, ClippedKL(top_k=7), shard)

    found = {}
    with mock.patch.object(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", dist.group.WORLD):
        for name, theirs, ours in (
            ("kl", plugin.LogitsKLLoss(config), kl),
            ("top k", plugin.TopKLogitsKLLoss(config, top_k=7), top_k),
        ):
            wanted, got = gradient(ours), gradient(lambda *logits, theirs=theirs: theirs(*logits)[0])
            ratio = (got.norm() / wanted.norm()).item()
            found[name] = (got / ratio - wanted).abs().max().item(), ratio
    return found


def test_gradients() -> None:
    pytest.importorskip("modelopt")
    pytest.importorskip("megatron.core")
    for found in run_distributed(compare, 2):
        assert max(error for error, _ in found.values()) < 1e-6, found
        assert found["kl"][1] == pytest.approx(1.0, rel=1e-5)
        assert found["top k"][1] == pytest.approx(2.0, rel=1e-5)
