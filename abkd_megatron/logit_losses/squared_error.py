"""The squared error of logits."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from abkd_megatron.arguments import flag
from abkd_megatron.logit_losses.base import Columns, LogitLoss
from abkd_megatron.logit_losses.correlation import finite


@dataclass(frozen=True)
class LogitMSE(LogitLoss):
    """The squared error of logits, 1/V sum (s - t)^2; centred, 1/V sum (d - mean d)^2 with d = s - t.

    The mean is over the real vocabulary. Plain, it depends on where each model's logits have their 0; centred, a shift
    of either model's logits does not change it. Columns that are -inf in either model are left out, of the count too,
    for no squared error is defined there.

    Collectives: forward: 1 for each chunk of tokens (2 floats a token); centred, 2 (2 and 1). Backward: none.

    Args:
        centred: whether the mean difference is taken off first.

    Raises:
        ConfigError: if centred is not a bool.
    """

    centred: bool = False
    name: ClassVar[str] = "logit_mse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "centred", flag("logit_mse", "centred", self.centred))

    @property
    def num_collectives(self) -> int:
        """One, or two if the mean has to be known first."""
        return 2 if self.centred else 1

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """The mean of squares."""
        s, t, inside = finite(student, teacher)
        gap = s - t
        if not self.centred:
            count, squares = columns.sums(inside, gap * gap)
            return squares / count
        # The mean takes no part in the gradient: what it would be multiplied by, the sum of the centred, is 0.
        count, total = columns.sums(inside, gap.detach())
        gap = (gap - (total / count).to(gap.dtype).unsqueeze(-1)) * inside
        (squares,) = columns.sums(gap * gap)
        return squares / count
