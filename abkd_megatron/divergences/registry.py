"""Divergences by name: those at hand, and anyone's own by its dotted path."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping

import torch

from abkd_megatron.divergences import combination
from abkd_megatron.divergences.alpha_beta import AlphaBeta
from abkd_megatron.divergences.base import Divergence
from abkd_megatron.divergences.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.divergences.todi import ToDi
from abkd_megatron.divergences.total_variation import TotalVariation
from abkd_megatron.errors import ConfigError

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

# How far the slope may be from the differences of the value, relative to the largest of them.
_TOLERANCE = 1e-4


def parameters(name: str) -> tuple[str, ...]:
    """The names of the parameters that a divergence at hand takes; none for any other name."""
    return tuple(inspect.signature(DIVERGENCES[name]).parameters) if name in DIVERGENCES else ()


def build(name: str, settings: Mapping[str, object]) -> Divergence:
    """The divergence of that name.

    Args:
        name: a key of `DIVERGENCES`, or the dotted path of a subclass of Divergence (or of what returns one), such as
            my_package.module.MyDivergence.
        settings: its parameters; those with a default may be left out.

    Raises:
        ConfigError: for a name or parameter that is unknown, a parameter that is missing or refused, and a divergence
            of a dotted path whose `slope` is not the derivative of its `value`, found by finite differences in fp64.
    """
    return checked(name, make(name, settings, DIVERGENCES))


def make(name: str, settings: Mapping[str, object], known: Mapping[str, Callable[..., object]]) -> object:
    """What that name stands for, a key of `known` or a dotted path, made with these settings and not looked at yet.

    Raises:
        ConfigError: for a name or parameter that is unknown, a parameter that is missing or refused.
    """
    made_by = known.get(name) or _imported(name, known)
    try:
        inspect.signature(made_by).bind(**settings)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}; it takes {inspect.signature(made_by)}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: expected a subclass of Divergence, got {made_by!r}; name the class") from error
    return made_by(**settings)


def _imported(path: str, known: Mapping[str, Callable[..., object]]) -> Callable[..., object]:
    module, _, attribute = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(
            f"unknown divergence {path!r}; {hint}known: {', '.join(known)}, or your own as "
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
    """`divergence`; of one's own, the two functions that it consists of belong together.

    Raises:
        ConfigError: if it is no Divergence, or its `slope` is not the derivative of its `value`.
    """
    if name in DIVERGENCES and isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, Divergence):
        raise ConfigError(
            f"{name}: expected a Divergence, got {type(divergence).__name__}; derive it from "
            "abkd_megatron.divergences.Divergence"
        )
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (2.0 * torch.randn(2, 8, 32, generator=generator, dtype=torch.float64, device="cpu")).log_softmax(
        dim=-1
    )
    slope, step = divergence.slope(log_p, log_q, log_p - log_q), 1e-5
    after, before = (divergence.value(log_p, log_q + by, log_p - log_q - by) for by in (step, -step))
    for method, result in (("value", after), ("slope", slope)):
        if result.shape != log_q.shape or result.dtype != log_q.dtype:
            raise ConfigError(
                f"{name}: expected {method} to be elementwise, {list(log_q.shape)} {log_q.dtype} here, got "
                f"{list(result.shape)} {result.dtype}; the engine takes the sum over the vocabulary"
            )
    wanted = (after - before) / (2.0 * step)
    error = ((slope - wanted).abs().amax() / wanted.abs().amax()).item()
    if not error <= _TOLERANCE:
        raise ConfigError(
            f"{name}: expected slope to be the derivative of value with respect to log q, log p held fixed; finite "
            f"differences are off by {error:.1e} of the largest (allowed: {_TOLERANCE:.0e}); correct one of the two"
        )
    return divergence
