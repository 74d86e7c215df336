"""Base classes: `Divergence`, a sum over the vocabulary, and `LogitLoss`, any other function of the logits."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from abkd_megatron.losses.columns import Columns


class LossTerm:
    """Base class of per-token losses between teacher and student: `Divergence` and `LogitLoss`."""


class Divergence(LossTerm, ABC):
    """Per-token sum over the vocabulary, D = sum_k F(log p_k, log q_k), with teacher p and student q.

    With h_k = dF/dlog q_k and H = sum_k h_k, the gradient of the student's logit j at temperature T is

        dD/ds_j = (h_j - q_j H) / T

    so a subclass supplies only F and h. Both methods take tensors of one shape and dtype (fp32 or fp64), return a new
    one of that shape and dtype, and must not modify their arguments. They run without autograd.

    `log_ratio` is log p - log q. It is passed separately because it has more digits than the difference of the two
    rounded logarithms, which matters near convergence. A log-probability may be -inf. Where both are, the result is
    discarded and may be NaN.
    """

    @property
    def num_partial_sums(self) -> int:
        """Number of sums per shard that `partial_sums` returns; 0 if the divergence does not separate."""
        return 0

    @property
    def suits_draws(self) -> bool:
        """Whether sums over tokens drawn from the teacher's tail estimate D well, see `vocab_parallel.records`."""
        return False

    @abstractmethod
    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return F, elementwise."""

    @abstractmethod
    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return h = dF/dlog q at constant log p, elementwise."""

    def value_and_grad(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Return F and h, elementwise; a subclass may compute them together."""
        return self.value(log_p, log_q, log_ratio), self.grad_log_q(log_p, log_q, log_ratio)

    def partial_sums(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """Return the elementwise terms whose sums over the vocabulary determine D, and possibly H.

        Only for divergences that separate, which need a single collective for D. The arguments are as for `value`, but
        relative to the shard's normalizers. Other divergences return (), and are summed with the global normalizers.
        """
        return ()

    def shift_max(
        self, sums: tuple[Tensor, ...], log_p: Tensor, log_q: Tensor, log_ratio: Tensor
    ) -> tuple[Tensor, ...]:
        """Convert the sums to other normalizers.

        `log_p`, `log_q` and `log_ratio` are the shifts of the arguments of `partial_sums`; all tensors are fp64.
        """
        raise NotImplementedError(f"{type(self).__name__} does not separate")

    def finalize(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Return D and H from sums over the whole vocabulary; H is None if it needs a second collective."""
        raise NotImplementedError(f"{type(self).__name__} does not separate")


class LogitLoss(LossTerm, ABC):
    """Per-token loss that is not a sum over the vocabulary of per-column terms.

    It is called on chunks of tokens, once in forward without a graph and once in backward. To save memory, keep few
    tensors [n, C] alive at a time.
    """

    name: ClassVar[str] = ""
    """Name in the log; defaults to the class name."""
    estimates: ClassVar[Divergence | None] = None
    """The divergence that the loss estimates from `columns.drawn`, tokens that the student drew. On text that it did
    not draw, such as validation's, this divergence takes the loss's place. None: the loss needs no draws."""

    @property
    def group_size(self) -> int:
        """Number of consecutive tokens whose losses depend on each other.

        A chunk has whole groups; if this is not 1, it is within one sequence. A token's loss may depend on the
        teacher's logits of the whole group, but only on the student's logits of that token.
        """
        return 1

    @property
    @abstractmethod
    def num_collectives(self) -> int:
        """Number of collectives per chunk of tokens in forward, with several ranks. Backward has none."""

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return the loss per token.

        Args:
            student: [n, C] fp32 (fp64 for fp64 logits), divided by the temperature; differentiable.
            teacher: [n, C], same dtype and scaling; constant.
            columns: this rank's columns and operations over the whole vocabulary.
            counted: [n] bool. Tokens that are not counted have arbitrary valid logits; their loss is set to 0.

        Returns:
            [n] fp64, bitwise identical on all ranks.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("name"):
            cls.name = cls.__name__


def weigh(mass: Tensor, amount: Tensor) -> Tensor:
    """Return mass * amount with 0 * inf = 0, the convention of 0 log 0."""
    return (mass * amount).masked_fill_(mass == 0, 0.0)


def difference(log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return p - q without cancellation where the two are close."""
    q = log_q.exp()
    return torch.where(log_ratio.abs() < 1.0, log_ratio.expm1().mul_(q), log_p.exp().sub_(q))


def coefficient(number: float, dtype: torch.dtype) -> float:
    """Return `number`, or 0.0 where `dtype` cannot distinguish its effect from the limit at 0.

    A scalar that flushes to 0 in the tensor's dtype would otherwise give 0 * inf or 0 / 0.
    """
    return number if abs(number) >= math.sqrt(torch.finfo(dtype).tiny) else 0.0
