"""Loss between models with different tokenizers: likelihoods of chunks of text, which both cut at their ends.

Approximate likelihood matching (Minixhofer et al., NeurIPS 2025, arXiv 2503.20083). A chunk c is a span of bytes at
whose two ends both tokenizations of the text have a boundary, and none in between where both have one. Its likelihood
is the product of the probabilities of its tokens. With x = log p(c) of the teacher and y of the student, the loss is
the divergence D between two outcomes, this chunk or another one:

    P = exp(x / tau),  Q = exp(y / tau),  tau * (D(P, Q) + D(1 - P, 1 - Q))

The paper has no factor tau. With it the gradient has a limit for large tau, for forward KL x / y - 1 in y; without it
the gradient vanishes as 1 / tau. The paper's debiasing, which multiplies a chunk's likelihood by the probability that
the next token begins a word, is not implemented.

Legend: b micro-batch, s tokens of the student, t of the teacher, C chunks of a row at most.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abkd_megatron.losses.base import Divergence
from abkd_megatron.tensors import Function
from abkd_megatron.validation import positive_number

NO_CHUNK = -1
"""In place of a token's chunk: it is between no two common boundaries."""
CUT_OFF = -2
"""In place of a chunk: the teacher's row ends before it."""

# Subtracted from every x and y, since fp32 rounds log-probabilities close to 0 to 0, where log(1 - P) is infinite.
_LEAST = 1e-6
# Sums are of whole multiples of 2^-40 nats, and so do not depend on their order, which a GPU does not define.
_UNIT = 2.0**-40


@dataclass(frozen=True)
class ChunkLikelihood:
    """Distillation from a teacher with another tokenizer: the divergence is of the likelihoods of aligned chunks.

    Raises:
        ConfigError: tau is not above 0.
    """

    temperature: float = 100.0
    """tau, which divides a chunk's log-likelihood in both models. 100 in the paper; at 1 unlikely chunks, among them
    most long ones, have next to no gradient."""

    def __post_init__(self) -> None:
        temperature = positive_number("cross_tokenizer", "temperature", self.temperature)
        object.__setattr__(self, "temperature", temperature)


class Chunks(NamedTuple):
    """A micro-batch's chunks: which one a token is of. A chunk's tokens are consecutive."""

    of_student: Tensor
    """[b, s] int64: 0 .. s - 1, `NO_CHUNK` or `CUT_OFF`."""
    of_teacher: Tensor
    """[b, t] int64: the same chunks, or `NO_CHUNK`."""

    def sums(self, values: Tensor, ids: Tensor) -> Tensor:
        """Return the sum of `values` over each chunk's tokens, [b, s] by chunk; 0 where there is none.

        Args:
            values: [b, n], integers.
            ids: [b, n], one of the two fields.
        """
        rows, most = self.of_student.shape
        sums = values.new_zeros(rows, most + 1)
        return sums.scatter_add_(1, torch.where(ids < 0, most, ids), values)[:, :-1]

    def log_likelihoods(self, losses: Tensor, ids: Tensor) -> Tensor:
        """Return log p of each chunk, [b, s] fp64 by chunk; NaN where a token's is not finite.

        Args:
            losses: [b, n], the cross entropy of each token.
            ids: [b, n], one of the two fields.
        """
        finite = losses.isfinite()
        units = (torch.where(finite, losses.double(), 0.0) / _UNIT).round().long()
        sums = self.sums(units, ids).double() * -_UNIT
        return sums.masked_fill(self.sums((~finite).long(), ids) > 0, torch.nan)


class ChunkLosses(NamedTuple):
    """Results of a micro-batch's chunks."""

    per_token: Tensor
    """[b, s] fp64, differentiable: a chunk's loss at its last token, 0 at all others."""
    counted: Tensor
    """[b, s] bool, by chunk: there is one, and all its tokens count."""
    log_ratio: Tensor
    """[b, s] fp64, by chunk: x - y, detached; 0 where it does not count."""


def chunk_losses(
    student: Tensor,
    teacher: Tensor,
    chunks: Chunks,
    loss_mask: Tensor | None,
    divergence: Divergence,
    likelihood: ChunkLikelihood,
) -> ChunkLosses:
    """Compute the loss of all chunks whose tokens count.

    Args:
        student: [b, s], cross entropy of each token; receives gradients.
        teacher: [b, t], the teacher's, of its own tokens.
        chunks: of both.
        loss_mask: [b, s], 0 where a token does not count, nor any chunk that it is of; None if all count.
        divergence: between the two outcomes.
        likelihood: has the temperature.

    Collectives: none.
    """
    there = chunks.sums(torch.ones_like(chunks.of_student), chunks.of_student) > 0
    left_out = (loss_mask == 0).long() if loss_mask is not None else torch.zeros_like(chunks.of_student)
    counted = there & (chunks.sums(left_out, chunks.of_student) == 0)
    x = chunks.log_likelihoods(teacher.detach(), chunks.of_teacher)
    per_token = _ChunkLoss.apply(student, x, counted, chunks, divergence, likelihood.temperature)
    y = chunks.log_likelihoods(student.detach(), chunks.of_student)
    return ChunkLosses(per_token, counted, torch.where(counted, x - y, 0.0))


def _last_tokens(ids: Tensor) -> Tensor:
    """Return [b, s] bool: a chunk's last tokens."""
    after = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=NO_CHUNK)
    return (ids >= 0) & (ids != after)


class _ChunkLoss(Function):
    title = "the loss of chunks"

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        x: Tensor,
        counted: Tensor,
        chunks: Chunks,
        divergence: Divergence,
        temperature: float,
    ) -> Tensor:
        ids = chunks.of_student
        y = chunks.log_likelihoods(student, ids)
        u, v = ((torch.where(counted, of, -1.0) - _LEAST).clamp_max(-_LEAST) / temperature for of in (x, y))
        log_p, log_q = (torch.stack([of, (-of.expm1()).log()]) for of in (u, v))
        log_ratio = log_p - log_q
        value, slope = divergence.value_and_grad(log_p, log_q, log_ratio)
        # d log(1 - Q) / d log Q = -Q / (1 - Q), and the two factors of tau cancel.
        of_y = slope[0] - slope[1] * (log_q[0] - log_q[1]).exp()
        ctx.save_for_backward(torch.where(counted, of_y, 0.0), ids)
        ctx.dtype = student.dtype
        loss = torch.where(counted, temperature * value.sum(0), 0.0)
        return torch.where(_last_tokens(ids), loss.gather(1, ids.clamp_min(0)), 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_y, ids = ctx.saved_tensors
        rows, most = ids.shape
        # One token per chunk is its last, so nothing is added up here.
        last = torch.where(_last_tokens(ids), ids, most)
        of_loss = of_y.new_zeros(rows, most + 1).scatter_(1, last, gradients[0].to(of_y.dtype))[:, :-1]
        of_tokens = -(of_loss * of_y).gather(1, ids.clamp_min(0))
        return torch.where(ids >= 0, of_tokens, 0.0).to(ctx.dtype), None, None, None, None, None
