"""What a divergence is to the engine: two elementwise functions of a pair of log-probabilities."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Terms of the series of exp(x) - 1 that leave a remainder below half a unit in the last place at |x| = 1.
_EXPM1_TERMS = {torch.float32: 10, torch.float64: 18}


class Divergence(ABC):
    """A per-token sum over the vocabulary, D = sum_k F(log p_k, log q_k), teacher p, student q.

    With h_k = dF/dlog q_k and H = sum_k h_k, the gradient on the student's logit j at temperature T is

        dD/ds_j = (h_j - q_j H) / T

    so F and h are all the engine has to know. Both methods take tensors of one shape and dtype (fp32 or fp64)
    and return a new one of the same; they must not write to their arguments. No autograd runs through them.

    `log_ratio` is log p - log q. It is handed in because the engine knows it better than the difference of
    the two rounded logarithms does; near convergence that is the whole of the signal. A log-probability may
    be -inf; where both are, the engine discards the result, so NaN is allowed there.
    """

    @property
    def num_sums(self) -> int:
        """How many sums over a shard `sums` gives; 0 if the divergence does not separate."""
        return 0

    @abstractmethod
    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """F, elementwise."""

    @abstractmethod
    def slope(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """The slope h = dF/dlog q with log p held fixed, elementwise."""

    def sums(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """Elementwise terms whose sums over the vocabulary are all that D, and perhaps H, have to know of it.

        Only for a divergence that separates: one round of communication is then enough for D. The arguments are
        those of `value`, but relative to constants of the shard, not to the whole vocabulary. None are needed of
        a divergence that does not separate: its sums wait until the constants of the whole are known.
        """
        return ()

    def rebase(self, sums: tuple[Tensor, ...], log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """The sums, relative to other constants.

        `log_p`, `log_q` and `log_ratio` are what to add to the arguments of `sums`; all are fp64.
        """
        raise NotImplementedError(f"{type(self).__name__} does not separate")

    def from_sums(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """D and H, of sums relative to the whole vocabulary; the second is None if H takes a second round."""
        raise NotImplementedError(f"{type(self).__name__} does not separate")


def weigh(mass: Tensor, amount: Tensor) -> Tensor:
    """Return mass * amount with 0 * inf = 0, the convention of 0 log 0."""
    return (mass * amount).masked_fill_(mass == 0, 0.0)


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 for |x| < 1."""
    if not torch.compiler.is_compiling():
        return x.expm1()
    # torch's own compiler writes exp(x) - 1 on a CPU, which has no digits left where x is small.
    result = torch.zeros_like(x)
    for term in range(_EXPM1_TERMS[x.dtype], 0, -1):
        result = (result + 1.0 / math.factorial(term)) * x
    return result


def difference(log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
    """The difference p - q, with all its digits where the two are near each other."""
    q = log_q.exp()
    return torch.where(log_ratio.abs() < 1.0, expm1(log_ratio).mul_(q), log_p.exp().sub_(q))


def coefficient(number: float, dtype: torch.dtype) -> float:
    """`number`, or 0.0 where it is too small for `dtype`'s arithmetic to tell its effect from its limit's.

    A scalar that the tensor's dtype flushes to 0 would otherwise give 0 * inf and 0 / 0.
    """
    return number if abs(number) >= math.sqrt(torch.finfo(dtype).tiny) else 0.0
