"""docs/migration.md: its options are ModelOpt's, and on one rank the losses it calls the same are."""

import re
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import DOCS

from abkd_megatron import vocab_parallel_divergence
from abkd_megatron.losses import ClippedKL, forward_kl, reverse_kl
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_logit_loss

MIGRATION = (DOCS / "migration.md").read_text()
ONE_RANK = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)


@pytest.fixture(scope="module")
def plugin() -> Any:
    pytest.importorskip("modelopt")
    return pytest.importorskip("modelopt.torch.distill.plugins.megatron")


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """[s, b, V] of both models, as Megatron's output layers give them."""
    student, teacher = 2 * torch.randn(2, 6, 3, 50, generator=torch.Generator().manual_seed(0))
    return student.requires_grad_(), teacher


def of(loss: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def test_every_option_is_there(plugin: Any) -> None:
    _, _, rest = MIGRATION.partition("<!-- modelopt -->\n")
    table, _, _ = rest.partition("<!-- /modelopt -->")
    named = re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
    assert {name for name, _ in named} == {item.name for item in fields(plugin.DistillationConfig)}
    defaults = plugin.DistillationConfig()
    for name, default in (("logit_kl_temperature", "1.0"), ("skip_lm_loss", "true"), ("kd_loss_scale", "1.0")):
        assert (name, default) in named and str(getattr(defaults, name)).lower() == default


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("divergence", "reverse"), [(forward_kl(), False), (reverse_kl(), True)], ids=["fkl", "rkl"])
def test_kl_is_the_same(plugin: Any, divergence: Any, reverse: bool, temperature: float) -> None:
    student, teacher = logits()
    wanted, gradient = of(plugin.LogitsKLLoss(ONE_RANK, temperature, reverse)(student, teacher)[0], student)
    ours, own = of(vocab_parallel_divergence(student, teacher, divergence, temperature=temperature), student)
    torch.testing.assert_close(ours.T, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6)


def test_top_k_is_clipped_kl(plugin: Any) -> None:
    student, teacher = logits()
    wanted, gradient = of(plugin.TopKLogitsKLLoss(ONE_RANK, 2.0, top_k=7)(student, teacher)[0], student)
    shard = VocabShard.megatron(50)
    ours, own = of(vocab_parallel_logit_loss(student, teacher, ClippedKL(top_k=7), shard, temperature=2.0), student)
    torch.testing.assert_close(ours.T, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6)


def test_excluded_and_padded_columns_differ(plugin: Any) -> None:
    student, teacher = logits()
    student, teacher = student.detach(), teacher.clone()
    padded, _, _ = plugin.LogitsKLLoss(ONE_RANK)(student, teacher)
    ours = vocab_parallel_divergence(student, teacher, forward_kl(), vocab_size=45)
    assert not torch.allclose(ours.T, padded, rtol=1e-2)
    student[..., 45:], teacher[..., 45:] = -torch.inf, -torch.inf
    assert plugin.LogitsKLLoss(ONE_RANK)(student, teacher)[0].isnan().all()
    torch.testing.assert_close(vocab_parallel_divergence(student, teacher, forward_kl()), ours)


def test_the_balancer_makes_distillation_as_large_as_the_lm_loss(plugin: Any) -> None:
    for kd in (0.01, 5.0):
        losses = {"LogitsKLLoss_0": torch.tensor(kd), "MSELoss_1": torch.tensor(0.3), "MSELoss_2": torch.tensor(0.5)}
        key = plugin.mtd.loss_balancers.STUDENT_LOSS_KEY
        found = plugin.LogitsAndIntermediatesLossBalancer(kd_loss_scale=0.5)({key: torch.tensor(4.0), **losses})
        assert found["kd_loss"].item() == pytest.approx(4.0 + 0.5 * 4.0)
        alone = plugin.LogitsAndIntermediatesLossBalancer(skip_original_loss=True)({key: torch.tensor(4.0), **losses})
        assert alone["kd_loss"].item() == pytest.approx(2 * kd)
