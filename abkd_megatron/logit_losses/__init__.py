"""What is computed where a loss is no sum over the vocabulary of terms of one column each.

`base` says what a logit loss is, and what it is given to look beyond its own columns with. The families at hand have a
file each, `registry` has all of them by name. `reference` is the dense fp64 form that every one is tested against.
"""

from abkd_megatron.logit_losses.adaptive import AdaptiveKL
from abkd_megatron.logit_losses.base import Columns, LogitLoss, Pair
from abkd_megatron.logit_losses.clipped import ClippedKL
from abkd_megatron.logit_losses.correlation import LogitCosine, LogitPearson, Pearson
from abkd_megatron.logit_losses.preference import Preference
from abkd_megatron.logit_losses.ranking import Ranking
from abkd_megatron.logit_losses.reference import reference_logit_loss
from abkd_megatron.logit_losses.sinkhorn import Sinkhorn
from abkd_megatron.logit_losses.squared_error import LogitMSE

__all__ = [
    "AdaptiveKL",
    "ClippedKL",
    "Columns",
    "LogitCosine",
    "LogitLoss",
    "LogitMSE",
    "LogitPearson",
    "Pair",
    "Pearson",
    "Preference",
    "Ranking",
    "Sinkhorn",
    "reference_logit_loss",
]
