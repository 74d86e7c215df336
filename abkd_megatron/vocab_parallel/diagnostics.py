"""What a validation measures beside the training's own metrics: how the models differ and where the loss pushes.

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

_CHUNK = 2**22  # logits that are looked at together


def gap_name(index: int) -> str:
    """What the calibration gap of a bin is reported under; the absolute values of all add up to the error."""
    return f"calibration gap {index + 1:02}/{NUM_BINS}"


class _TeacherWeight(Divergence):
    """The sum over the vocabulary of p w, w = sigmoid(log p - log q): ToDi's weight where the teacher looks."""

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return log_p.exp() * log_ratio.sigmoid()

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return -log_p.exp() * log_ratio.sigmoid() * (-log_ratio).sigmoid()


class _Weight(Divergence):
    """The sum over the vocabulary of w."""

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
    """Diagnostics of every token, [s, b] fp32 each, by the name they are reported under.

    - ``reverse kl to teacher``: KL(student || teacher) in nats.
    - ``calibration gap i/15``: accuracy - confidence where the confidence lies in ((i - 1)/15, i/15], else 0. The
      expected calibration error is the sum over i of the absolute means.
    - ``todi weight``, ``todi weight of teacher``: w = sigmoid(log p - log q), ToDi's weight of forward KL at scale 1
      (arXiv 2505.16297), as a mean over the vocabulary and over the teacher's distribution. 1/2 where the models
      agree.
    - ``hardness concentration``, ``confidence concentration``: of the push |g_k| that the trained loss has on the
      student's logits, g its gradient, what lies where the models differ, sum |g_k| |p_k - q_k| / sum |g_k|, and what
      lies where the student is sure, sum |g_k| q_k / sum |g_k|. Of alpha-beta g_k follows |p^alpha - q^alpha| and
      q^beta: a smaller alpha raises the first, a larger beta the second, says ABKD (arXiv 2505.04560, section 3).

    All at temperature 1 but g, which is the trained loss's.

    Args:
        student_logits: [s, b, V/TP].
        teacher_logits: [s, b, V/TP].
        loss_of: the trained loss [s, b] of student logits, differentiable.
        accuracy: [s, b], 1 where the student's likeliest token is the label.
        confidence: [s, b], the probability it gives it.
        shard: which columns these are.

    Collectives: those of `vocab_parallel_divergence` three times, those of `loss_of`, and five all-reduces a chunk of
    tokens.

    Memory: the student's logits once more and their gradient, and a few chunks in fp32.
    """
    shard.check_width("logits", student_logits.shape[-1])
    with torch.enable_grad():
        leaf = student_logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf.clone()).sum(), leaf)  # which may be overwritten
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
    """The expected calibration error, from the mean gaps of all bins."""
    return sum(abs(report[gap_name(index)]) for index in range(NUM_BINS))


def _concentrations(student: Tensor, teacher: Tensor, gradient: Tensor, shard: VocabShard) -> Tensor:
    """[2, n] of [n, C]: where the gradient is, weighed by |p - q| and by q; 0 where there is none."""
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
