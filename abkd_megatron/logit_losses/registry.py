"""Logit losses by name, beside divergences."""

from collections.abc import Callable, Mapping

from abkd_megatron.divergences import Divergence, registry
from abkd_megatron.logit_losses.adaptive import AdaptiveKL
from abkd_megatron.logit_losses.base import LogitLoss
from abkd_megatron.logit_losses.clipped import ClippedKL
from abkd_megatron.logit_losses.correlation import LogitCosine, LogitPearson, Pearson
from abkd_megatron.logit_losses.preference import Preference
from abkd_megatron.logit_losses.ranking import Ranking
from abkd_megatron.logit_losses.sinkhorn import Sinkhorn
from abkd_megatron.logit_losses.squared_error import LogitMSE

LOGIT_LOSSES: dict[str, Callable[..., LogitLoss]] = {
    "akl": AdaptiveKL,
    "pearson": Pearson,
    "logit_pearson": LogitPearson,
    "logit_cosine": LogitCosine,
    "logit_mse": LogitMSE,
    "clipped_kl": ClippedKL,
    "ranking": Ranking,
    "sinkhorn": Sinkhorn,
    "preference": Preference,
}


def build(name: str, settings: Mapping[str, object]) -> Divergence | LogitLoss:
    """The divergence or logit loss of that name.

    Args:
        name: a key of `LOGIT_LOSSES` or of `divergences.registry.DIVERGENCES`, or the dotted path of a subclass of
            Divergence or LogitLoss (or of what returns one), such as my_package.module.MyLoss.
        settings: its parameters; those with a default may be left out.

    Raises:
        ConfigError: as `divergences.registry.build`.
    """
    made = registry.make(name, settings, {**registry.DIVERGENCES, **LOGIT_LOSSES})
    return made if isinstance(made, LogitLoss) else registry.checked(name, made)
