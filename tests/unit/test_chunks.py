"""Losses of chunks: their definition in fp64, and what does not count."""

import math
from dataclasses import replace

import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import JensenShannon, forward_kl, reverse_kl
from abkd_megatron.losses.chunks import CUT_OFF, NO_CHUNK, ChunkLikelihood, Chunks, chunk_losses
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.losses.mixed_sequences import SequenceMix
from abkd_megatron.losses.objective import Objective, ScheduledObjective
from abkd_megatron.losses.schedule import Schedule
from abkd_megatron.losses.selection import TokenSelection

# Two rows: chunks of several tokens on either side, tokens in none, and a row with one chunk.
CHUNKS = Chunks(
    torch.tensor([[NO_CHUNK, 0, 1, 1, 1, 2, NO_CHUNK, 3], [0, 0, CUT_OFF, CUT_OFF, NO_CHUNK, -1, -1, -1]]),
    torch.tensor([[0, 0, 0, 1, 2, 2, 3], [NO_CHUNK, 0, -1, -1, -1, -1, -1]]),
)
DIVERGENCES = [forward_kl(), reverse_kl(), AlphaBeta(0.2, 0.7), JensenShannon(), ToDi(detach=False)]


def losses(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    of = (4 * torch.rand(rows, generator=generator, dtype=torch.float64) for rows in ((2, 8), (2, 7)))
    student, teacher = (it.to(dtype) for it in of)
    return student.requires_grad_(), teacher


def dense(divergence, student, teacher, mask, temperature) -> torch.Tensor:
    """The definition, chunk by chunk."""
    total = student.new_zeros(())
    for ours, theirs, of_mask, p_losses, q_losses in zip(*CHUNKS, mask, teacher, student, strict=True):
        for chunk in range(int(ours.max()) + 1):
            if (of_mask[ours == chunk] == 0).any():
                continue
            x, y = -p_losses[theirs == chunk].sum(), -q_losses[ours == chunk].sum()
            p, q = ((of / temperature).exp() for of in (x, y))
            outcomes_p, outcomes_q = torch.stack([p, 1 - p]).log(), torch.stack([q, 1 - q]).log()
            total = total + temperature * elementwise(divergence, outcomes_p, outcomes_q)
    return total


def elementwise(divergence, log_p, log_q) -> torch.Tensor:
    """Differentiable, from F and its derivative."""
    value, slope = divergence.value_and_grad(log_p.detach(), log_q.detach(), (log_p - log_q).detach())
    return (value + slope * (log_q - log_q.detach())).sum()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_value_and_gradient_are_those_of_the_definition(divergence, temperature: float) -> None:
    student, teacher = losses()
    mask = torch.ones(2, 8)
    mask[0, 3] = 0  # and with it chunk 1 of the first row
    found = chunk_losses(student, teacher, CHUNKS, mask, divergence, ChunkLikelihood(temperature))
    wanted = dense(divergence, student, teacher, mask, temperature)
    torch.testing.assert_close(found.per_token.sum(), wanted, rtol=1e-4, atol=1e-7)
    ours, theirs = (torch.autograd.grad(of.sum(), student)[0] for of in (found.per_token, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert found.counted.tolist() == [[True, False, True, True, *4 * [False]], [True, *7 * [False]]]


def test_a_chunk_s_loss_is_at_its_last_token() -> None:
    found = chunk_losses(*losses(), CHUNKS, None, forward_kl(), ChunkLikelihood())
    assert (found.per_token != 0).nonzero().tolist() == [[0, 1], [0, 4], [0, 5], [0, 7], [1, 1]]


def test_forward_kl_is_the_paper_s_formula() -> None:
    """Equation of arXiv 2503.20083, here times tau, of one chunk with p = 0.2 and q = 0.3 at tau = 2."""
    chunks = Chunks(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    student, teacher = torch.tensor([[-math.log(0.3)]]).double(), torch.tensor([[-math.log(0.4), -math.log(0.5)]])
    p, q = math.sqrt(0.2), math.sqrt(0.3)
    wanted = 2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    found = chunk_losses(student, teacher.double(), chunks, None, forward_kl(), ChunkLikelihood(2.0))
    assert found.per_token.item() == pytest.approx(wanted, rel=1e-5)


def test_gradient_at_a_large_temperature_is_its_limit() -> None:
    student, teacher = losses()
    found = chunk_losses(student, teacher, CHUNKS, None, forward_kl(), ChunkLikelihood(1e5))
    (gradient,) = torch.autograd.grad(found.per_token.sum(), student)
    x, y = (CHUNKS.log_likelihoods(of.detach(), ids) for of, ids in zip((teacher, student), CHUNKS[::-1], strict=True))
    assert gradient[0, 2].item() == pytest.approx(1 - (x / y)[0, 1].item(), abs=1e-3)


def test_what_does_not_count_may_be_anything() -> None:
    student, teacher = losses(torch.float32)
    mask = torch.ones(2, 8)
    mask[0, 2:5] = 0
    wanted = chunk_losses(student, teacher, CHUNKS, mask, forward_kl(), ChunkLikelihood())
    (of_wanted,) = torch.autograd.grad(wanted.per_token.sum(), student)
    with torch.no_grad():
        student[0, 2:5], student[1, 2:], teacher[1, 2:] = torch.nan, torch.inf, torch.nan
    found = chunk_losses(student, teacher, CHUNKS, mask, forward_kl(), ChunkLikelihood())
    assert torch.equal(found.per_token, wanted.per_token)
    assert torch.equal(torch.autograd.grad(found.per_token.sum(), student)[0], of_wanted)
    with torch.no_grad():
        teacher[0, 1] = torch.nan
    assert chunk_losses(student, teacher, CHUNKS, mask, forward_kl(), ChunkLikelihood()).per_token.isnan().any()


def test_certain_tokens_have_a_finite_loss_and_gradient() -> None:
    for of_student, of_teacher in ((0.0, 0.0), (0.0, 3.0), (3.0, 0.0), (0.0, 90.0), (90.0, 0.0)):
        student = torch.full((2, 8), of_student, requires_grad=True)
        teacher = torch.full((2, 7), of_teacher)
        for divergence in DIVERGENCES:
            found = chunk_losses(student, teacher, CHUNKS, None, divergence, ChunkLikelihood())
            (gradient,) = torch.autograd.grad(found.per_token.sum(), student)
            assert found.per_token.isfinite().all() and gradient.isfinite().all()
            assert of_student != of_teacher or found.per_token.abs().max() == gradient.abs().max() == 0


def test_sums_do_not_depend_on_their_order() -> None:
    """A GPU adds to one number in any order."""
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(1, 4096, generator=generator) * 10 ** (8 * torch.rand(1, 4096, generator=generator) - 6)
    order = torch.randperm(4096, generator=generator)
    one = torch.zeros(1, 4096, dtype=torch.int64)
    sums = [Chunks(one, one).log_likelihoods(of, one)[0, 0] for of in (values, values[:, order], values.flip(1))]
    assert sums[0] == sums[1] == sums[2]
    torch.testing.assert_close(sums[0], -values.double().sum(), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 2.0},
        {"temperature_squared": True},
        {"shared_vocab": 8},
        {"tokens": TokenSelection("every", n=2)},
        {"hidden_losses": (HiddenLoss(student_layer=1, teacher_layer=1, loss="mse"),)},
        {"mtp_weight": 1.0},
        {"mix": SequenceMix(0.4), "lm_weight": 0.0},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_compares_tokens_is_rejected(more: dict) -> None:
    with pytest.raises(ConfigError, match=rf"cross_tokenizer.*{next(iter(more))}"):
        Objective(forward_kl(), cross_tokenizer=ChunkLikelihood(), **more)


def test_a_scheduled_temperature_is_rejected() -> None:
    objective = Objective(forward_kl(), cross_tokenizer=ChunkLikelihood())
    with pytest.raises(ConfigError, match=r"cross_tokenizer.*temperature"):
        ScheduledObjective(objective, {"temperature": Schedule.of(2.0)})
    with pytest.raises(ConfigError, match="temperature"):
        replace(ChunkLikelihood(), temperature=0)
