"""What is computed: divergences between two distributions over the vocabulary, and their specification.

`base` says what a divergence is, `alpha_beta` and `todi` are the two at hand, `reference` is the dense fp64
form that every fast path is tested against.
"""

from abkd_megatron.divergences.alpha_beta import AlphaBeta
from abkd_megatron.divergences.base import Divergence
from abkd_megatron.divergences.reference import (
    reference_alpha_beta,
    reference_cross_entropy,
    reference_divergence,
    reference_todi,
)
from abkd_megatron.divergences.todi import ToDi

__all__ = [
    "AlphaBeta",
    "Divergence",
    "ToDi",
    "reference_alpha_beta",
    "reference_cross_entropy",
    "reference_divergence",
    "reference_todi",
]
