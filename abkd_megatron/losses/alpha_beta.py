"""Alpha-beta divergence."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import Divergence, coefficient, weigh
from abkd_megatron.validation import finite_number

# Below this |exponent * log_ratio| the divided difference is summed as a series, because the closed form cancels.
SERIES_BELOW = 0.5
# Of alpha and beta, whose sum is compared.
_ROUNDING = 1e-6
# Number of terms for a remainder below half a unit in the last place at SERIES_BELOW.
SERIES_TERMS = {torch.float32: 8, torch.float64: 14}


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """Alpha-beta divergence: forward KL at (1, 0), reverse KL at (0, 1), 4 Hellinger^2 at (0.5, 0.5).

        D = -1/(a b) sum_k [ p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b) ]        a = alpha, b = beta

    A smaller alpha penalizes large errors more. A larger beta puts more weight on tokens of which the student is
    confident.

    Every finite (alpha, beta) is valid. Where alpha, beta or alpha + beta is 0, D is the continuous limit: 0 and 1e-9
    agree to 8 digits. The limits have the factor 1/alpha^2 (beta = 0 or alpha + beta = 0) or 1/beta^2 (alpha = 0). The
    paper's released code has 1/alpha and 1/beta instead. It is therefore discontinuous there, and negative at alpha =
    -beta < 0. The two agree where the remaining parameter is 1, which includes both KL divergences.

    Computed as F = q^lam phi(rho) and h = -q^lam expm1(alpha rho)/alpha, with lam = alpha + beta, rho = log p - log q
    and phi(r) the second divided difference of x -> exp(x r) at the nodes {0, alpha, lam}. The limits are coinciding
    nodes, and no power of a probability is formed. Exact at p = 0 for alpha > 0.

    For alpha < 0 the gradient grows as (q/p)^|alpha| where the teacher's probability is near 0. For beta < 0 it grows
    as q^beta where the student's is. At lam <= 0 the sum over the vocabulary is unbounded. Such sums overflow to inf
    and are not clipped.

    Args:
        alpha: any finite number.
        beta: any finite number.

    Raises:
        ConfigError: if alpha, beta or their sum is not a finite number.

    Source: ABKD, ICML 2025, arXiv 2505.04560, Definition 4.1 and Table 1 (values), Proposition 4.2 (gradient). The
    limits follow Cichocki, Cruces and Amari, Entropy 13 (2011).
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", finite_number("AlphaBeta", "alpha", self.alpha))
        object.__setattr__(self, "beta", finite_number("AlphaBeta", "beta", self.beta))
        if not math.isfinite(self.alpha + self.beta):
            raise ConfigError(f"AlphaBeta: expected a finite alpha + beta, got {self.alpha} + {self.beta}: lower them")

    @property
    def num_partial_sums(self) -> int:
        """3: alpha-beta separates for every (alpha, beta)."""
        return 3

    @property
    def suits_draws(self) -> bool:
        """True for 0 <= beta <= 0.3 and 1 <= alpha + beta <= 1.1, where F is nearly linear in p and in q.

        Elsewhere p^alpha or q^lam is large at tokens that the teacher seldom draws, which then weigh much.
        """
        of_sum = self.alpha + self.beta - 1.0
        return -_ROUNDING <= self.beta <= 0.3 + _ROUNDING and -_ROUNDING <= of_sum <= 0.1 + _ROUNDING

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return F."""
        return self.partial_sums(log_p, log_q, log_ratio)[2]

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return h = -(p^alpha q^beta - q^lam) / alpha."""
        a, b, lam = self._coefficients(log_ratio.dtype)
        at_zero, at_alpha = _exponent(0.0, log_p, lam, log_q), _exponent(a, log_p, b, log_q)
        return _difference(at_zero.exp(), at_alpha, a, log_ratio).neg_()

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Return F and h."""
        _, slope, value = self.partial_sums(log_p, log_q, log_ratio)
        return value, slope

    def partial_sums(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """Return (q^lam, h, F)."""
        a, b, lam = self._coefficients(log_ratio.dtype)
        at_zero = _exponent(0.0, log_p, lam, log_q).exp()
        at_alpha = _exponent(a, log_p, b, log_q)
        rise = _difference(at_zero, at_alpha, a, log_ratio)
        spread = max(abs(a), abs(b), abs(lam))
        if spread == 0.0:
            return at_zero, -rise, log_ratio.square().mul_(0.5)

        at_lam = _exponent(lam, log_p, 0.0, log_q)
        # Dividing by the widest gap between two nodes cancels least.
        if abs(b) == spread:
            far = _difference(at_zero, at_lam, lam, log_ratio).sub_(rise).div_(b)
        elif abs(lam) == spread:
            far = _difference(at_alpha.exp(), at_lam, b, log_ratio).sub_(rise).div_(lam)
        else:
            far = _difference(at_alpha.exp(), at_lam, b, log_ratio)
            far.sub_(_difference(at_zero, at_lam, lam, log_ratio)).div_(a)

        scaled = log_ratio * spread
        near = torch.full_like(scaled, 0.0)
        for term in reversed(series(a / spread, lam / spread, SERIES_TERMS[log_ratio.dtype])):
            near.mul_(scaled).add_(term)
        near.mul_(log_ratio).mul_(log_ratio).mul_(at_zero)
        return at_zero, rise.neg_(), torch.where(scaled.abs_() < SERIES_BELOW, near, far)

    def shift_max(
        self, sums: tuple[Tensor, ...], log_p: Tensor, log_q: Tensor, log_ratio: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply Leibniz' rule to the divided differences of exp(x r) exp(x R): r per column, R the shift."""
        mass, grad_log_q, value = sums
        a, b, lam = self._coefficients(log_ratio.dtype)
        own_mass, own_slope, own_value = self.partial_sums(log_p, log_q, log_ratio)
        at_alpha = _exponent(a, log_p, b, log_q).exp()
        at_lam = _exponent(lam, log_p, 0.0, log_q)
        new_value = weigh(mass, own_value)
        new_value -= weigh(grad_log_q, _difference(at_alpha, at_lam, b, log_ratio))
        new_value += weigh(value, at_lam.exp())
        # All terms are >= 0, so an infinite value stays infinite; the slopes are infinite there and would give NaN.
        new_value = torch.where(value == math.inf, value, new_value)
        new_slope = weigh(grad_log_q, at_alpha) + weigh(mass, own_slope)
        return weigh(mass, own_mass), new_slope, new_value

    def finalize(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return D and H, which are partial sums."""
        return sums[2], sums[1]

    def _coefficients(self, dtype: torch.dtype) -> tuple[float, float, float]:
        return (
            coefficient(self.alpha, dtype),
            coefficient(self.beta, dtype),
            coefficient(self.alpha + self.beta, dtype),
        )


def _exponent(a: float, log_p: Tensor, b: float, log_q: Tensor) -> Tensor:
    """Return a log p + b log q without terms of coefficient 0, which would give 0 * -inf."""
    if a == 0.0:
        return torch.zeros_like(log_q) if b == 0.0 else log_q * b
    return log_p * a if b == 0.0 else torch.add(log_p * a, log_q, alpha=b)


def _difference(start: Tensor, high: Tensor, gap: float, log_ratio: Tensor) -> Tensor:
    """Return (exp(high) - start) / gap, where exp(high) = start * exp(gap * log_ratio); start * log_ratio at gap 0."""
    if gap == 0.0:
        return weigh(start, log_ratio)
    rise = log_ratio * gap
    far = high.exp().sub_(start)
    near = rise.expm1().mul_(start)
    return torch.where(rise.abs_() < 1.0, near, far).div_(gap)


def series(a: float, lam: float, num_terms: int) -> list[float]:
    """Return h_n(a, lam) / (n + 2)!, where h_n = sum_i a^i lam^(n - i) is the complete homogeneous polynomial."""
    terms, h, power, factorial = [], 1.0, 1.0, 2.0
    for n in range(num_terms):
        terms.append(h / factorial)
        power *= a
        h = h * lam + power
        factorial *= n + 3
    return terms
