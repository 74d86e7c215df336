"""Correlation and cosine distances of the models' probabilities or logits."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abkd_megatron.losses.base import LogitLoss, difference
from abkd_megatron.losses.columns import Columns


@dataclass(frozen=True)
class Pearson(LogitLoss):
    """Pearson distance of probabilities, 1 - r: the inter-class term of DIST, arXiv 2205.10536.

        r = sum (p - 1/V)(q - 1/V) / sqrt(sum (p - 1/V)^2 sum (q - 1/V)^2)

    In [0, 2]. DIST's intra-class term, which correlates a column over tokens, is not implemented, nor are its epsilon
    and its factor T^2. Where p or q is uniform up to rounding, r is 0 and there is no gradient. A column that is -inf
    in both models is not counted in V.

    Collectives: forward: 2 per chunk of tokens (5 and 9 floats per token). Backward: none.
    """

    name: ClassVar[str] = "pearson"
    num_collectives = 2

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return 1 - r."""
        pair = columns.pair(student, teacher)
        mean = (1.0 / pair.size).to(student.dtype).unsqueeze(-1)
        p, q, gap = pair.log_p.exp(), pair.log_q.exp(), -difference(*pair[:3])
        of_p, of_q = p - mean, q - mean
        tt, ss, ts, td, dd = columns.softmax_sums(
            student,
            pair,
            [
                (of_p * of_p, None),
                (of_q * of_q, 2.0 * of_q * q),
                (of_p * of_q, of_p * q),
                (of_p * gap, of_p * q),
                (gap * gap, 2.0 * gap * q),
            ],
        )
        least = _rounding(student.dtype) ** 2 / pair.size
        return _distance(tt, ss, ts, td, dd, (tt > least) & (ss > least))


@dataclass(frozen=True)
class LogitPearson(LogitLoss):
    """Pearson distance of logits, 1 - r, with r their correlation over the vocabulary.

    In [0, 2]. Invariant to a shift or positive scale of either model's logits. Columns that are -inf in either model
    are left out. Where either model's logits are equal up to rounding, r is 0 and there is no gradient.

    Collectives: forward: 2 per chunk of tokens (3 and 5 floats per token). Backward: none.
    """

    name: ClassVar[str] = "logit_pearson"
    num_collectives = 2

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return 1 - r."""
        student, teacher, inside = finite(student, teacher)
        # The mean needs no gradient: it would be multiplied by the sum of the centered logits, which is 0.
        count, *totals = columns.sums(inside, student.detach(), teacher)
        s, t = (
            (logits - (total / count).to(logits.dtype).unsqueeze(-1)) * inside
            for logits, total in zip((student, teacher), totals, strict=True)
        )
        gap = s - t
        least_s, least_t = (_rounding(student.dtype) ** 2 * total**2 / count for total in totals)
        tt, ss, ts, td, dd = columns.sums(t * t, s * s, t * s, t * gap, gap * gap)
        return _distance(tt, ss, ts, td, dd, (tt > least_t) & (ss > least_s))


@dataclass(frozen=True)
class LogitCosine(LogitLoss):
    """Cosine distance of logits, 1 - t.s / (|t| |s|).

    In [0, 2]. Unlike probabilities, it changes when a constant is added to all logits. Columns that are -inf in either
    model are left out. Where either model's logits are all 0, the cosine is 0 and there is no gradient.

    Collectives: forward: 1 per chunk of tokens (5 floats per token). Backward: none.
    """

    name: ClassVar[str] = "logit_cosine"
    num_collectives = 1

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return 1 - cosine."""
        s, t, _ = finite(student, teacher)
        gap = s - t
        tt, ss, ts, td, dd = columns.sums(t * t, s * s, t * s, t * gap, gap * gap)
        return _distance(tt, ss, ts, td, dd, (tt > 0) & (ss > 0))


def finite(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both models' logits, 0 where either is -inf, and a mask of the other columns, 1.0 or 0.0."""
    outside = student.isneginf() | teacher.isneginf()
    return student.masked_fill(outside, 0.0), teacher.masked_fill(outside, 0.0), (~outside).to(student.dtype)


def _rounding(dtype: torch.dtype) -> float:
    """Return the relative deviation from a mean that rounding may cause."""
    return 64.0 * torch.finfo(dtype).eps


def _distance(tt: Tensor, ss: Tensor, ts: Tensor, td: Tensor, dd: Tensor, defined: Tensor) -> Tensor:
    """Return 1 - ts / sqrt(tt ss) from sums of products of t, s and d = s - t; 1 where not defined.

    Where t and s are close it uses tt ss - ts^2 = tt dd - td^2, which avoids cancellation. Where one is much shorter
    than the other, that identity loses all digits.
    """
    tt, ss = tt.where(defined, 1.0), ss.where(defined, 1.0)
    norms = tt.sqrt() * ss.sqrt()
    near = defined & (dd < tt) & (dd < ss) & (ts > 0)
    by_difference = (tt * dd - td * td).where(near, 0.0) / (norms * (norms + ts)).where(near, 1.0)
    return torch.where(near, by_difference, 1.0 - (ts / norms).where(defined, 0.0))
