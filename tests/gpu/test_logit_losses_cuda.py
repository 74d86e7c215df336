"""Every logit loss and every divergence of the registry on a GPU, in deterministic mode too: equal to its definition.

torch refuses operations that have no deterministic form on a GPU; on a CPU it has one for all that are used here.
"""

import pytest
import torch
from test_logit_losses import LOSSES

from abkd_megatron.config.schema import DistillationConfig
from abkd_megatron.losses import reference_divergence, reference_logit_loss
from abkd_megatron.losses.registry import DIVERGENCES
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_divergence, vocab_parallel_logit_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def deterministic(request, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


def logits(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(2, 2, 7, 301, generator=generator, dtype=torch.float64)).to("cuda", dtype)
    return student.requires_grad_(), teacher


def assert_equal(found, expected, student, wide):
    """Values within 1e-4, gradients within 1e-3 of their row's largest, as fp32 and these losses allow."""
    (gradient,), (wanted,) = torch.autograd.grad(found.sum(), student), torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert ((gradient.double() - wanted).abs() <= 1e-3 * wanted.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_logit_loss(loss, deterministic):
    student, teacher = logits(torch.float32)
    found = vocab_parallel_logit_loss(student, teacher, loss, VocabShard(0, 301, 301))
    wide = student.detach().double().requires_grad_()
    assert_equal(found, reference_logit_loss(loss, wide, teacher.double()), student, wide)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(name, deterministic):
    divergence = DistillationConfig(divergence=name).make_divergence()
    assert divergence is not None
    student, teacher = logits(torch.float32)
    found = vocab_parallel_divergence(student, teacher, divergence)
    wide = student.detach().double().requires_grad_()
    assert_equal(found, reference_divergence(divergence, wide, teacher.double()), student, wide)
