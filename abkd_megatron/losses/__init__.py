"""Losses between a teacher's and a student's next-token distributions, and the objective that combines them.

Every loss is a `LossTerm`. A `Divergence` is a sum over the vocabulary of a function of p_k and q_k; the fast paths are
written for it. A `LogitLoss` is any other function of both models' logits. `registry` builds both by name. `reference`
and `extra.reference` have the dense fp64 forms that the fast paths are tested against.
"""

from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, LogitLoss, LossTerm
from abkd_megatron.losses.columns import Columns, Pair
from abkd_megatron.losses.combination import (
    WeightedSum,
    forward_kl,
    jeffreys,
    neyman_chi_square,
    pearson_chi_square,
    reverse_kl,
    squared_hellinger,
    squared_l2,
)
from abkd_megatron.losses.extra.adaptive import AdaptiveKL
from abkd_megatron.losses.extra.clipped import ClippedKL
from abkd_megatron.losses.extra.correlation import LogitCosine, LogitPearson, Pearson
from abkd_megatron.losses.extra.estimators import K1, K2, K3
from abkd_megatron.losses.extra.preference import Preference
from abkd_megatron.losses.extra.ranking import Ranking
from abkd_megatron.losses.extra.reference import reference_logit_loss
from abkd_megatron.losses.extra.sinkhorn import Sinkhorn
from abkd_megatron.losses.extra.squared_error import LogitMSE
from abkd_megatron.losses.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.losses.reference import (
    reference_alpha_beta,
    reference_bucketed_divergence,
    reference_cross_entropy,
    reference_divergence,
    reference_jensen_shannon,
    reference_skew_forward_kl,
    reference_skew_reverse_kl,
    reference_todi,
    reference_total_variation,
)
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.losses.total_variation import TotalVariation

__all__ = [
    "K1",
    "K2",
    "K3",
    "AdaptiveKL",
    "AlphaBeta",
    "ClippedKL",
    "Columns",
    "Divergence",
    "JensenShannon",
    "LogitCosine",
    "LogitLoss",
    "LogitMSE",
    "LogitPearson",
    "LossTerm",
    "Pair",
    "Pearson",
    "Preference",
    "Ranking",
    "Sinkhorn",
    "SkewForwardKL",
    "SkewReverseKL",
    "ToDi",
    "TotalVariation",
    "WeightedSum",
    "forward_kl",
    "jeffreys",
    "neyman_chi_square",
    "pearson_chi_square",
    "reference_alpha_beta",
    "reference_bucketed_divergence",
    "reference_cross_entropy",
    "reference_divergence",
    "reference_jensen_shannon",
    "reference_logit_loss",
    "reference_skew_forward_kl",
    "reference_skew_reverse_kl",
    "reference_todi",
    "reference_total_variation",
    "reverse_kl",
    "squared_hellinger",
    "squared_l2",
]
