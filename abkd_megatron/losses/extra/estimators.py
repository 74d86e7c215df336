"""Estimators of reverse KL from one token that the student drew."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns


def log_ratio_of_drawn(student: Tensor, teacher: Tensor, columns: Columns) -> Tensor:
    """Return log p(y) - log q(y) of the drawn tokens y, [n] fp64; differentiable in `student`.

    A token outside the vocabulary has 0. Collectives: 2, of 5 and 2 floats per token.
    """
    assert columns.drawn is not None
    pair = columns.pair(student, teacher)
    hit = columns.ids == columns.drawn.unsqueeze(-1)
    slope = -hit.to(pair.log_q.dtype)
    (ratio,) = columns.softmax_sums(student, pair, [(pair.log_ratio.masked_fill(~hit, 0.0), slope)])
    return ratio


@dataclass(frozen=True)
class K1(LogitLoss):
    """log q(y) - log p(y), with y drawn from q: k1 of Schulman, "Approximating KL divergence" (2020).

    Its mean is KL(q || p). The mean of its gradient is 0, because sum_y q(y) d log q(y) = 0. So it is for the log: as a
    loss it adds noise. As a reward, -k1, its policy gradient is the gradient of `K2`.

    Collectives: forward: 2 per chunk of tokens (7 floats per token). Backward: none.
    """

    name: ClassVar[str] = "k1"
    num_collectives = 2
    estimates = AlphaBeta(0.0, 1.0)

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return log q(y) - log p(y)."""
        return -log_ratio_of_drawn(student, teacher, columns)


@dataclass(frozen=True)
class K2(LogitLoss):
    """(log p(y) - log q(y))^2 / 2, with y drawn from q: k2 of Schulman, "Approximating KL divergence" (2020).

    The mean of its gradient is the gradient of KL(q || p). Its own mean is not KL(q || p), but agrees with it to second
    order in log p - log q.

    Collectives: forward: 2 per chunk of tokens (7 floats per token). Backward: none.
    """

    name: ClassVar[str] = "k2"
    num_collectives = 2
    estimates = AlphaBeta(0.0, 1.0)

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return half the square of the log-ratio."""
        ratio = log_ratio_of_drawn(student, teacher, columns)
        return 0.5 * ratio * ratio


@dataclass(frozen=True)
class K3(LogitLoss):
    """p(y)/q(y) - 1 - log(p(y)/q(y)), with y drawn from q: k3 of Schulman, "Approximating KL divergence" (2020).

    Its mean is KL(q || p); it is never negative. The mean of its gradient is that of forward KL, KL(p || q), because
    sum_y q(y) d(p(y)/q(y)) = -sum_y p(y) d log q(y). GRPO uses it (Shao et al., 2024, arXiv:2402.03300, equation 4).

    Collectives: forward: 2 per chunk of tokens (7 floats per token). Backward: none.
    """

    name: ClassVar[str] = "k3"
    num_collectives = 2
    estimates = AlphaBeta(0.0, 1.0)

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return expm1 of the log-ratio minus the log-ratio."""
        ratio = log_ratio_of_drawn(student, teacher, columns)
        return torch.expm1(ratio) - ratio
