"""What is computed: divergences between two distributions over the vocabulary, and their specification.

`base` says what a divergence is; `alpha_beta`, `todi`, `mixture` and `total_variation` hold the families at hand,
`combination` their weighted sums and well-known points, `registry` all of them by name. `reference` is the dense fp64
form that every fast path is tested against.
"""

from abkd_megatron.divergences.alpha_beta import AlphaBeta
from abkd_megatron.divergences.base import Divergence
from abkd_megatron.divergences.combination import (
    Sum,
    forward_kl,
    jeffreys,
    neyman_chi_square,
    pearson_chi_square,
    reverse_kl,
    squared_hellinger,
    squared_l2,
)
from abkd_megatron.divergences.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.divergences.reference import (
    reference_alpha_beta,
    reference_cross_entropy,
    reference_divergence,
    reference_jensen_shannon,
    reference_skew_forward_kl,
    reference_skew_reverse_kl,
    reference_todi,
    reference_total_variation,
)
from abkd_megatron.divergences.todi import ToDi
from abkd_megatron.divergences.total_variation import TotalVariation

__all__ = [
    "AlphaBeta",
    "Divergence",
    "JensenShannon",
    "SkewForwardKL",
    "SkewReverseKL",
    "Sum",
    "ToDi",
    "TotalVariation",
    "forward_kl",
    "jeffreys",
    "neyman_chi_square",
    "pearson_chi_square",
    "reference_alpha_beta",
    "reference_cross_entropy",
    "reference_divergence",
    "reference_jensen_shannon",
    "reference_skew_forward_kl",
    "reference_skew_reverse_kl",
    "reference_todi",
    "reference_total_variation",
    "reverse_kl",
    "squared_hellinger",
    "squared_l2",
]
