"""Base classes: `Divergence`, a sum over the vocabulary, and `LogitLoss`, any other function of the logits."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from abkd_megatron.losses.columns import Columns

# Terms of the series of exp(x) - 1 that leave a remainder below half a unit in the last place at |x| = 1.
_EXPM1_TERMS = {torch.float32: 10, torch.float64: 18}


class LossTerm:
    """A loss per token between teacher and student: a `Divergence` or a `LogitLoss`."""


class Divergence(LossTerm, ABC):
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
    def num_partial_sums(self) -> int:
        """How many sums over a shard `partial_sums` gives; 0 if the divergence does not separate."""
        return 0

    @abstractmethod
    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """F, elementwise."""

    @abstractmethod
    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """The grad_log_q h = dF/dlog q with log p held fixed, elementwise."""

    def partial_sums(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """Elementwise terms whose sums over the vocabulary are all that D, and perhaps H, have to know of it.

        Only for a divergence that separates: one round of communication is then enough for D. The arguments are
        those of `value`, but relative to constants of the shard, not to the whole vocabulary. None are needed of
        a divergence that does not separate: its sums wait until the constants of the whole are known.
        """
        return ()

    def shift_max(
        self, sums: tuple[Tensor, ...], log_p: Tensor, log_q: Tensor, log_ratio: Tensor
    ) -> tuple[Tensor, ...]:
        """The sums, relative to other constants.

        `log_p`, `log_q` and `log_ratio` are what to add to the arguments of `partial_sums`; all are fp64.
        """
        raise NotImplementedError(f"{type(self).__name__} does not separate")

    def finalize(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """D and H, of sums relative to the whole vocabulary; the second is None if H takes a second round."""
        raise NotImplementedError(f"{type(self).__name__} does not separate")


class LogitLoss(LossTerm, ABC):
    """A loss per token that is not a sum over the vocabulary of terms of one column each.

    It is called on chunks of tokens, once in forward, without a graph, and once in backward; of tensors [n, C] few
    should live at one time.
    """

    name: ClassVar[str] = ""
    """What it is logged under; the class's own name if empty."""

    @property
    def group_size(self) -> int:
        """Tokens whose losses depend on each other; a chunk is of whole groups, and of one sequence if this is not 1.

        A loss may depend on the student's logits of its own token alone (on the teacher's of all).
        """
        return 1

    @property
    @abstractmethod
    def num_collectives(self) -> int:
        """Collectives forward for each chunk of tokens in a group of several ranks. Backward has none."""

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """The loss of every token.

        Args:
            student: [n, C] fp32 (fp64 for fp64 logits), divided by the temperature; differentiate in it.
            teacher: [n, C] likewise, constant.
            columns: which columns these are, and operations over the whole vocabulary.
            counted: [n] bool; what does not count is replaced by some distribution, and its loss by 0.

        Returns:
            [n] fp64, the same bits on every rank.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            cls.name = cls.__name__


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
