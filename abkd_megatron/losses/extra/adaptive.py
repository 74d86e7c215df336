"""Adaptive KL: forward and reverse KL, weighed by where in the vocabulary the models differ."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import AlphaBeta
from abkd_megatron.losses.base import LogitLoss, difference
from abkd_megatron.losses.columns import Columns
from abkd_megatron.validation import share_of_mass

_FORWARD, _REVERSE = AlphaBeta(1.0, 0.0), AlphaBeta(0.0, 1.0)


@dataclass(frozen=True)
class AdaptiveKL(LogitLoss):
    """AKL of Wu et al., arXiv 2404.02657: forward KL where the models differ in the head, reverse KL in the tail.

        g_head/(g_head + g_tail) KL(p || q) + g_tail/(g_head + g_tail) KL(q || p),    g = sum |p - q| over the part

    The head are the teacher's largest probabilities up to a mass of mu. Both weights are constants in the gradient.
    Where the models are equal to a digit both are 1/2. Of equal probabilities at the boundary those with the lowest
    global ids come into the head first (the released codes leave that to their sorts). Infinite where the teacher
    alone is -inf, as reverse KL is.

    Collectives: forward: 7 for each chunk of tokens (the log-partitions, 5 floats per token; the head, 4 of 256 and one
    of 4; the sums, 6), 11 for fp64 logits. Backward: none.

    Args:
        mu: mass of the head, between 0 and 1.
        crossing: ``tail``: the token whose cumulative mass crosses mu is in the tail, but the likeliest one is always
            in the head, as in the authors' and ABKD's code. ``head``: it is in the head, as in ToDi's and DSKD's.

    Raises:
        ConfigError: for a mu that is not between 0 and 1, and another word for crossing.
    """

    mu: float = 0.5
    crossing: str = "tail"
    name: ClassVar[str] = "akl"
    num_collectives = 7

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu", share_of_mass("akl", "mu", self.mu))
        if self.crossing not in ("tail", "head"):
            raise ConfigError(
                f"akl: expected crossing to be tail or head, got {self.crossing!r}: it is where the token that crosses "
                "mu belongs"
            )

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """The weighted sum of both divergences."""
        pair = columns.pair(student, teacher)
        head = columns.head(teacher, pair, self.mu, crossing_in_head=self.crossing == "head")
        view = pair[:3]
        gap = difference(*view).abs_()
        terms: list[tuple[Tensor, Tensor | None]] = [
            (each.value(*view), each.grad_log_q(*view)) for each in (_FORWARD, _REVERSE)
        ]
        terms += [(gap.masked_fill(~head, 0.0), None), (gap.masked_fill_(head, 0.0), None)]
        forward, reverse, in_head, in_tail = columns.softmax_sums(student, pair, terms)
        both = in_head + in_tail
        weight = torch.where(both > 0, in_head / both, 0.5)
        return weight * forward + (1.0 - weight) * reverse
