"""Built-in divergences as the terms that the native kernels (cpp, triton) compute."""

from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence
from abkd_megatron.losses.combination import WeightedSum
from abkd_megatron.losses.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.losses.total_variation import TotalVariation

MAX_PARTS = 4
"""Largest number of parts of a weighted sum in Triton; each needs registers for its sums."""

BUILT_IN = (AlphaBeta, ToDi, SkewForwardKL, SkewReverseKL, JensenShannon, TotalVariation)


def weighted_parts(divergence: Divergence) -> tuple[tuple[float, Divergence], ...]:
    """Return the weight and divergence of each part of a (nested) sum, one of `BUILT_IN` each; () for a custom part.

    The order is that of the partial sums.
    """
    if type(divergence) in BUILT_IN:
        return ((1.0, divergence),)
    if type(divergence) is not WeightedSum:
        return ()
    parts = []
    for weight, term in divergence.terms:
        of_term = weighted_parts(term)
        if not of_term:
            return ()
        parts += [(weight * own, part) for own, part in of_term]
    return tuple(parts)
