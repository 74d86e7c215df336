"""Squared error of logits."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.losses.extra.correlation import finite
from abkd_megatron.validation import flag


@dataclass(frozen=True)
class LogitMSE(LogitLoss):
    """Mean squared error of logits, 1/V sum (s - t)^2; centered, 1/V sum (d - mean d)^2 with d = s - t.

    The mean is over the real vocabulary. Not centered, it changes when a constant is added to one model's logits.
    Columns that are -inf in either model are left out, also of the count.

    Collectives: forward: 1 per chunk of tokens (2 floats per token); centered, 2 (2 and 1). Backward: none.

    Args:
        centered: subtract the mean difference first.

    Raises:
        ConfigError: if centered is not a bool.
    """

    centered: bool = False
    name: ClassVar[str] = "logit_mse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "centered", flag("logit_mse", "centered", self.centered))

    @property
    def num_collectives(self) -> int:
        """1; 2 if centered, because the mean is needed first."""
        return 2 if self.centered else 1

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return the mean of squares."""
        s, t, inside = finite(student, teacher)
        gap = s - t
        if not self.centered:
            count, squares = columns.sums(inside, gap * gap)
            return squares / count
        # The mean needs no gradient: it would be multiplied by the sum of the centered differences, which is 0.
        count, total = columns.sums(inside, gap.detach())
        gap = (gap - (total / count).to(gap.dtype).unsqueeze(-1)) * inside
        (squares,) = columns.sums(gap * gap)
        return squares / count
