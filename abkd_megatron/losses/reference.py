"""Specification of every divergence: the papers' formulas, dense, in fp64, differentiated by autograd.

Start here to learn what is computed. The fast and numerically safe implementations are tested against this module.
Logits are [..., V], not sharded; results are [...], fp64, one value per token. `vocab_size` drops padded columns at the
end. A column that is -inf in both models is outside the vocabulary and adds nothing. The teacher is constant. These
forms cancel badly when alpha, beta or their sum is near 0 but not 0; compare with the limit there.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence
from abkd_megatron.losses.combination import WeightedSum
from abkd_megatron.losses.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.losses.total_variation import TotalVariation


class _LogProbabilities(NamedTuple):
    p: Tensor  # teacher, log p, [..., V]
    q: Tensor  # student, log q, [..., V]
    outside: Tensor  # both are -inf


def _log_probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, vocab_size: int | None
) -> _LogProbabilities:
    p = (teacher_logits.detach().double()[..., :vocab_size] / temperature).log_softmax(dim=-1)
    q = (student_logits.double()[..., :vocab_size] / temperature).log_softmax(dim=-1)
    outside = p.isneginf() & q.isneginf()
    return _LogProbabilities(p.masked_fill(outside, 0.0), q.masked_fill(outside, 0.0), outside)


def reference_alpha_beta(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute D^(alpha,beta)(p || q), ABKD Definition 4.1 and Table 1; limits as in Cichocki et al. 2011."""
    a, b = alpha, beta
    log_p, log_q, outside = _log_probabilities(student_logits, teacher_logits, temperature, vocab_size)
    log_ratio = log_p - log_q

    def power(x: float, y: float) -> Tensor:  # p^x q^y
        return torch.exp((x * log_p if x else 0.0) + (y * log_q if y else torch.zeros_like(log_q)))

    if a == 0 and b == 0:  # log-Euclidean
        terms = 0.5 * log_ratio**2
    elif b == 0:  # (1/a^2) sum [p^a log(p^a/q^a) - p^a + q^a]; forward KL at a = 1
        p_a_log = power(a, 0) * a * log_ratio.masked_fill(log_p.isneginf(), 0.0)  # 0 log 0 = 0
        terms = (p_a_log - power(a, 0) + power(0, a)) / a**2
    elif a == 0:  # (1/b^2) sum [q^b log(q^b/p^b) - q^b + p^b]; reverse KL at b = 1
        terms = (-power(0, b) * b * log_ratio - power(0, b) + power(b, 0)) / b**2
    elif a + b == 0:  # (1/a^2) sum [log(q^a/p^a) + (p/q)^a - 1]; Itakura-Saito at a = 1
        terms = (-a * log_ratio + power(a, -a) - 1) / a**2
    else:
        terms = -(power(a, b) - a / (a + b) * power(a + b, 0) - b / (a + b) * power(0, a + b)) / (a * b)
    return terms.masked_fill(outside, 0.0).sum(dim=-1)


def reference_todi(
    student_logits: Tensor,
    teacher_logits: Tensor,
    scale: float = 1.0,
    detach: bool = True,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute sum_k w p log(p/q) + (1 - w) q log(q/p), w = sigmoid(scale log(p/q)), ToDi equations 7, 8 and 10."""
    log_p, log_q, outside = _log_probabilities(student_logits, teacher_logits, temperature, vocab_size)
    log_ratio = log_p - log_q
    w = torch.sigmoid(scale * log_ratio)
    if detach:
        w = w.detach()
    terms = w * log_p.exp() * log_ratio + (1 - w) * log_q.exp() * -log_ratio
    return terms.masked_fill(outside, 0.0).sum(dim=-1)


def _mixed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    of_teacher: float,
    of_student: float,
    share: float,
    temperature: float,
    vocab_size: int | None,
    detach_mixture: bool = False,
) -> Tensor:
    """Compute of_teacher KL(p || M) + of_student KL(q || M), M = share p + (1 - share) q."""
    log_p, log_q, outside = _log_probabilities(student_logits, teacher_logits, temperature, vocab_size)
    log_mixture = torch.logaddexp(log_p + math.log(share), log_q + math.log(1.0 - share))
    if detach_mixture:
        log_mixture = log_mixture.detach()
    terms = torch.zeros_like(log_q)
    for weight, log_x in ((of_teacher, log_p), (of_student, log_q)):
        finite = log_x.masked_fill(log_x.isneginf(), 0.0)  # 0 log 0 = 0
        terms = terms + weight * log_x.exp() * (finite - log_mixture)
    return terms.masked_fill(outside, 0.0).sum(dim=-1)


def reference_jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mixture: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute b KL(p || M) + (1 - b) KL(q || M), M = b p + (1 - b) q, b = mixture; GKD, arXiv 2306.13649."""
    return _mixed_kl(student_logits, teacher_logits, mixture, 1.0 - mixture, mixture, temperature, vocab_size)


def reference_skew_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    skew: float = 0.1,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute KL(p || skew p + (1 - skew) q), DistiLLM, arXiv 2402.03898."""
    return _mixed_kl(student_logits, teacher_logits, 1.0, 0.0, skew, temperature, vocab_size)


def reference_skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    skew: float = 0.1,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    detach_mixture: bool = False,
) -> Tensor:
    """Compute KL(q || (1 - skew) p + skew q), DistiLLM, arXiv 2402.03898; detached as in DistiLLM-2's code."""
    return _mixed_kl(
        student_logits, teacher_logits, 0.0, 1.0, 1.0 - skew, temperature, vocab_size, detach_mixture=detach_mixture
    )


def reference_total_variation(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Tensor:
    """Compute 1/2 sum |p - q|; the derivative of |x| at 0 is 0."""
    log_p, log_q, _ = _log_probabilities(student_logits, teacher_logits, temperature, vocab_size)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def reference_cross_entropy(student_logits: Tensor, labels: Tensor, vocab_size: int | None = None) -> Tensor:
    """Compute -log q(label) at temperature 1."""
    log_q = student_logits.double()[..., :vocab_size].log_softmax(dim=-1)
    return -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def reference_divergence(
    divergence: Divergence,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute `divergence` by its reference implementation.

    Raises:
        ConfigError: if it has none.
    """
    if isinstance(divergence, AlphaBeta):
        return reference_alpha_beta(
            student_logits, teacher_logits, divergence.alpha, divergence.beta, temperature, vocab_size
        )
    if isinstance(divergence, ToDi):
        return reference_todi(
            student_logits, teacher_logits, divergence.scale, divergence.detach, temperature, vocab_size
        )
    logits = (student_logits, teacher_logits)
    if isinstance(divergence, JensenShannon):
        return reference_jensen_shannon(*logits, divergence.mixture, temperature, vocab_size)
    if isinstance(divergence, SkewForwardKL):
        return reference_skew_forward_kl(*logits, divergence.skew, temperature, vocab_size)
    if isinstance(divergence, SkewReverseKL):
        return reference_skew_reverse_kl(*logits, divergence.skew, temperature, vocab_size, divergence.detach_mixture)
    if isinstance(divergence, TotalVariation):
        return reference_total_variation(*logits, temperature, vocab_size)
    if isinstance(divergence, WeightedSum):
        terms = [
            weight * reference_divergence(term, *logits, temperature, vocab_size) for weight, term in divergence.terms
        ]
        return torch.stack(terms).sum(dim=0)
    raise ConfigError(
        "expected a divergence with a reference (one of abkd_megatron.losses), got "
        f"{type(divergence).__name__}: add its dense form to abkd_megatron.losses.reference"
    )


def reference_bucketed_divergence(
    divergence: Divergence,
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_rest: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute `divergence` on K + 1 buckets: the tokens `ids` [..., K], negative ones being padding, and the rest.

    `log_probs` [..., K] and `log_rest` [...] are the teacher's at this temperature. The student's rest is the logsumexp
    of its log-probabilities of all other tokens.

    Raises:
        ConfigError: as `reference_divergence`.
    """
    log_q = (student_logits.double()[..., :vocab_size] / temperature).log_softmax(dim=-1)
    padding = ids < 0
    columns = ids.long().clamp_min(0)
    kept = torch.zeros_like(log_q).scatter_add(-1, columns, (~padding).double()) > 0
    # A sum of exponentials relative to a constant, whose derivative is defined where there is no rest.
    rest = log_q.masked_fill(kept, -math.inf)
    largest = rest.detach().amax(dim=-1, keepdim=True)
    mass = (rest - largest.masked_fill(largest.isneginf(), 0.0)).exp().sum(dim=-1, keepdim=True)
    no_rest = mass == 0.0
    of_rest = (mass.masked_fill(no_rest, 1.0).log() + largest).masked_fill(no_rest, -math.inf)
    of_student = torch.cat([log_q.gather(-1, columns).masked_fill(padding, -math.inf), of_rest], dim=-1)
    of_teacher = torch.cat([log_probs.masked_fill(padding, -math.inf), log_rest.unsqueeze(-1)], dim=-1)
    return reference_divergence(divergence, of_student, of_teacher)
