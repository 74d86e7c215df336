"""The squared error of logits."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.losses.extra.correlation import finite
from abkd_megatron.validation import flag


@dataclass(frozen=True)
class LogitMSE(LogitLoss):
    """The squared error of logits, 1/V sum (s - t)^2; centered, 1/V sum (d - mean d)^2 with d = s - t.

    The mean is over the real vocabulary. Plain, it depends on where each model's logits have their 0; centered, a shift
    of either model's logits does not change it. Columns that are -inf in either model are left out, of the count too,
    for no squared error is defined there.

    Collectives: forward: 1 for each chunk of tokens (2 floats a token); centered, 2 (2 and 1). Backward: none.

    Args:
        centered: whether the mean difference is taken off first.

    Raises:
        ConfigError: if centered is not a bool.
    """

    centered: bool = False
    name: ClassVar[str] = "logit_mse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "centered", flag("logit_mse", "centered", self.centered))

    @property
    def num_collectives(self) -> int:
        """One, or two if the mean has to be known first."""
        return 2 if self.centered else 1

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """The mean of squares."""
        s, t, inside = finite(student, teacher)
        gap = s - t
        if not self.centered:
            count, squares = columns.sums(inside, gap * gap)
            return squares / count
        # The mean takes no part in the gradient: what it would be multiplied by, the sum of the centered, is 0.
        count, total = columns.sums(inside, gap.detach())
        gap = (gap - (total / count).to(gap.dtype).unsqueeze(-1)) * inside
        (squares,) = columns.sums(gap * gap)
        return squares / count
