"""Specification of every logit loss: the papers' formulas, dense, in fp64, differentiated by autograd.

Start here to learn what is computed. The vocabulary-parallel implementations are tested against this module. Logits are
[..., V], not sharded ([..., s, V] for Sinkhorn); results are [...], fp64, one value per token. `vocab_size` drops
padded columns at the end. A column that is -inf in both models is outside the vocabulary. The teacher is constant.
"""

import math

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.extra.adaptive import AdaptiveKL
from abkd_megatron.losses.extra.clipped import ClippedKL
from abkd_megatron.losses.extra.correlation import LogitCosine, LogitPearson, Pearson
from abkd_megatron.losses.extra.estimators import K1, K2, K3
from abkd_megatron.losses.extra.preference import Preference
from abkd_megatron.losses.extra.ranking import Ranking
from abkd_megatron.losses.extra.sinkhorn import Sinkhorn
from abkd_megatron.losses.extra.squared_error import LogitMSE


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a log(a/b) over the last dimension, from log-probabilities; 0 log 0 = 0."""
    return (a.exp() * (a - b).masked_fill(a.isneginf(), 0.0)).sum(dim=-1)


def _first_by_probability(p: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row in descending order, ties by lowest id; return values and ids."""
    return torch.sort(p, dim=-1, descending=True, stable=True)


def reference_adaptive_kl(student: Tensor, teacher: Tensor, mu: float = 0.5, crossing: str = "tail") -> Tensor:
    """Compute g_head/(g_head + g_tail) KL(p || q) + g_tail/(g_head + g_tail) KL(q || p), arXiv 2404.02657."""
    log_p, log_q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    descending, ids = _first_by_probability(p)
    mass = descending.cumsum(dim=-1)
    if crossing == "tail":
        in_head = mass <= mu
        in_head[..., 0] = True
    else:
        before = torch.cat([torch.zeros_like(mass[..., :1]), mass[..., :-1]], dim=-1)
        in_head = before < mu
    head = torch.zeros_like(in_head).scatter(-1, ids, in_head)
    gap = (p - q).abs().detach()
    of_head, of_tail = (gap * head).sum(dim=-1), (gap * ~head).sum(dim=-1)
    weight = torch.where(of_head + of_tail > 0, of_head / (of_head + of_tail), 0.5)
    return weight * _kl(log_p, log_q) + (1 - weight) * _kl(log_q, log_p)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return a.b / (|a| |b|); 0 where either norm is 0."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(dim=-1) / norms.where(norms > 0, 1.0), 0.0)


def reference_pearson(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - corr(p, q), DIST, arXiv 2205.10536, its inter-class term."""
    inside = ~(student.isneginf() & teacher.isneginf())
    p, q = teacher.softmax(dim=-1), student.softmax(dim=-1)
    mean = 1 / inside.sum(dim=-1, keepdim=True)
    return 1 - _correlation((p - mean) * inside, (q - mean) * inside)


def reference_logit_pearson(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - corr(t, s)."""
    inside = ~(student.isneginf() | teacher.isneginf())
    s, t = student.where(inside, 0.0), teacher.where(inside, 0.0)
    count = inside.sum(dim=-1, keepdim=True)
    s, t = (logits - logits.sum(dim=-1, keepdim=True) / count for logits in (s, t))
    return 1 - _correlation(s * inside, t * inside)


def reference_logit_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - cos(t, s)."""
    inside = ~(student.isneginf() | teacher.isneginf())
    return 1 - _correlation(student.where(inside, 0.0), teacher.where(inside, 0.0))


def reference_logit_mse(student: Tensor, teacher: Tensor, centered: bool = False) -> Tensor:
    """Compute 1/V sum (s - t)^2; centered, the mean difference is subtracted first."""
    inside = ~(student.isneginf() | teacher.isneginf())
    count = inside.sum(dim=-1)
    gap = student.where(inside, 0.0) - teacher.where(inside, 0.0)
    if centered:
        gap = (gap - (gap.sum(dim=-1) / count).unsqueeze(-1)) * inside
    return (gap**2).sum(dim=-1) / count


def reference_clipped_kl(
    student: Tensor, teacher: Tensor, top_k: int | None = None, mass: float | None = None
) -> Tensor:
    """Compute KL(p' || q'), both renormalized on the teacher's top k or its fewest columns of that mass; DAC-KL."""
    p = teacher.softmax(dim=-1)
    descending, ids = _first_by_probability(p)
    if top_k is not None:
        kept = torch.arange(p.shape[-1], device=p.device).expand_as(p) < top_k
    else:
        assert mass is not None
        kept = descending.cumsum(dim=-1) - descending < mass
    support = torch.zeros_like(kept).scatter(-1, ids, kept & (descending > 0))
    log_p, log_q = (logits.masked_fill(~support, -math.inf).log_softmax(dim=-1) for logits in (teacher, student))
    return _kl(log_p, log_q)


def reference_ranking(
    student: Tensor, teacher: Tensor, top_k: int = 10, teacher_steepness: float = 1.0, student_steepness: float = 1.0
) -> Tensor:
    """Compute 1 - 2/(k(k-1)) sum_{i<j} tanh(k1 (t_i - t_j)) tanh(k2 (s_i - s_j)) over the teacher's top k; RKKD."""
    t, ids = _first_by_probability(teacher)
    t, s = t[..., :top_k], student.gather(-1, ids[..., :top_k])
    total, pairs = torch.zeros_like(s[..., 0]), torch.zeros_like(s[..., 0])
    for i in range(s.shape[-1]):
        for j in range(i):
            gaps = t[..., i] - t[..., j], s[..., i] - s[..., j]
            there = gaps[0].isfinite() & gaps[1].isfinite()
            of_t, of_s = (gap.where(there, 0.0) for gap in gaps)
            total = total + torch.tanh(teacher_steepness * of_t) * torch.tanh(student_steepness * of_s)
            pairs = pairs + there
    return 1 - total / pairs.clamp_min(1)


def reference_sinkhorn(
    student: Tensor,
    teacher: Tensor,
    group: int = 32,
    epsilon: float = 0.1,
    iterations: int = 20,
    counted: Tensor | None = None,
) -> Tensor:
    """Compute sum_i P_ij W_ij for token j, SinKD, arXiv 2402.17110; one problem per group of a sequence."""
    p, q = teacher.softmax(dim=-1), student.softmax(dim=-1)
    tokens = p.shape[:-1]
    shape = (tokens[:-1].numel(), tokens[-1])
    if counted is None:
        counted = torch.ones(tokens, dtype=torch.bool, device=p.device)
    p, q = p.reshape(*shape, p.shape[-1]), q.reshape(*shape, q.shape[-1])
    result = torch.zeros(p.shape[:-1], dtype=torch.float64, device=p.device)
    for row, of_row in enumerate(counted.reshape(shape)):
        for first in range(0, tokens[-1], group):
            index = first + of_row[first : first + group].nonzero()[:, 0]
            costs = torch.stack([(q[row, index] - p[row, i]).abs().sum(dim=-1) for i in index]) if len(index) else None
            if costs is None:
                continue
            plan = torch.exp(-costs.detach() / epsilon)
            for _ in range(iterations):
                plan = plan / plan.sum(dim=1, keepdim=True)
                plan = plan / plan.sum(dim=0, keepdim=True)
            result[row, index] = (plan * costs).sum(dim=0)
    return result.reshape(tokens)


def reference_preference(student: Tensor, teacher: Tensor, beta: float = 0.1) -> Tensor:
    """Compute -log sigmoid(beta ([log q(y_t) - log q(y_s)] - [log p(y_t) - log p(y_s)])), DPKD, arXiv 2406.19774."""
    log_p, log_q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    y_t, y_s = (_first_by_probability(logits)[1][..., :1] for logits in (teacher, student))
    of_q, of_p = (log.gather(-1, y_t) - log.gather(-1, y_s) for log in (log_q, log_p))
    return -torch.log(torch.sigmoid(beta * (of_q - of_p))).squeeze(-1)


def reference_estimate(student: Tensor, teacher: Tensor, drawn: Tensor, name: str) -> Tensor:
    """Compute k1, k2 or k3 of reverse KL at the tokens that the student drew; Schulman, 2020."""
    log_p, log_q = (
        logits.log_softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1) for logits in (teacher, student)
    )
    ratio = (log_p - log_q).masked_fill(log_p.isneginf() & log_q.isneginf(), 0.0)
    return {"k1": -ratio, "k2": ratio**2 / 2, "k3": ratio.exp() - 1 - ratio}[name]


def reference_logit_loss(
    loss: LogitLoss,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    counted: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """Compute `loss` by its reference implementation; 0 for tokens that are not counted.

    Raises:
        ConfigError: if it has none.
    """
    student = student_logits.double()[..., :vocab_size] / temperature
    teacher = teacher_logits.detach().double()[..., :vocab_size] / temperature
    if isinstance(loss, AdaptiveKL):
        result = reference_adaptive_kl(student, teacher, loss.mu, loss.crossing)
    elif isinstance(loss, Pearson):
        result = reference_pearson(student, teacher)
    elif isinstance(loss, LogitPearson):
        result = reference_logit_pearson(student, teacher)
    elif isinstance(loss, LogitCosine):
        result = reference_logit_cosine(student, teacher)
    elif isinstance(loss, LogitMSE):
        result = reference_logit_mse(student, teacher, loss.centered)
    elif isinstance(loss, ClippedKL):
        result = reference_clipped_kl(student, teacher, loss.top_k, loss.mass)
    elif isinstance(loss, Ranking):
        result = reference_ranking(student, teacher, loss.top_k, loss.teacher_steepness, loss.student_steepness)
    elif isinstance(loss, Sinkhorn):
        result = reference_sinkhorn(student, teacher, loss.group, loss.epsilon, loss.iterations, counted)
    elif isinstance(loss, Preference):
        result = reference_preference(student, teacher, loss.beta)
    elif isinstance(loss, K1 | K2 | K3):
        assert drawn is not None
        result = reference_estimate(student, teacher, drawn, loss.name)
    else:
        raise ConfigError(
            "expected a loss with a reference (one of abkd_megatron.losses), got "
            f"{type(loss).__name__}: add its dense form to abkd_megatron.losses.extra.reference"
        )
    return result if counted is None else result.where(counted, 0.0)
