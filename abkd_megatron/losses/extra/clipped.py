"""Forward KL on the part of the vocabulary that the teacher finds likely."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import AlphaBeta
from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.validation import share_of_mass, whole_number

_FORWARD = AlphaBeta(1.0, 0.0)


@dataclass(frozen=True)
class ClippedKL(LogitLoss):
    """KL(p' || q') with both models renormalized on the teacher's likeliest columns: the logits part of DAC-KL.

    These columns are the `top_k` likeliest, or the fewest whose mass is at least `mass`. Of equal probabilities those
    of the lowest global ids come first; a column of the teacher's -inf is never among them. DAC-KL adds the label to
    them and predicts their quantiles by a network trained along; neither is offered, nor is there a term for what lies
    outside of them.

    Collectives: forward, for each chunk of tokens: with `top_k`, 1 (4 k floats per token); with `mass`, 8 (the
    log-partitions, 5 floats; the head, 4 of 256 and one of 4; those of the renormalized, 5; the sums, 2), 12 for fp64
    logits. Backward: none.

    Args:
        top_k: number of columns, at least 2.
        mass: their probability, between 0 and 1. Exactly one of the two is given.

    Raises:
        ConfigError: for both or neither, and values out of range.
    """

    top_k: int | None = None
    mass: float | None = None
    name: ClassVar[str] = "clipped_kl"

    def __post_init__(self) -> None:
        if (self.top_k is None) == (self.mass is None):
            raise ConfigError(
                f"clipped_kl: expected either top_k or mass, got top_k {self.top_k} and mass {self.mass}: give "
                "the number of columns or their probability"
            )
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole_number("clipped_kl", "top_k", self.top_k, 2))
        else:
            object.__setattr__(self, "mass", share_of_mass("clipped_kl", "mass", self.mass))

    @property
    def num_collectives(self) -> int:
        """One for a number of columns; more for a mass, which has to be searched for."""
        return 1 if self.top_k is not None else 8

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """The divergence of the renormalized."""
        if self.top_k is not None:
            _, s, t = columns.top_k(teacher, self.top_k, student, teacher)
            outside = t.isneginf()
            s = s.masked_fill(outside, -float("inf"))
            log_p, log_q = t.log_softmax(dim=-1), s.log_softmax(dim=-1)
            return (log_p.exp() * (log_p - log_q).masked_fill(outside, 0.0)).sum(dim=-1)
        assert self.mass is not None
        head = columns.head(teacher, columns.pair(student, teacher), self.mass, crossing_in_head=True)
        student, teacher = (logits.masked_fill(~head, -float("inf")) for logits in (student, teacher))
        pair = columns.pair(student, teacher)
        (value,) = columns.softmax_sums(student, pair, [(_FORWARD.value(*pair[:3]), _FORWARD.grad_log_q(*pair[:3]))])
        return value
