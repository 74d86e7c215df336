"""Weighted sums of divergences, and named divergences that are special cases of other families."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.validation import finite_number


@dataclass(frozen=True)
class WeightedSum(Divergence):
    """Weighted sum of divergences, computed in one pass over the logits.

        D = sum_i weight_i D_i,    h = sum_i weight_i h_i

    Collectives: forward: 1 all-gather of 4 fp64 numbers per token and each term's partial sums if every term separates;
    otherwise a second one of 2. Backward: none.

    Args:
        terms: pairs of a weight and a divergence, for example [(1.0, AlphaBeta(1, 0)), (0.5, JensenShannon())].

    Raises:
        ConfigError: if terms is empty, a weight is not a finite number above 0, or a term is not a Divergence.
    """

    terms: Sequence[tuple[float, Divergence]]

    def __post_init__(self) -> None:
        terms = tuple((finite_number("WeightedSum", "weight", weight), term) for weight, term in self.terms)
        if not terms:
            raise ConfigError(
                "WeightedSum: expected at least one term, got none: give pairs of a weight and a divergence"
            )
        for weight, term in terms:
            if weight <= 0.0:
                raise ConfigError(
                    f"WeightedSum: expected a weight above 0, got {weight} of {term}: remove terms of weight 0"
                )
            if not isinstance(term, Divergence):
                raise ConfigError(
                    f"WeightedSum: expected a Divergence, got {term!r}: build one, such as AlphaBeta(0.2, 0.7)"
                )
        object.__setattr__(self, "terms", terms)

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return the sum of weight_i F_i."""
        return self._weighted([term.value(log_p, log_q, log_ratio) for _, term in self.terms])

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return the sum of weight_i h_i."""
        return self._weighted([term.grad_log_q(log_p, log_q, log_ratio) for _, term in self.terms])

    @property
    def num_partial_sums(self) -> int:
        """Total over the terms; 0 if any term does not separate."""
        counts = [term.num_partial_sums for _, term in self.terms]
        return sum(counts) if all(counts) else 0

    def partial_sums(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """Return the partial sums of all terms, concatenated."""
        if self.num_partial_sums == 0:
            return ()
        return tuple(one for _, term in self.terms for one in term.partial_sums(log_p, log_q, log_ratio))

    def shift_max(
        self, sums: tuple[Tensor, ...], log_p: Tensor, log_q: Tensor, log_ratio: Tensor
    ) -> tuple[Tensor, ...]:
        """Shift each term's sums."""
        return tuple(one for term, own in self._split(sums) for one in term.shift_max(own, log_p, log_q, log_ratio))

    def finalize(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Return the weighted sums of D and H; H is None if any term needs a second collective for it."""
        values, slopes = zip(*(term.finalize(own) for term, own in self._split(sums)), strict=True)
        return self._weighted(values), None if None in slopes else self._weighted(slopes)

    @property
    def suits_draws(self) -> bool:
        """True if all terms do."""
        return all(term.suits_draws for _, term in self.terms)

    def _split(self, sums: tuple[Tensor, ...]) -> list[tuple[Divergence, tuple[Tensor, ...]]]:
        parts, first = [], 0
        for _, term in self.terms:
            parts.append((term, sums[first : first + term.num_partial_sums]))
            first += term.num_partial_sums
        return parts

    def _weighted(self, amounts: Sequence[Tensor]) -> Tensor:
        total = amounts[0] * self.terms[0][0]
        for (weight, _), amount in zip(self.terms[1:], amounts[1:], strict=True):
            total.add_(amount, alpha=weight)
        return total


# Near p = q every alpha-beta divergence is 1/2 sum q^(alpha + beta) log(p/q)^2. Some usual definitions differ by a
# factor, given below as a weight.


def forward_kl() -> AlphaBeta:
    """Build forward KL: KL(p || q) = sum p log(p/q), alpha-beta at (1, 0)."""
    return AlphaBeta(1.0, 0.0)


def reverse_kl() -> AlphaBeta:
    """Build reverse KL: KL(q || p) = sum q log(q/p), alpha-beta at (0, 1)."""
    return AlphaBeta(0.0, 1.0)


def jeffreys() -> ToDi:
    """Build Jeffreys' divergence: KL(p || q) + KL(q || p) = sum (p - q) log(p/q), ToDi at scale 1 without `detach`.

    There w = p/(p + q), so F and h = q - p - q log(p/q) are the sums of both KL divergences. For custom weights use
    WeightedSum([(a, forward_kl()), (b, reverse_kl())]), which also separates.
    """
    return ToDi(1.0, detach=False)


def squared_hellinger() -> WeightedSum:
    """Build squared Hellinger distance: 1/2 sum (sqrt p - sqrt q)^2 <= 1, 1/4 of alpha-beta at (1/2, 1/2)."""
    return WeightedSum(((0.25, AlphaBeta(0.5, 0.5)),))


def pearson_chi_square() -> WeightedSum:
    """Build Pearson's chi-square: sum (p - q)^2/q, twice alpha-beta at (2, -1). Infinite where q = 0 < p."""
    return WeightedSum(((2.0, AlphaBeta(2.0, -1.0)),))


def neyman_chi_square() -> WeightedSum:
    """Build Neyman's chi-square: sum (p - q)^2/p, twice alpha-beta at (-1, 2). Infinite where p = 0 < q."""
    return WeightedSum(((2.0, AlphaBeta(-1.0, 2.0)),))


def squared_l2() -> WeightedSum:
    """Build the squared L2 distance of probabilities: sum (p - q)^2, twice alpha-beta at (1, 1)."""
    return WeightedSum(((2.0, AlphaBeta(1.0, 1.0)),))
