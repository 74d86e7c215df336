"""On a GPU the fast path equals the dense fp64 twin, value and gradient."""

import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi, kernels, vocab_parallel_divergence
from abkd_megatron.losses.reference import reference_divergence
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation, vocab_parallel_distillation_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize(
    "divergence", [AlphaBeta(0.2, 0.7), AlphaBeta(1, 0), AlphaBeta(0, 1), ToDi(), ToDi(detach=False)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]
)
def test_equals_the_dense_twin(divergence: AlphaBeta | ToDi, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (2 * torch.randn(16, 5000, generator=generator, dtype=torch.float64)).to("cuda", dtype) for _ in range(2)
    )
    student.requires_grad_()
    loss = vocab_parallel_divergence(student, teacher, divergence, vocab_size=4900)
    (gradient,) = torch.autograd.grad(loss.sum(), student)

    wide = student.detach().double().requires_grad_()
    expected = reference_divergence(divergence, wide, teacher.double(), vocab_size=4900)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(loss.double(), expected, rtol=min(tolerance, 1e-5), atol=0)
    error = (gradient.double() - expected_gradient).abs().amax(-1) / expected_gradient.abs().amax(-1)
    assert error.max() <= tolerance

    logits = student * 1
    in_place = vocab_parallel_divergence(logits, teacher, divergence, vocab_size=4900, gradient_in_place=True)
    (same,) = torch.autograd.grad(in_place.sum(), student)
    assert torch.equal(same, gradient) and torch.equal(logits.detach(), gradient)


def test_triton_is_chosen_where_it_can_serve() -> None:
    logits = torch.randn(2, 8, device="cuda")
    assert kernels.select(AlphaBeta(0.2, 0.7), logits, logits).name == "triton"
    assert kernels.select(AlphaBeta(0.2, 0.7), logits.double(), logits).name == "eager"


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_equals_logits_that_exist(dtype: torch.dtype, in_forward: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(shape, generator=generator).to("cuda", dtype)
        for shape in ((70, 64), (1000, 64), (70, 96), (1000, 96))
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.randint(990, (70,), generator=generator).cuda()
    mask = torch.randint(2, (70,), generator=generator).float().cuda()
    shard, divergence = VocabShard.megatron(1000, vocab_size=990), AlphaBeta(0.2, 0.7)
    wanted = vocab_parallel_distillation(
        hidden @ weight.t(), teacher_hidden @ teacher_weight.t(), divergence, labels, shard
    )
    wanted_loss = wanted.divergence + wanted.cross_entropy
    wanted_gradients = torch.autograd.grad((wanted_loss * mask).sum(), (hidden, weight))
    loss, _ = vocab_parallel_distillation_head(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        divergence,
        labels,
        shard,
        token_weights=mask if in_forward else None,
        chunk_tokens=32,
    )
    gradients = torch.autograd.grad((loss * mask).sum(), (hidden, weight))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4  # matrix products in another order
    torch.testing.assert_close(loss, wanted_loss, rtol=tolerance, atol=tolerance)
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()
