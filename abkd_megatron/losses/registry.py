"""Losses by name: built-in ones, and custom ones by dotted path."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping

import torch

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import combination
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, LogitLoss, LossTerm
from abkd_megatron.losses.extra.adaptive import AdaptiveKL
from abkd_megatron.losses.extra.clipped import ClippedKL
from abkd_megatron.losses.extra.correlation import LogitCosine, LogitPearson, Pearson
from abkd_megatron.losses.extra.estimators import K1, K2, K3
from abkd_megatron.losses.extra.preference import Preference
from abkd_megatron.losses.extra.ranking import Ranking
from abkd_megatron.losses.extra.sinkhorn import Sinkhorn
from abkd_megatron.losses.extra.squared_error import LogitMSE
from abkd_megatron.losses.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.losses.total_variation import TotalVariation

DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "alpha_beta": AlphaBeta,
    "todi": ToDi,
    "forward_kl": combination.forward_kl,
    "reverse_kl": combination.reverse_kl,
    "jeffreys": combination.jeffreys,
    "jensen_shannon": JensenShannon,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
    "squared_hellinger": combination.squared_hellinger,
    "pearson_chi_square": combination.pearson_chi_square,
    "neyman_chi_square": combination.neyman_chi_square,
    "squared_l2": combination.squared_l2,
}
ESTIMATORS: dict[str, type[LogitLoss]] = {"k1": K1, "k2": K2, "k3": K3}
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
    **ESTIMATORS,
}
LOSSES: dict[str, Callable[..., LossTerm]] = {**DIVERGENCES, **LOGIT_LOSSES}

# Allowed error of grad_log_q against finite differences of value, relative to the largest of them.
_TOLERANCE = 1e-4


def parameters(name: str) -> tuple[str, ...]:
    """Return the parameter names of a built-in divergence; empty for any other name."""
    return tuple(inspect.signature(DIVERGENCES[name]).parameters) if name in DIVERGENCES else ()


def build(name: str, settings: Mapping[str, object]) -> LossTerm:
    """Build a loss.

    Args:
        name: a key of `LOSSES`, or the dotted path of a subclass of Divergence or LogitLoss (or of a function that
            returns one), such as my_package.module.MyLoss.
        settings: its parameters; those with defaults are optional.

    Raises:
        ConfigError: for an unknown name or parameter, a missing or invalid parameter, or a custom divergence whose
            `grad_log_q` is not the derivative of its `value` (finite differences in fp64).
    """
    made_by = LOSSES.get(name) or _imported(name)
    try:
        inspect.signature(made_by).bind(**settings)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}; it takes {inspect.signature(made_by)}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: expected a subclass of Divergence, got {made_by!r}; name the class") from error
    made = made_by(**settings)
    return made if isinstance(made, LogitLoss) else checked(name, made)


def _imported(path: str) -> Callable[..., object]:
    module, _, attribute = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        near = difflib.get_close_matches(path, LOSSES, n=1, cutoff=0.7)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(
            f"unknown divergence {path!r}; {hint}known: {', '.join(LOSSES)}, or a custom one as "
            "my_package.module.MyDivergence"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path}: expected a divergence there, got: {error}; check PYTHONPATH") from error
    if not callable(found):
        raise ConfigError(f"{path}: expected a subclass of Divergence, got {found!r}; name the class")
    make: Callable[..., object] = found
    return make


def checked(name: str, divergence: object) -> Divergence:
    """Return `divergence` after checking its type and, if it is custom, its gradient.

    Raises:
        ConfigError: if it is not a Divergence, or its `grad_log_q` is not the derivative of its `value`.
    """
    if name in DIVERGENCES and isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, Divergence):
        raise ConfigError(
            f"{name}: expected a Divergence, got {type(divergence).__name__}; derive it from "
            "abkd_megatron.losses.Divergence"
        )
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (2.0 * torch.randn(2, 8, 32, generator=generator, dtype=torch.float64, device="cpu")).log_softmax(
        dim=-1
    )
    grad_log_q, step = divergence.grad_log_q(log_p, log_q, log_p - log_q), 1e-5
    after, before = (divergence.value(log_p, log_q + by, log_p - log_q - by) for by in (step, -step))
    for method, result in (("value", after), ("grad_log_q", grad_log_q)):
        if result.shape != log_q.shape or result.dtype != log_q.dtype:
            raise ConfigError(
                f"{name}: expected {method} to be elementwise, here {list(log_q.shape)} {log_q.dtype}, got "
                f"{list(result.shape)} {result.dtype}; do not sum over the vocabulary"
            )
    wanted = (after - before) / (2.0 * step)
    error = ((grad_log_q - wanted).abs().amax() / wanted.abs().amax()).item()
    if not error <= _TOLERANCE:
        raise ConfigError(
            f"{name}: expected grad_log_q to be the derivative of value with respect to log q at constant log p; "
            f"finite differences differ by {error:.1e} of the largest (allowed: {_TOLERANCE:.0e}); correct one"
        )
    return divergence
