"""Divergences from a mixture of both models: skew forward and reverse KL, generalized Jensen-Shannon.

With M between p and q every ratio is bounded, so none is infinite where either probability vanishes. Values are sums of
x log(x/M) - x + M. Over the whole vocabulary this equals x log(x/M), but each term is non-negative and of second order,
so nothing cancels where the models agree. None separates, because log M needs both models' normalizers first.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, difference, weigh
from abkd_megatron.validation import finite_number, flag

_FORWARD = AlphaBeta(1.0, 0.0)


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """Forward KL to a mixture of student and teacher.

        D = sum_k p log(p/M),    M = skew p + (1 - skew) q,    0 < skew < 1

    At most log(1/skew). Tends to forward KL as skew -> 0, and to 0 as skew -> 1, as (1 - skew)^2/2 sum (p - q)^2/p.
    Computed as F = p log(p/M) - p + M, h = -(1 - skew)^2 (p - q) q/M.

    Collectives: forward: 2 all-gathers of 4 and 2 fp64 numbers per token. Backward: none.

    Args:
        skew: share of the teacher in the mixture.

    Raises:
        ConfigError: if skew is not a number between 0 and 1, both excluded.

    Source: DistiLLM, ICML 2024, arXiv 2402.03898 (alpha-SKL, also 0.1), and DistiLLM-2, arXiv 2503.07067.
    """

    skew: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "skew", _share("SkewForwardKL", "skew", self.skew, "forward_kl is the limit at 0"))

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return F."""
        return _to_mixture(log_p, log_q, log_ratio, self.skew)

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return h."""
        rest = 1.0 - self.skew
        mixture_over_q = log_ratio.exp().mul_(self.skew).add_(rest)
        return difference(log_p, log_q, log_ratio).mul_(-(rest**2)).div_(mixture_over_q)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """Reverse KL to a mixture of teacher and student.

        D = sum_k q log(q/M),    M = (1 - skew) p + skew q,    0 < skew < 1

    At most log(1/skew). Tends to reverse KL as skew -> 0, and to 0 as skew -> 1, as (1 - skew)^2/2 sum (p - q)^2/q.
    Computed as F = q log(q/M) - q + M, h = q log(q/M) + skew (1 - skew) (p - q) q/M.

    Collectives: forward: 2 all-gathers of 4 and 2 fp64 numbers per token. Backward: none.

    With `detach_mixture` the mixture is constant in the gradient, h = q log(q/M). This is not the value's gradient;
    the difference may be as large as the gradient. Jensen-Shannon is the same with and without. Skew forward KL would
    have no gradient left, because its student occurs in the mixture only.

    Args:
        skew: share of the student in the mixture.
        detach_mixture: treat M as constant in the gradient.

    Raises:
        ConfigError: if skew is not a number between 0 and 1, both excluded, or detach_mixture is not a bool.

    Source: DistiLLM, ICML 2024, arXiv 2402.03898 (alpha-SRKL, also 0.1), differentiated through the mixture.
    DistiLLM-2, ICML 2025, arXiv 2503.07067, has the same value; its released code detaches the mixture.
    """

    skew: float = 0.1
    detach_mixture: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "skew", _share("SkewReverseKL", "skew", self.skew, "reverse_kl is the limit at 0"))
        object.__setattr__(self, "detach_mixture", flag("SkewReverseKL", "detach_mixture", self.detach_mixture))

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return F."""
        return _to_mixture(log_q, log_p, -log_ratio, self.skew)

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return h; with `detach_mixture` only its first term."""
        rest = 1.0 - self.skew
        of_own = weigh(log_q.exp(), _log_mixture(rest, log_ratio))
        if self.detach_mixture:
            return of_own.neg_()
        mixture_over_q = log_ratio.exp().mul_(rest).add_(self.skew)
        of_mixture = difference(log_p, log_q, log_ratio).mul_(self.skew * rest).div_(mixture_over_q)
        return of_mixture.sub_(of_own)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Generalized Jensen-Shannon divergence.

        D = sum_k [ b p log(p/M) + (1 - b) q log(q/M) ],    M = b p + (1 - b) q,    b = mixture, 0 < b < 1

    At most the entropy of (b, 1 - b), which is log 2 at 1/2, where D is symmetric. It vanishes at both ends: D/b ->
    forward KL as b -> 0, D/(1 - b) -> reverse KL as b -> 1. Raise kd_weight accordingly.

        h = (1 - b) q log(q/M)

    Collectives: forward: 2 all-gathers of 4 and 2 fp64 numbers per token. Backward: none.

    Args:
        mixture: b, the share of the teacher in the mixture.

    Raises:
        ConfigError: if mixture is not a number between 0 and 1, both excluded.

    Source: GKD, ICLR 2024, arXiv 2306.13649 (D_JSD(beta)).
    """

    mixture: float = 0.5

    def __post_init__(self) -> None:
        remedy = "use forward_kl or reverse_kl, its scaled limits"
        object.__setattr__(self, "mixture", _share("JensenShannon", "mixture", self.mixture, remedy))

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return F; the terms added to keep it non-negative, b (M - p) + (1 - b) (M - q), cancel."""
        rest = 1.0 - self.mixture
        of_teacher = _to_mixture(log_p, log_q, log_ratio, self.mixture).mul_(self.mixture)
        return of_teacher.add_(_to_mixture(log_q, log_p, -log_ratio, rest), alpha=rest)

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return h."""
        return weigh(log_q.exp(), _log_mixture(self.mixture, log_ratio)).mul_(self.mixture - 1.0)


def _share(owner: str, name: str, number: object, remedy: str) -> float:
    share = finite_number(owner, name, number)
    if not 0.0 < share < 1.0:
        raise ConfigError(f"{owner}: expected {name} between 0 and 1, both excluded, got {share}: {remedy}")
    return share


def _log_mixture(share: float, log_ratio: Tensor) -> Tensor:
    """Return log((share x + (1 - share) y) / y), where log_ratio = log(x/y)."""
    near = log_ratio.expm1().mul_(share).log1p_()
    far = torch.logaddexp(log_ratio + math.log(share), torch.full_like(log_ratio, math.log1p(-share)))
    return torch.where(log_ratio.abs() < 1.0, near, far)


def _to_mixture(log_x: Tensor, log_y: Tensor, log_ratio: Tensor, share: float) -> Tensor:
    """Return x log(x/M) - x + M with M = share x + (1 - share) y, where log_ratio = log(x/y)."""
    log_mixture = torch.logaddexp(log_x + math.log(share), log_y + math.log1p(-share))
    return _FORWARD.value(log_x, log_mixture, -_log_mixture(1.0 - share, -log_ratio))
