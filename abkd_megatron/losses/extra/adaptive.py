"""Adaptive KL: forward and reverse KL, weighted by where in the vocabulary the models differ."""

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
    """AKL of Wu et al., arXiv 2404.02657: forward KL for differences in the head, reverse KL for those in the tail.

        g_head/(g_head + g_tail) KL(p || q) + g_tail/(g_head + g_tail) KL(q || p),    g = sum |p - q| over the part

    The head is the set of the teacher's largest probabilities up to a mass of mu. Both weights are constant in the
    gradient, and 1/2 where the models agree exactly. Ties at the boundary are broken by lowest global id (in the
    released codes, by their sorts). Like reverse KL, infinite where only the teacher is -inf.

    Collectives: forward, per chunk of tokens: 7 (normalizers, 5 floats per token; head, 4 of 256 and one of 4; sums,
    6), or 11 for fp64 logits. Backward: none.

    Args:
        mu: mass of the head, between 0 and 1.
        crossing: ``tail``: the token whose cumulative mass crosses mu is in the tail, but the most likely one is always
            in the head, as in the authors' and ABKD's code. ``head``: it is in the head, as in ToDi's and DSKD's.

    Raises:
        ConfigError: if mu is not between 0 and 1, or crossing is neither value.
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
        """Return the weighted sum of both divergences."""
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
