"""Validation diagnostics: differences between the models and the distribution of the loss's gradient.

Legend: s sequence, b micro-batch, C this rank's real columns, V/TP its columns with padding.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.losses import Divergence, reverse_kl
from abkd_megatron.vocab_parallel.logits import vocab_parallel_divergence
from abkd_megatron.vocab_parallel.shard import VocabShard

NUM_BINS = 15
"""Bins of the expected calibration error (Guo et al., On Calibration of Modern Neural Networks, ICML 2017)."""

_CHUNK = 2**22  # logits per chunk


def gap_name(index: int) -> str:
    """Return the name of a bin's calibration gap in the log."""
    return f"calibration gap {index + 1:02}/{NUM_BINS}"


class _TeacherWeight(Divergence):
    """Sum over the vocabulary of p w, w = sigmoid(log p - log q): mean of ToDi's weight under the teacher."""

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_p.exp() * log_ratio.sigmoid()

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return -log_p.exp() * log_ratio.sigmoid() * (-log_ratio).sigmoid()


class _Weight(Divergence):
    """Sum over the vocabulary of w."""

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_ratio.sigmoid()

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return -log_ratio.sigmoid() * (-log_ratio).sigmoid()


def diagnose(
    student_logits: Tensor,
    teacher_logits: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    accuracy: Tensor,
    confidence: Tensor,
    shard: VocabShard,
) -> dict[str, Tensor]:
    """Compute diagnostics per token, [s, b] fp32 each, by their names in the log.

    - ``reverse kl to teacher``: KL(student || teacher) in nats.
    - ``calibration gap i/15``: accuracy - confidence where the confidence is in ((i - 1)/15, i/15], else 0. The
      expected calibration error is the sum over i of the absolute means.
    - ``todi weight``, ``todi weight of teacher``: ToDi's weight of forward KL at scale 1 (arXiv 2505.16297),
      w = sigmoid(log p - log q), averaged over the vocabulary and over the teacher's distribution. 1/2 where the models
      agree.
    - ``hardness concentration``, ``confidence concentration``: with g the gradient of the trained loss with respect to
      the student's logits, sum |g_k| |p_k - q_k| / sum |g_k| and sum |g_k| q_k / sum |g_k|. For alpha-beta, g_k is
      governed by |p^alpha - q^alpha| and q^beta: a smaller alpha raises the first, a larger beta the second (ABKD,
      arXiv 2505.04560, section 3).

    All at temperature 1, except g, which has the trained loss's.

    Args:
        student_logits: [s, b, V/TP].
        teacher_logits: [s, b, V/TP].
        loss_of: maps student logits to the trained loss [s, b]; differentiable.
        accuracy: [s, b], 1 where the student's most likely token is the label.
        confidence: [s, b], the student's probability of its most likely token.
        shard: columns of the logits.

    Collectives: from three calls of `vocab_parallel_divergence` and one of `loss_of`, and five all-reduces per chunk of
    tokens.

    Memory: a copy of the student's logits, their gradient, and a few fp32 chunks.
    """
    shard.check_width("logits", student_logits.shape[-1])
    with torch.enable_grad():
        leaf = student_logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf.clone()).sum(), leaf)  # a clone, as it may be overwritten
    student, teacher = (logits[..., : shard.num_columns].flatten(0, -2) for logits in (student_logits, teacher_logits))
    push = gradient[..., : shard.num_columns].flatten(0, -2)
    rows = max(1, _CHUNK // max(1, student.shape[-1]))
    chunks = zip(student.split(rows), teacher.split(rows), push.split(rows), strict=True)
    hardness, sureness = torch.cat([_concentrations(*chunk, shard) for chunk in chunks], dim=-1)

    def total(divergence: Divergence) -> Tensor:
        return vocab_parallel_divergence(
            student_logits.detach(), teacher_logits, divergence, tp_group=shard.group, vocab_size=shard.size
        )

    measured = {
        "reverse kl to teacher": total(reverse_kl()),
        "todi weight": total(_Weight()) / shard.size,
        "todi weight of teacher": total(_TeacherWeight()),
        "hardness concentration": hardness.view(accuracy.shape),
        "confidence concentration": sureness.view(accuracy.shape),
    }
    bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    for index in range(NUM_BINS):
        measured[gap_name(index)] = torch.where(bins == index, accuracy - confidence, 0.0)
    return {name: value.float() for name, value in measured.items()}


def calibration_error(report: dict[str, float]) -> float:
    """Compute the expected calibration error from the mean gaps of all bins."""
    return sum(abs(report[gap_name(index)]) for index in range(NUM_BINS))


def _concentrations(student: Tensor, teacher: Tensor, gradient: Tensor, shard: VocabShard) -> Tensor:
    """Return the gradient's concentration by |p - q| and by q, [2, n] from [n, C]; 0 without a gradient."""
    p, q = _probabilities(teacher, shard), _probabilities(student, shard)
    push = gradient.float().abs()
    sums = torch.stack([(push * by).sum(dim=-1, dtype=torch.float64) for by in (torch.ones_like(q), (p - q).abs(), q)])
    if shard.num_ranks > 1:
        dist.all_reduce(sums, group=shard.group)
    return (sums[1:] / sums[0]).nan_to_num(0.0)


def _probabilities(logits: Tensor, shard: VocabShard) -> Tensor:
    logits = logits.float()
    nothing = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    maximum = torch.cat([logits, nothing], dim=-1).amax(dim=-1, keepdim=True)
    if shard.num_ranks > 1:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=shard.group)
    result = (logits - maximum).exp()
    total = result.sum(dim=-1, keepdim=True, dtype=torch.float64)
    if shard.num_ranks > 1:
        dist.all_reduce(total, group=shard.group)
    return result / total.float()
