"""On a GPU losses on records equal the dense fp64 form, in deterministic mode too, and the host does not wait."""

from dataclasses import replace

import pytest
import torch
from record_cases import records_of, sampled_divergence
from test_no_sync_cuda import waiting_is_an_error

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.losses import JensenShannon, reference_bucketed_divergence, reference_cross_entropy
from abkd_megatron.vocab_parallel import (
    TeacherRecords,
    VocabShard,
    vocab_parallel_record_distillation,
    vocab_parallel_record_distillation_head,
)
from abkd_megatron.vocab_parallel.noise import places_in_tail
from abkd_megatron.vocab_parallel.truncate import truncate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROWS, COLUMNS, REAL, HIDDEN = 70, 4096, 4000, 64


@pytest.fixture(params=["triton", "eager"], autouse=True)
def kernel(request):
    with kernels.using(request.param):
        yield request.param


def inputs(dtype: torch.dtype, temperature: float) -> tuple[torch.Tensor, TeacherRecords, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, ROWS, COLUMNS, generator=generator)
    labels = torch.randint(REAL, (ROWS,), generator=generator)
    labels[0], labels[1] = teacher[0, :REAL].argmax(), -1
    records = records_of(teacher[:, :REAL], 16, labels, temperature)
    on_gpu = replace(records, **{name: it.cuda() for name, it in vars(records).items() if it is not None})
    return student.to("cuda", dtype), on_gpu, labels.cuda()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [AlphaBeta(0.2, 0.7), ToDi(), JensenShannon()], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_equals_the_dense_form(divergence, temperature, dtype, tolerance, deterministic):
    student, records, labels = inputs(dtype, temperature)
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    shard = VocabShard.megatron(COLUMNS, None, REAL)
    torch.use_deterministic_algorithms(deterministic)
    try:
        terms = vocab_parallel_record_distillation(leaf, records, divergence, labels, shard, temperature)
        (gradient,) = torch.autograd.grad((terms.divergence + 0.5 * terms.cross_entropy).sum(), leaf)
    finally:
        torch.use_deterministic_algorithms(False)
    log_probs, log_rest = records.log_probs.double(), records.log_rest.double()
    wanted = reference_bucketed_divergence(divergence, exact, records.ids, log_probs, log_rest, temperature, REAL)
    cross_entropy = reference_cross_entropy(exact, labels.clamp_min(0), REAL) * (labels >= 0)
    (expected,) = torch.autograd.grad((wanted + 0.5 * cross_entropy).sum(), exact)
    torch.testing.assert_close(terms.divergence.double(), wanted.detach(), rtol=1e-5, atol=0)
    error = (gradient.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() <= tolerance


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [AlphaBeta(1, 0), AlphaBeta(0.8, 0.3)], ids=str)
def test_draws(divergence, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, ROWS, COLUMNS, generator=generator).cuda()
    labels = torch.randint(REAL, (ROWS,), generator=generator).cuda()
    shard = VocabShard.megatron(COLUMNS, None, REAL)
    records = truncate(teacher, labels, shard, 16, temperature, places_in_tail(labels.unsqueeze(0), 8))
    leaf, exact = student.clone().requires_grad_(), student[:, :REAL].double().requires_grad_()
    terms = vocab_parallel_record_distillation(leaf, records, divergence, labels, shard, temperature)
    wanted = sampled_divergence(divergence, exact, records, temperature)
    torch.testing.assert_close(terms.divergence.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(terms.divergence.sum(), leaf)
    (expected,) = torch.autograd.grad(wanted.sum(), exact)
    error = (gradient[:, :REAL].double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() <= 1e-5


@pytest.mark.parametrize("in_forward", [True, False])
def test_the_host_does_not_wait(in_forward):
    student, records, labels = inputs(torch.bfloat16, 1.0)
    leaf, shard = student.requires_grad_(), VocabShard.megatron(COLUMNS, None, REAL)
    hidden, weight = (torch.randn(n, HIDDEN, device="cuda", dtype=torch.bfloat16) for n in (ROWS, COLUMNS))
    hidden.requires_grad_()
    weight.requires_grad_()
    mask = torch.ones(ROWS, device="cuda")

    def run():
        terms = vocab_parallel_record_distillation(leaf * 1, records, ToDi(), labels, shard, 1.0, True)
        torch.autograd.grad((terms.divergence + terms.cross_entropy).sum(), leaf)
        loss, _ = vocab_parallel_record_distillation_head(
            *(hidden, weight, records, ToDi(), labels, shard),
            token_weights=mask if in_forward else None,
            chunk_tokens=40,
        )
        torch.autograd.grad((loss * mask).sum(), (hidden, weight))

    run()
    with waiting_is_an_error():
        run()
