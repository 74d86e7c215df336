"""Forward KL on the teacher's most likely part of the vocabulary."""

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
    """KL(p' || q') with both models renormalized on the teacher's most likely columns: the logits part of DAC-KL.

    The columns are the `top_k` most likely, or the fewest whose mass is at least `mass`. Ties are broken by lowest
    global id; a column where the teacher is -inf is never included. DAC-KL also includes the label and predicts the
    quantiles by a trained network. Neither is implemented, and no term covers the remaining columns.

    Collectives: forward, per chunk of tokens: 1 with `top_k` (4 k floats per token); 8 with `mass` (normalizers, 5
    floats; head, 4 of 256 and one of 4; renormalized normalizers, 5; sums, 2), or 12 for fp64 logits. Backward: none.

    Args:
        top_k: number of columns, at least 2.
        mass: their probability, between 0 and 1. Give exactly one of the two.

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
        """1 with `top_k`; 8 with `mass`, which needs a search."""
        return 1 if self.top_k is not None else 8

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return the divergence of the renormalized distributions."""
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
