"""On a GPU the fast path equals the dense fp64 twin, value and gradient."""

import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi, vocab_parallel_divergence
from abkd_megatron.divergences.reference import reference_divergence

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
